"""attention_pool: any strides of inputs and incoming gradients, and nothing read or written beside the tensors.
`#n` names a line of the project's failure checklist."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import attention_pool
from tests.attention_pool_cases import PoolCase, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, assert_equal, assert_same, far_apart, sliced, stepped

CASE = PoolCase(L=13, J=2, gated=True, rows="mask", returned="raw")
PACKED = PoolCase(L=13, J=2, rows="packed", returned="softmax")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("grad", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seven_input_layouts_by_seven_gradient_layouts(layout: str, grad: str, dtype: str, backend: str) -> None:
    """#7, #8: what comes out depends on values, not on strides; outputs and gradients are contiguous."""
    for case in (CASE, PACKED):
        p = problem(case, FLOATS[dtype])
        x = LAYOUTS[layout](p.inputs["x"])
        incoming = {n: LAYOUTS[grad](t) for n, t in case.gradients(evaluate(p.inputs, None, **p.options)).items()}
        plain = {n: t.contiguous().clone() for n, t in incoming.items()}
        got = evaluate(p.inputs | {"x": x}, lambda _, i=incoming: i, **p.options, backend=backend)
        inputs = p.inputs | {"x": x.contiguous().clone()}
        assert_same(backend, got, evaluate(inputs, lambda _, i=plain: i, **p.options, backend=backend), case, ulps=16)
        if backend == "cpu":
            assert all(t.is_contiguous() for t in got.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_channels_first_by_sizes(dtype: str, kernels: str) -> None:
    """#7, #9: transposes in registers, whole blocks and tails of rows and columns, single columns and pairs."""
    for length, width in itertools.product((1, 15, 16, 33, 70), (1, 16, 31, 32, 49, 64)):
        p = problem(PoolCase(B=2, L=length, D=width), FLOATS[dtype])
        first = p.inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
        got = evaluate(p.inputs | {"x": first}, p.case.gradients, **p.options, backend=kernels)
        assert_equal(got, evaluate(p.inputs, p.case.gradients, **p.options, backend=kernels), (length, width))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_argument(layout: str, dtype: str, backend: str) -> None:
    """#7, #8: all arguments at once, weights and masks too, other dtypes included."""
    for case in (CASE, PACKED, PoolCase(L=13, gated=True, rows="lengths", activation="gelu")):
        p = problem(case, FLOATS[dtype])
        inputs = {name: LAYOUTS[layout](t) for name, t in p.inputs.items()}
        options = {name: LAYOUTS[layout](t) if isinstance(t, Tensor) else t for name, t in p.options.items()}
        if "cu_seqlens" in options and layout == "expanded":
            options["cu_seqlens"] = p.options["cu_seqlens"]
        plain = {name: t.contiguous().clone() if isinstance(t, Tensor) else t for name, t in options.items()}
        got = evaluate(inputs, case.gradients, **options, backend=backend)
        inputs = {name: t.contiguous().clone() for name, t in inputs.items()}
        assert_same(backend, got, evaluate(inputs, case.gradients, **plain, backend=backend), case, ulps=16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbours_do_not_leak(dtype: str, kernels: str) -> None:
    """#35: NaN beside every slice - x, weights, queries, incoming gradients - and odd D, H, J and rows."""
    for around in (sliced, stepped):
        for width, hidden, heads in [
            (1, 1, 0),
            (3, 33, 3),
            (17, 5, 1),
            (33, 3, 0),
            (31, 31, 2),
            (63, 17, 0),
            (65, 65, 5),
        ]:
            case = PoolCase(B=2, L=21, D=width, H=hidden, J=heads, gated=heads % 2 == 1, returned="softmax")
            p = problem(case, FLOATS[dtype])

            def incoming(results: dict[str, Tensor], case: PoolCase = case, around: Any = around) -> dict[str, Tensor]:
                return {name: around(t) for name, t in case.gradients(results).items()}

            p.check(evaluate({n: around(t) for n, t in p.inputs.items()}, incoming, **p.options, backend=kernels))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_infinite_neighbour_rows_do_not_leak(dtype: str, kernels: str) -> None:
    """#35: sequences beside this one in the batch, and rows outside of a window of x, hold infinities."""
    p = problem(PoolCase(B=4, L=33, D=17), FLOATS[dtype])
    expected = evaluate(p.inputs | {"x": p.inputs["x"][1:2]}, None, **p.options, backend=kernels)["out"]
    x = torch.full((4, 99, 17), float("inf"), dtype=FLOATS[dtype])
    x[1, 33:66] = p.inputs["x"][1]
    window = evaluate(p.inputs | {"x": x[:, 33:66]}, None, **p.options, backend=kernels)["out"]
    assert torch.equal(window[1:2], expected)


def test_infinity_in_a_row_keeps_its_score(kernels: str) -> None:
    """#35: hidden units that do not exist are no factor of an infinite x."""
    for hidden in (1, 5, 16, 33):
        for gated in (False, True):
            x = torch.randn(1, 9, 4)
            x[0, 2, 1] = float("inf")
            weight = torch.rand(hidden, 4) + 0.1
            gate = weight if gated else None
            query = torch.ones(hidden)
            _, s = attention_pool(x, weight, query, gate_weight=gate, return_scores="raw", backend=kernels)
            assert s[0, 2].item() == pytest.approx(hidden, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_not_written(dtype: str, kernels: str) -> None:
    """#13, #15: values and version counters of all arguments stay."""
    for case in (CASE, PACKED, PoolCase(gated=True, rows="lengths")):
        p = problem(case, FLOATS[dtype])
        arguments = {**p.inputs, **{n: t for n, t in p.options.items() if isinstance(t, Tensor)}}
        before = {name: (t.clone(), t._version) for name, t in arguments.items()}
        incoming = case.gradients(evaluate(p.inputs, None, **p.options))
        kept = {n: t.clone() for n, t in incoming.items()}
        for recompute in (True, False):
            evaluate(p.inputs, lambda _, i=incoming: i, **p.options, recompute=recompute, backend=kernels)
        for name, (values, version) in before.items():
            assert torch.equal(arguments[name], values) and arguments[name]._version == version, name
        assert all(torch.equal(incoming[n], kept[n]) for n in kept)


def test_downstream_of_the_result(kernels: str) -> None:
    """#7: gradients that arrive through sum, cat, transpose and expand have strides of 0 and others."""
    p = problem(PoolCase(J=3, returned="softmax"), torch.float64)
    consumers = {
        "sum": lambda out, a: out.sum() + a.sum(),
        "cat": lambda out, a: torch.cat([out, out], 2)[:, :, 3:8].square().sum() + a[:, :, 1:4].sin().sum(),
        "transpose": lambda out, a: (out.transpose(1, 2) @ out).sum() + (a.transpose(1, 2) @ a).sum(),
        "expand": lambda out, a: (out[:, :1].expand(-1, 4, -1) * 2).sum() + a[:, :1].expand(-1, 3, -1).square().sum(),
    }
    for name, consumer in consumers.items():
        results = []
        for backend in (kernels, "reference"):
            leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
            consumer(*attention_pool(**leaves, **p.options, backend=backend)).backward()
            results.append([t.grad for t in leaves.values()])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12), name


@pytest.mark.no_poison  # it would fill gigabytes that stay unused otherwise
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "row", "channel"])
def test_strides_beyond_32_bits(dimension: int, kernels: str) -> None:
    """#10: the last element of x lies more than 2**31 elements behind the first, in each dimension in turn."""
    p = problem(PoolCase(B=3, L=4), torch.float16)
    x = far_apart(p.inputs["x"], dimension)
    got = evaluate(p.inputs | {"x": x}, p.case.gradients, **p.options, backend=kernels)
    assert_equal(got, evaluate(p.inputs, p.case.gradients, **p.options, backend=kernels))


def test_expanded_input_of_many_elements(kernels: str) -> None:
    """#10: 2**31 logical elements behind one stored row; only the rows that live are computed."""
    width, length = 32, 2**15
    batch = 2**31 // (width * length) + 1
    x = torch.randn(1, 1, width).expand(batch, length, width)
    lengths = torch.zeros(batch, dtype=torch.int64)
    lengths[-1] = 7
    out = attention_pool(x, torch.randn(8, width), torch.randn(8), lengths=lengths, backend=kernels)
    assert x.numel() > 2**31 and out[:-1].eq(0).all() and torch.allclose(out[-1], x[0, 0], rtol=1e-6)

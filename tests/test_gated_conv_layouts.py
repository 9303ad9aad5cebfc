"""gated_conv1d: any strides of inputs and incoming gradients, and nothing read or written beside the tensors.
`#n` names a line of the project's failure checklist."""

import itertools

import pytest
import torch
from torch import Tensor

from pykernels import gated_conv1d
from tests.gated_conv_cases import Case, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, assert_equal, assert_same, far_apart, sliced, stepped

CASE = Case(B=3, L=13, C_in=7, C_out=7, cond="all", rows="mask")
PACKED = Case(B=3, L=13, C_in=7, C_out=7, cond="all", rows="packed")


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.contiguous().clone() for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("grad", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seven_input_layouts_by_seven_gradient_layouts(layout: str, grad: str, dtype: str, backend: str) -> None:
    """#7, #8: what comes out depends on values, not on strides; outputs and gradients are contiguous."""
    for case in (CASE, PACKED):
        p = problem(case, FLOATS[dtype])
        x, dy = LAYOUTS[layout](p.inputs["x"]), LAYOUTS[grad](case.dy(p.same["y"]))
        got = evaluate(p.inputs | {"x": x}, dy, **p.options, backend=backend)
        inputs = p.inputs | {"x": x.contiguous().clone()}
        assert_same(backend, got, evaluate(inputs, dy.contiguous().clone(), **p.options, backend=backend), case)
        if backend == "cpu":
            assert all(t.is_contiguous() for t in got.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_channels_first_by_sizes(dtype: str, kernels: str) -> None:
    """#7, #9: transposes in registers, whole blocks and tails of rows and columns, single columns and pairs."""
    for length, channels in itertools.product((1, 15, 16, 33, 70), (1, 16, 31, 32, 49, 64)):
        p = problem(Case(B=2, L=length, C_in=channels, C_out=5, residual="none", K=2), FLOATS[dtype])
        first = p.inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
        got = evaluate(p.inputs | {"x": first}, p.case.dy, **p.options, backend=kernels)
        assert_equal(got, evaluate(p.inputs, p.case.dy, **p.options, backend=kernels), (length, channels))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_argument(layout: str, dtype: str, backend: str) -> None:
    """#7, #8: all arguments at once, weights and masks too, with one and two weights, other dtypes included."""
    for case in (
        CASE,
        Case(B=3, L=13, two_weights=True, cond="one", rows="lengths", padding="causal"),
        Case(B=3, L=13, C_in=4, C_out=9, residual="none", cond="one", rows="packed"),
    ):
        p = problem(case, FLOATS[dtype])
        inputs = {name: LAYOUTS[layout](t) for name, t in p.inputs.items()}
        options = {name: LAYOUTS[layout](t) if isinstance(t, Tensor) else t for name, t in p.options.items()}
        if "cu_seqlens" in options and layout == "expanded":
            options["cu_seqlens"] = p.options["cu_seqlens"]
        plain = {name: t.contiguous().clone() if isinstance(t, Tensor) else t for name, t in options.items()}
        got = evaluate(inputs, case.dy, **options, backend=backend)
        assert_same(backend, got, evaluate(contiguous(inputs), case.dy, **plain, backend=backend), case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbours_do_not_leak(dtype: str, kernels: str) -> None:
    """#35: NaN beside every slice - x, weights, cond, dy - and odd K, C and rows, by the error rule."""
    for around in (sliced, stepped):
        for channels, k in [(1, 1), (3, 3), (17, 5), (33, 3), (31, 1), (63, 2), (65, 3)]:
            case = Case(B=2, L=21, C_in=channels, C_out=channels, K=k, cond="all")
            p = problem(case, FLOATS[dtype])
            dy = around(case.dy(p.same["y"]))
            p.check(evaluate({name: around(t) for name, t in p.inputs.items()}, dy, **p.options, backend=kernels))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_infinite_neighbour_rows_do_not_leak(dtype: str, kernels: str) -> None:
    """#35: sequences beside this one in the batch, and rows outside of a window of x, hold infinities."""
    case = Case(B=4, L=33, C_in=17, C_out=17, K=5, dilation=3)
    p = problem(case, FLOATS[dtype])
    alone = {name: t[1:2] if name == "x" else t for name, t in p.inputs.items()}
    expected = evaluate(alone, None, **p.options, backend=kernels)["y"]
    x = torch.full((4, 99, 17), float("inf"), dtype=FLOATS[dtype])
    x[1, 33:66] = p.inputs["x"][1]
    window = evaluate(p.inputs | {"x": x[:, 33:66]}, None, **p.options, backend=kernels)["y"]
    assert torch.equal(window[1:2], expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_not_written(dtype: str, kernels: str) -> None:
    """#13, #15: values and version counters of all arguments stay."""
    for case in (CASE, PACKED, Case(two_weights=True, rows="lengths", cond="one")):
        p = problem(case, FLOATS[dtype])
        arguments = {**p.inputs, **{n: t for n, t in p.options.items() if isinstance(t, Tensor)}}
        before = {name: (t.clone(), t._version) for name, t in arguments.items()}
        dy = case.dy(p.same["y"])
        dy_before = dy.clone()
        for recompute in (False, True):
            evaluate(p.inputs, dy, **p.options, recompute=recompute, backend=kernels)
        for name, (values, version) in before.items():
            assert torch.equal(arguments[name], values) and arguments[name]._version == version, name
        assert torch.equal(dy, dy_before)


def test_downstream_of_the_result(kernels: str) -> None:
    """#7: gradients that arrive through sum, cat, transpose and expand have strides of 0 and others."""
    case = Case(B=2, L=9)
    p = problem(case, torch.float64)
    consumers = {
        "sum": lambda y: y.sum(),
        "cat": lambda y: torch.cat([y, y], 2)[:, :, 3:8].square().sum(),
        "transpose": lambda y: (y.transpose(1, 2) @ y).sum(),
        "mean": lambda y: y.mean(1).square().sum(),
        "expand": lambda y: (y[:, :1].expand(-1, 4, -1) * 2).sum(),
    }
    for name, consumer in consumers.items():
        results = []
        for backend in (kernels, "reference"):
            leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
            consumer(gated_conv1d(**leaves, **p.options, backend=backend)).backward()
            results.append([t.grad for t in leaves.values()])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12), name


@pytest.mark.no_poison  # it would fill gigabytes that stay unused otherwise
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "row", "channel"])
def test_strides_beyond_32_bits(dimension: int, kernels: str) -> None:
    """#10: the last element of x lies more than 2**31 elements behind the first, in each dimension in turn."""
    case = Case(B=3, L=4, K=2)
    p = problem(case, torch.float16)
    x = far_apart(p.inputs["x"], dimension)
    got = evaluate(p.inputs | {"x": x}, case.dy, **p.options, backend=kernels)
    assert_equal(got, evaluate(p.inputs, case.dy, **p.options, backend=kernels))


def test_expanded_input_of_many_elements(kernels: str) -> None:
    """#10: 2**31 logical elements behind one stored row; only the part that lives is computed."""
    channels, length = 32, 2**15
    batch = 2**31 // (channels * length) + 1
    x = torch.randn(1, 1, channels).expand(batch, length, channels)
    lengths = torch.zeros(batch, dtype=torch.int64)
    assert x.numel() > 2**31 and lengths.shape == (batch,)
    window = x[-1:, -64:]
    weight = torch.randn(2 * channels, channels, 3)
    y = gated_conv1d(window, weight, backend=kernels)
    assert torch.equal(y, gated_conv1d(window.contiguous(), weight, backend=kernels))


def test_poison_is_on(kernels: str) -> None:
    """#34: the other tests of this folder would see memory that a kernel left unwritten."""
    assert torch.empty(100).isnan().all() and torch.empty(100, dtype=torch.uint8).eq(255).all()

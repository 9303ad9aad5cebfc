"""attention_pool under torch.compile, export, ONNX, autocast, opcheck and function transforms. `#n` names a line of the
project's failure checklist."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from pykernels import AttentionPool, attention_pool
from tests.attention_pool_cases import PoolCase, evaluate, problem
from tests.helpers import LAYOUTS, assert_equal, assert_transforms_are_refused, is_standard, through_onnx

CASES = {
    "plain": PoolCase(),
    "raw": PoolCase(J=2, gated=True, rows="lengths", returned="raw"),
    "softmax": PoolCase(activation="gelu", rows="mask", returned="softmax", bias=False),
    "packed": PoolCase(J=3, rows="packed", returned="raw", activation="swish"),
    "packed, one query": PoolCase(rows="packed", returned="softmax", activation="relu"),
}


pytestmark = pytest.mark.usefixtures("forget_compiled")


# --- raw operators ---


def raw_arguments(case: PoolCase, dtype: torch.dtype, layout: str, keep: bool = False) -> tuple[tuple, tuple]:
    """Arguments of _attention_pool_fwd, and those of _attention_pool_bwd."""
    p = problem(case, dtype)
    change = LAYOUTS[layout]
    names = ("x", "weight", "query", "bias", "gate_weight", "gate_bias")
    tensors: list[Any] = [p.inputs.get(n) for n in names]
    tensors = [t if t is None else change(t) for t in tensors]
    tensors += [p.options.get(n) for n in ("mask", "lengths", "cu_seqlens")]
    form = (case.activation, case.returned or "none")
    forward = (*tensors, *form, True, keep)
    out, scores, weights, max_sum, pooled, kept = torch.ops.pykernels._attention_pool_fwd(*forward)
    incoming = case.gradients({"out": out, "scores": scores})
    dscores = change(incoming["scores"]) if case.returned else None
    saved = (scores, max_sum, out if out.dtype == scores.dtype else pooled, kept if keep else None)
    needs = [t is not None for t in tensors[:6]]
    return forward, (change(incoming["out"]), dscores, *tensors, *saved, *form, needs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, layout: str, extension: object) -> None:
    """#12: schema, fake and dispatch of the raw operators, over all layouts."""
    for keep in (False, True):
        forward, backward = raw_arguments(CASES[name], torch.float32, layout, keep)
        torch.library.opcheck(torch.ops.pykernels._attention_pool_fwd.default, forward)
        torch.library.opcheck(torch.ops.pykernels._attention_pool_bwd.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_shapes_and_strides_are_the_real_ones(layout: str, dtype: torch.dtype, extension: object) -> None:
    """#12: sizes, strides and dtypes of every output, saved or not, all gradients or some."""
    for case in [*CASES.values(), PoolCase(B=0), PoolCase(L=0, J=2)]:
        for few in (False, True):
            forward, backward = raw_arguments(case, dtype, layout, keep=not few)
            if few:
                forward = (*forward[:-2], False, False)
                needs = [i % 2 == 0 and needed for i, needed in enumerate(backward[-1])]
                backward = (None, *backward[1:-1], needs)
            for op, arguments in (("fwd", forward), ("bwd", backward)):
                call = getattr(torch.ops.pykernels, f"_attention_pool_{op}")
                with FakeTensorMode() as mode:
                    fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
                    shapes = [(t.shape, t.stride(), t.dtype) for t in call(*fake)]
                assert shapes == [(t.shape, t.stride(), t.dtype) for t in call(*arguments)], (case, op)


# --- torch.compile ---


@pytest.mark.parametrize("name", CASES)
def test_compile_without_graph_breaks(name: str, backend: str) -> None:
    """#11: forward and backward of the compiled function, bitwise those of eager mode on the kernels."""
    case = CASES[name]
    p = problem(case, torch.float32)
    compiled = torch.compile(attention_pool, fullgraph=True, backend="aot_eager")
    for recompute in (True, False):
        options = {**p.options, "recompute": recompute, "backend": backend}
        got = evaluate(p.inputs, case.gradients, call=compiled, **options)
        expected = evaluate(p.inputs, case.gradients, **options)
        if backend == "cpu":
            assert_equal(got, expected, name)
        for key in got:
            assert torch.allclose(got[key], expected[key], rtol=1e-4, atol=1e-5), key
    inferred = evaluate(p.inputs, None, call=compiled, **p.options, backend=backend)
    assert torch.allclose(inferred["out"], p.same["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_compile_recompiles_once_for_lengths(training: bool, extension: object) -> None:
    """#11: five lengths and batch sizes need one dynamic graph besides the first."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_pool, fullgraph=True, backend=counter)
    weight, query = torch.randn(16, 8, requires_grad=training), torch.randn(16)
    for batch, length in [(2, 10), (3, 17), (4, 64), (2, 5), (7, 33)]:
        x = torch.randn(batch, length, 8, requires_grad=training)
        lengths = torch.randint(0, length, (batch,))
        out, a = compiled(x, weight, query, lengths=lengths, return_scores="softmax")
        expected, b = attention_pool(x, weight, query, lengths=lengths, return_scores="softmax")
        assert torch.equal(out, expected) and torch.equal(a, b)
        if training:
            (out.sum() + a.square().sum()).backward()
    assert counter.frame_count <= 2


def test_compiled_by_inductor(extension: object) -> None:
    """A module inside a graph with other operators, forward and backward, dynamic shapes from the start."""
    pool = AttentionPool(8, 16, 2, bias=True, gated=True)

    def model(x: Tensor, lengths: Tensor) -> Tensor:
        out, a = pool(torch.tanh(x), lengths=lengths, return_scores="softmax")
        return out.square().sum() - (a * torch.log(a + 1e-9)).sum()

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, length in [(2, 9), (3, 20)]:
        x, lengths = torch.randn(batch, length, 8), torch.randint(1, length + 1, (batch,))
        results = []
        for call in (model, compiled):
            leaf = x.clone().requires_grad_()
            pool.zero_grad()
            loss = call(leaf, lengths)
            loss.backward()
            results.append([loss, leaf.grad, *(p.grad.clone() for p in pool.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# --- export ---


class Arguments(torch.nn.Module):
    """A module whose arguments are all tensors, for exporters."""

    def __init__(self, names: list[str], heads: int | None = None, **options: Any) -> None:
        super().__init__()
        self.names, self.options = names, options
        self.pool = AttentionPool(6, 5, heads, bias=True, gated=True)

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.pool(x, **dict(zip(self.names, more, strict=True)), **self.options)


def assert_equal_results(a: Any, b: Any) -> None:
    for one, other in zip(*([t] if isinstance(t, Tensor) else t for t in (a, b)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("returned", [None, "raw", "softmax"])
def test_export_has_standard_operators_only(returned: str | None, strict: bool) -> None:
    """Dynamic B and L; parity at two lengths; whatever backend is chosen."""
    module = Arguments([], 2, return_scores=returned).eval()
    dynamic = {0: torch.export.Dim("B"), 1: torch.export.Dim("L", min=2)}
    x = torch.randn(2, 12, 6)
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,), strict=strict)
    assert is_standard(program.graph), program.graph
    for batch, length in [(3, 40), (5, 9)]:
        x = torch.randn(batch, length, 6)
        assert_equal_results(program.module()(x), module(x))


def test_export_with_masks_lengths_and_packed_rows() -> None:
    batch, length = torch.export.Dim("B"), torch.export.Dim("L", min=2)
    cases = [
        (["mask"], (torch.rand(2, 9) < 0.5,), ({0: batch, 1: length},)),
        (["lengths"], (torch.tensor([0, 9]),), ({0: batch},)),
    ]
    for names, more, shapes in cases:
        module = Arguments(names, return_scores="softmax").eval()
        x = torch.randn(2, 9, 6)
        program = torch.export.export(module, (x, *more), dynamic_shapes=({0: batch, 1: length}, shapes))
        assert is_standard(program.graph)
        assert_equal_results(program.module()(x, *more), module(x, *more))
    module = Arguments(["cu_seqlens"], 2, return_scores="raw").eval()
    shapes = ({0: torch.export.Dim("T", min=6)}, ({0: torch.export.Dim("N", min=3)},))
    example = (torch.randn(12, 6), torch.tensor([0, 5, 12]))
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    assert is_standard(program.graph)
    x, bounds = torch.randn(31, 6), torch.tensor([0, 9, 9, 31])
    assert_equal_results(program.module()(x, bounds), module(x, bounds))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_has_standard_operators_only() -> None:
    """What the older ONNX exporter and many serving stacks start from; other lengths than the traced one work."""
    module = AttentionPool(6, 5, 2, gated=True).eval()
    traced = torch.jit.trace(module, (torch.randn(2, 9, 6),), check_trace=False)
    assert is_standard(traced.inlined_graph)
    x = torch.randn(3, 21, 6)
    assert torch.allclose(traced(x), module(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx")
@pytest.mark.parametrize("with_mask", [False, True])
def test_onnx_export_has_standard_operators_only(with_mask: bool, tmp_path: Any) -> None:
    """Acceptance 7: dynamic B and L, parity at two lengths in the evaluator of the onnx package."""
    module = Arguments(["mask"] if with_mask else [], return_scores="softmax").eval()
    batch, length = torch.export.Dim("B"), torch.export.Dim("L", min=4)
    example = (torch.randn(2, 9, 6), torch.ones(2, 9, dtype=torch.bool))[: 2 if with_mask else 1]
    dims = {0: batch, 1: length}
    exported = through_onnx(module, example, (dims, (dims,)) if with_mask else (dims,), tmp_path)
    for b, n in [(1, 40), (3, 5)]:
        inputs = (torch.randn(b, n, 6), torch.rand(b, n) < 0.7)[: len(example)]
        assert_equal_results(exported(*inputs), module(*inputs))


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """#16: float32 parameters and any x give the result of casting everything by hand, gradients in their own dtype."""
    for case in CASES.values():
        p = problem(case, torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            got = evaluate(p.inputs, case.gradients, **p.options, backend=backend)
            mixed = p.inputs | {"x": p.inputs["x"].to(dtype)}
            assert torch.equal(evaluate(mixed, None, **p.options, backend=backend)["out"], got["out"])
        cast = {n: t.to(dtype) for n, t in p.inputs.items()}
        expected = evaluate(cast, case.gradients, **p.options, backend=backend)
        assert got["out"].dtype == dtype and got.get("scores", torch.zeros(0)).dtype == torch.float32
        for name, t in p.inputs.items():
            assert got[f"d{name}"].dtype == t.dtype
            if backend == "cpu":  # the reference's own products follow autocast too
                assert torch.equal(got[f"d{name}"].to(dtype), expected[f"d{name}"]), (name, case)


def test_autocast_leaves_float64_alone(backend: str) -> None:
    p = problem(PoolCase(), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(p.inputs, None, **p.options, backend=backend)["out"].dtype == torch.float64


def test_autocast_compiles(extension: object) -> None:
    case = CASES["raw"]
    p = problem(case, torch.float32)
    compiled = torch.compile(attention_pool, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(p.inputs, case.gradients, call=compiled, **p.options)
        assert_equal(got, evaluate(p.inputs, case.gradients, **p.options))


# --- function transforms ---


def test_functional_gradients(kernels: str) -> None:
    p = problem(PoolCase(bias=False), torch.float64)
    tensors = tuple(p.inputs.values())

    def loss(*tensors: Tensor) -> Tensor:
        return attention_pool(*tensors, backend=kernels).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_vmap_and_forward_mode_are_refused_by_name(kernels: str) -> None:
    """#30: named errors instead of silently dropped tangents, with and without gradients."""
    x, weight, query = torch.randn(3, 2, 9, 4), torch.randn(8, 4), torch.randn(8)
    for gradients in (False, True):
        weight.requires_grad_(gradients)

        def call(t: Tensor) -> Tensor:
            return attention_pool(t, weight, query, backend=kernels)

        with torch.set_grad_enabled(gradients):
            assert_transforms_are_refused("attention_pool", call, x)

"""lora_linear under torch.compile, export, ONNX, autocast, opcheck and function transforms. `#n` names a line of the
project's failure checklist."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from pykernels import lora_linear, lora_linear_multi
from tests.helpers import LAYOUTS, assert_equal, assert_same, assert_transforms_are_refused, is_standard, through_onnx
from tests.lora_linear_cases import LoraCase, call_of, evaluate, problem

CASES = {
    "plain": LoraCase(),
    "many rows": LoraCase(leading=(30,), transposed=True, float_adapters=True, bias=False),
    "dropout": LoraCase(dropout=0.3),
    "several": LoraCase(leading=(4, 9), E=3, scales=True, dropout=0.3),
    "several, a sequence each": LoraCase(leading=(4, 9), E=2, indexed=1, R=1),
}
pytestmark = pytest.mark.usefixtures("forget_compiled")


# --- raw operators ---


def raw_arguments(case: LoraCase, dtype: torch.dtype, layout: str) -> tuple[tuple, tuple]:
    """Arguments of _lora_linear_fwd, and those of _lora_linear_bwd."""
    p = problem(case, dtype)
    change = LAYOUTS[layout]
    tensors: list[Any] = [p.inputs.get(n) for n in ("x", "weight", "lora_a", "lora_b", "bias")]
    scale = p.options["scale"]
    tensors += [scale if isinstance(scale, Tensor) else None, p.options.get("adapter_index")]
    tensors = [t if t is None else change(t) for t in tensors] + [torch.tensor(5) if case.dropout else None]
    form = (1.0 if isinstance(scale, Tensor) else scale, case.dropout)
    y, s, keep = torch.ops.pykernels._lora_linear_fwd(*tensors, *form)
    needs = [t is not None for t in tensors[:5]]
    return (*tensors, *form), (change(case.dy(y)), *tensors, s, keep, *form, needs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, layout: str, extension: object) -> None:
    """#12: schema, fake and dispatch of the raw operators, over all layouts."""
    forward, backward = raw_arguments(CASES[name], torch.float32, layout)
    torch.library.opcheck(torch.ops.pykernels._lora_linear_fwd.default, forward)
    torch.library.opcheck(torch.ops.pykernels._lora_linear_bwd.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_shapes_and_strides_are_the_real_ones(layout: str, dtype: torch.dtype, extension: object) -> None:
    """#12: sizes, strides and dtypes of every output, all gradients or some."""
    empty = [
        LoraCase(leading=(0,), dropout=0.1), LoraCase(K=0, dropout=0.1), LoraCase(N=0), LoraCase(R=0), LoraCase(()),
        LoraCase((), E=2),
    ]  # fmt: skip
    for case in [*CASES.values(), *(empty if layout not in ("expanded", "stepped") else [])]:
        for few in (False, True):
            forward, backward = raw_arguments(case, dtype, layout)
            if few:
                backward = (*backward[:-1], [i % 2 == 0 and needed for i, needed in enumerate(backward[-1])])
            for op, arguments in (("fwd", forward), ("bwd", backward)):
                call = getattr(torch.ops.pykernels, f"_lora_linear_{op}")
                with FakeTensorMode() as mode:
                    fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
                    shapes = [(t.shape, t.stride(), t.dtype) for t in call(*fake)]
                assert shapes == [(t.shape, t.stride(), t.dtype) for t in call(*arguments)], (case, op)


# --- torch.compile ---


@pytest.mark.parametrize("name", CASES)
def test_compile_without_graph_breaks(name: str, backend: str) -> None:
    """#11: forward and backward of the compiled function, bitwise those of eager mode on the kernels."""
    case = CASES[name]
    dtype = torch.bfloat16 if case.float_adapters else torch.float32
    p = problem(case, dtype)
    compiled = torch.compile(call_of(p.options), fullgraph=True, backend="aot_eager")
    got = evaluate(p.inputs, case.dy, call=compiled, **p.options, backend=backend)
    expected = evaluate(p.inputs, case.dy, **p.options, backend=backend)
    if backend == "cpu":
        assert_equal(got, expected, name)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for key in got:
        assert torch.allclose(got[key], expected[key], rtol=tolerance, atol=tolerance), key
    inferred = evaluate(p.inputs, None, call=compiled, **p.options, backend=backend)
    assert torch.allclose(inferred["y"], p.same["y"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compile_recompiles_once_for_lengths(training: bool, multi: bool, extension: object) -> None:
    """#11: five lengths and batch sizes, with few rows and many, need one dynamic graph besides the first."""
    counter = CompileCounterWithBackend("aot_eager")
    call = lora_linear_multi if multi else lora_linear
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    p = problem(LoraCase(K=8, E=2 * multi), torch.float32)
    tensors = {n: t.clone().requires_grad_(training) for n, t in p.inputs.items() if n != "x"}
    for batch, length in [(2, 3), (3, 17), (4, 64), (2, 5), (7, 33)]:
        x = torch.randn(batch, length, 8, requires_grad=training)
        options: dict[str, Any] = {"seed": torch.tensor(length), "dropout": 0.2, "training": True}
        if multi:
            options["adapter_index"] = torch.randint(-1, 2, (batch,))
        y = compiled(x, **tensors, **options)
        assert torch.equal(y, call(x, **tensors, **options))
        if training:
            y.sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("E", [0, 2])
def test_compile_does_not_recompile_for_every_scale(E: int, name: str, extension: object) -> None:
    """#11: a scale that changes from call to call is an input of the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    p = problem(LoraCase(E=E), torch.float32)
    compiled = torch.compile(call_of(p.options), fullgraph=True, backend=counter)
    for scale in (0.5, 0.25, -3.0, 0.1, 2.0):
        options = p.options | {"scale": scale, "backend": name}
        got = evaluate(p.inputs, p.case.dy, call=compiled, **options)
        assert_same(name, got, evaluate(p.inputs, p.case.dy, **options), scale)
    assert counter.frame_count <= 2


class Layer(nn.Module):
    """A linear layer with an adapter, or with E of them and the index as a second argument."""

    def __init__(self, K: int, N: int, E: int = 0, dropout: float = 0.0, transposed: bool = False) -> None:
        super().__init__()
        tensors = LoraCase(K=K, N=N, E=E, R=4).inputs(torch.float32)
        del tensors["x"]
        self.dropout, self.transposed = dropout, transposed
        if transposed:
            tensors["weight"] = tensors["weight"].t().contiguous()
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t))

    def forward(self, x: Tensor, *index: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        call = lora_linear_multi if index else lora_linear
        return call(
            x, weight, self.lora_a, self.lora_b, *index, bias=self.bias, scale=2.0, dropout=self.dropout,
            training=self.training,
        )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiled_layers_draw_the_bits_of_eager(dropout: float, extension: object) -> None:
    """Inductor, seeds drawn inside: torch.manual_seed governs them, layers draw different ones, eager and compiled
    agree bit for bit, forward and backward."""
    stack = nn.Sequential(Layer(8, 12, dropout=dropout), nn.ReLU(), Layer(12, 8, dropout=dropout, transposed=True))
    stack[0].weight.requires_grad_(False)
    compiled = torch.compile(stack, fullgraph=True)
    x = torch.randn(2, 20, 8)
    results = []
    for call in (stack, compiled, compiled):
        torch.manual_seed(17)
        leaf = x.clone().requires_grad_()
        stack.zero_grad()
        y = call(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad.clone() for p in stack.parameters() if p.requires_grad)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    assert stack[0].weight.grad is None
    if dropout:
        assert not torch.equal(compiled(x), results[0][0])


# --- export ---


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("E", [0, 3])
def test_export_has_standard_operators_only(E: int, strict: bool) -> None:
    """Dynamic B and L; parity at two lengths; whatever backend is chosen."""
    layer = Layer(6, 5, E).eval()
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("L", min=2)}

    def arguments(batch: int, length: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, length, 6), torch.randint(-1, 3, (batch, length)))[: 2 if E else 1]

    example = arguments(2, 12)
    shapes = (dims, (dims,)) if E else (dims,)
    program = torch.export.export(layer, example, dynamic_shapes=shapes, strict=strict)
    assert is_standard(program.graph), program.graph
    for batch, length in [(3, 40), (5, 9)]:
        inputs = arguments(batch, length)
        assert torch.allclose(program.module()(*inputs), layer(*inputs), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_has_standard_operators_only() -> None:
    """What the older ONNX exporter and many serving stacks start from; other lengths than the traced one work."""
    layer = nn.Sequential(Layer(6, 5), Layer(5, 6, transposed=True)).eval()
    traced = torch.jit.trace(layer, (torch.randn(2, 9, 6),), check_trace=False)
    assert is_standard(traced.inlined_graph)
    x = torch.randn(3, 21, 6)
    assert torch.allclose(traced(x), layer(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx")
@pytest.mark.parametrize("E", [0, 3])
def test_onnx_export_has_standard_operators_only(E: int, tmp_path: Any) -> None:
    """Acceptance 7: dynamic B and L, parity at two lengths in the evaluator of the onnx package."""
    layer = Layer(6, 5, E).eval()
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("L", min=4)}
    example = (torch.randn(2, 9, 6), torch.randint(-1, 3, (2, 9)))[: 2 if E else 1]
    exported = through_onnx(layer, example, (dims, (dims,)) if E else (dims,), tmp_path)
    for b, n in [(1, 40), (3, 5)]:
        inputs = (torch.randn(b, n, 6), torch.randint(-1, 3, (b, n)))[: len(example)]
        (got,) = exported(*inputs)
        assert torch.allclose(got, layer(*inputs), atol=1e-5)


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """#16: float32 parameters and any x give the result of casting everything by hand, gradients in their own dtype."""
    for case in CASES.values():
        p = problem(case, torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            got = evaluate(p.inputs, case.dy, **p.options, backend=backend)
            for mixed in ({"x": p.inputs["x"].to(dtype)}, {"weight": p.inputs["weight"].to(dtype)}):
                y = evaluate(p.inputs | mixed, None, **p.options, backend=backend)["y"]
                assert torch.equal(y, got["y"])
        cast = {n: t.to(dtype) for n, t in p.inputs.items()}
        expected = evaluate(cast, case.dy, **p.options, backend=backend)
        assert got["y"].dtype == dtype
        for name, t in p.inputs.items():
            assert got[f"d{name}"].dtype == t.dtype
            if backend == "cpu":  # the reference's own products follow autocast too
                assert torch.equal(got[f"d{name}"].to(dtype), expected[f"d{name}"]), (name, case)


def test_autocast_leaves_float64_alone(backend: str) -> None:
    p = problem(LoraCase(), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(p.inputs, None, **p.options, backend=backend)["y"].dtype == torch.float64


def test_autocast_compiles(extension: object) -> None:
    case = CASES["several"]
    p = problem(case, torch.float32)
    compiled = torch.compile(lora_linear_multi, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(p.inputs, case.dy, call=compiled, **p.options)
        assert_equal(got, evaluate(p.inputs, case.dy, **p.options))


# --- function transforms ---


def test_functional_gradients(kernels: str) -> None:
    p = problem(LoraCase(bias=False, dropout=0.2), torch.float64)
    tensors = tuple(p.inputs.values())

    def loss(*tensors: Tensor) -> Tensor:
        return lora_linear(*tensors, **p.options, backend=kernels).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("E", [0, 2])
def test_vmap_and_forward_mode_are_refused_by_name(E: int, kernels: str) -> None:
    """#30: named errors instead of silently dropped tangents, with and without gradients."""
    p = problem(LoraCase(E=E), torch.float32)
    x = torch.stack([p.inputs["x"]] * 3)
    for gradients in (False, True):
        rest = {n: t.clone().requires_grad_(gradients) for n, t in p.inputs.items() if n != "x"}
        call = partial(call_of(p.options), **rest, **p.options, backend=kernels)
        with torch.set_grad_enabled(gradients):
            assert_transforms_are_refused("lora_linear", call, x)

"""gated_conv1d under torch.compile, export, ONNX, autocast, opcheck and function transforms. `#n` names a line of the
project's failure checklist."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from pykernels import GatedConv1d, gated_conv1d, gated_conv1d_step
from tests.gated_conv_cases import Case, evaluate, problem
from tests.helpers import LAYOUTS, assert_equal, assert_transforms_are_refused, is_standard, through_onnx

CASES = {
    "plain": Case(),
    "tanh": Case(C_out=7, residual="none", value_act="tanh", padding="causal", cond="one", rows="lengths"),
    "two": Case(two_weights=True, residual="add", padding="valid", cond="all", rows="mask"),
    "packed": Case(rows="packed", cond="all", split="gate_value"),
    "dropout": Case(gate_dropout=0.3),
}


pytestmark = pytest.mark.usefixtures("forget_compiled")


# --- raw operators ---


def raw_arguments(case: Case, dtype: torch.dtype, layout: str, save: bool) -> tuple[tuple, tuple]:
    """Arguments of _gated_conv_fwd, and those of _gated_conv_bwd."""
    p = problem(case, dtype)
    change = LAYOUTS[layout]
    tensors: list[Any] = [p.inputs.get(n) for n in ("x", "weight", "bias", "gate_weight", "gate_bias", "cond")]
    tensors = [t if t is None else change(t) for t in tensors]
    tensors += [p.options.get(n) for n in ("mask", "lengths", "cu_seqlens")]
    tensors.append(torch.tensor(5) if case.gate_dropout else None)
    form = (case.dilation, case.padding, case.residual, case.value_act, case.split, case.gate_dropout, 0.0)
    forward = (*tensors, None, *form, save)
    y, saved = torch.ops.pykernels._gated_conv_fwd(*forward)
    dy = change(case.dy(y))
    return forward, (dy, *tensors, saved if save else None, *form, [t is not None for t in tensors[:6]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, layout: str, extension: object) -> None:
    """#12: schema, fake and dispatch of the raw operators, over all layouts."""
    save = layout in ("contiguous", "sliced")
    forward, backward = raw_arguments(CASES[name], torch.float32, layout, save)
    torch.library.opcheck(torch.ops.pykernels._gated_conv_fwd.default, forward)
    torch.library.opcheck(torch.ops.pykernels._gated_conv_bwd.default, backward)


def test_opcheck_of_the_small_operators(extension: object) -> None:
    ops = torch.ops.pykernels
    torch.library.opcheck(ops._random_bits.default, (torch.tensor(3), 5, 9, 0, 0))
    torch.library.opcheck(ops._seed.default, (), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        ops._gated_conv_pack.default,
        (torch.randn(8, 4, 3), None, "value_gate"),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert torch.Tag.nondeterministic_seeded in ops._seed.default.tags


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_shapes_and_strides_are_the_real_ones(layout: str, dtype: torch.dtype, extension: object) -> None:
    """#12: sizes, strides and dtypes of every output, saved or not, all gradients or some."""
    for case in [*CASES.values(), Case(B=0), Case(L=0), Case(L=4, padding="valid")]:
        for save in (False, True):
            for op, arguments in zip(
                (torch.ops.pykernels._gated_conv_fwd, torch.ops.pykernels._gated_conv_bwd),
                raw_arguments(case, dtype, layout, save),
                strict=True,
            ):
                if isinstance(arguments[-1], list) and not save:
                    arguments = (*arguments[:-1], [i % 2 == 0 and need for i, need in enumerate(arguments[-1])])
                with FakeTensorMode() as mode:
                    fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
                    shapes = [(t.shape, t.stride(), t.dtype) for t in op(*fake)]
                assert shapes == [(t.shape, t.stride(), t.dtype) for t in op(*arguments)], (case, op)


# --- torch.compile ---


@pytest.mark.parametrize("name", CASES)
def test_compile_without_graph_breaks(name: str, backend: str) -> None:
    """#11: forward and backward of the compiled function, bitwise those of eager mode on the kernels."""
    case = CASES[name]
    p = problem(case, torch.float32)
    compiled = torch.compile(gated_conv1d, fullgraph=True, backend="aot_eager")
    for recompute in (False, True):
        options = {**p.options, "recompute": recompute, "backend": backend}
        got = evaluate(p.inputs, case.dy, call=compiled, **options)
        expected = evaluate(p.inputs, case.dy, **options)
        if backend == "cpu":
            assert_equal(got, expected, name)
        for key in got:
            assert torch.allclose(got[key], expected[key], rtol=1e-4, atol=1e-5), key
    inferred = evaluate(p.inputs, None, call=compiled, **p.options, backend=backend)
    assert torch.allclose(inferred["y"], p.same["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_compile_recompiles_once_for_lengths(training: bool, extension: object) -> None:
    """#11: five lengths and batch sizes need one dynamic graph besides the first."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gated_conv1d, fullgraph=True, backend=counter)
    weight = torch.randn(16, 8, 3, requires_grad=training)
    for batch, length in [(2, 10), (3, 17), (4, 64), (2, 5), (7, 33)]:
        x = torch.randn(batch, length, 8, requires_grad=training)
        lengths = torch.randint(0, length, (batch,))
        y = compiled(x, weight, lengths=lengths, dilation=2)
        assert torch.equal(y, gated_conv1d(x, weight, lengths=lengths, dilation=2))
        if training:
            y.sum().backward()
    assert counter.frame_count <= 2


def test_compile_with_symbolic_shapes_from_the_start(extension: object) -> None:
    """#11: dynamic=True; the step function too."""
    compiled = torch.compile(gated_conv1d_step, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, state = torch.randn(16, 8, 3), None
    x = torch.randn(2, 30, 8)
    outputs = []
    for chunk in x.split([3, 4, 5, 6, 12], 1):
        y, state = compiled(chunk, state, weight, dilation=2)
        outputs.append(y)
    assert torch.equal(torch.cat(outputs, 1), gated_conv1d(x, weight, dilation=2, padding="causal"))


class Stack(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(GatedConv1d(8, 8, 3, dilation=2**i, **options) for i in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x


@pytest.mark.parametrize("random", [{"gate_dropout": 0.4}, {"gate_noise": 0.5}, {}], ids=["dropout", "noise", "plain"])
def test_compiled_stack_draws_the_bits_of_eager(random: dict, extension: object) -> None:
    """Inductor, seeds drawn inside: torch.manual_seed governs them, layers draw different ones, eager and compiled
    agree bit for bit, forward and backward."""
    stack = Stack(**random)
    compiled = torch.compile(stack, fullgraph=True)
    x = torch.randn(2, 20, 8)
    results = []
    for call in (stack, compiled, compiled):
        torch.manual_seed(17)
        leaf = x.clone().requires_grad_()
        stack.zero_grad()
        y = call(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad.clone() for p in stack.parameters())])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    if random:
        assert not torch.equal(compiled(x), results[0][0])


# --- export ---

EXPORTED = {
    "same": {},
    "causal tanh": {"padding": "causal", "value_act": "tanh"},
    "valid": {"padding": "valid", "dilation": 2},
    "add": {"residual": "add", "split": "gate_value"},
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_export_has_standard_operators_only(name: str, strict: bool) -> None:
    """Dynamic B and L; parity at two lengths; whatever backend is chosen."""
    module = GatedConv1d(6, 6, 3, **EXPORTED[name]).eval()
    dynamic = {"x": {0: torch.export.Dim("B"), 1: torch.export.Dim("L", min=8)}}
    program = torch.export.export(module, (torch.randn(2, 12, 6),), dynamic_shapes=dynamic, strict=strict)
    assert is_standard(program.graph), program.graph
    for batch, length in [(3, 40), (5, 9)]:
        x = torch.randn(batch, length, 6)
        assert torch.allclose(program.module()(x), module(x), atol=1e-5)


class Arguments(torch.nn.Module):
    """A module whose arguments are all tensors, for exporters."""

    def __init__(self, names: list[str], **options: Any) -> None:
        super().__init__()
        self.names, self.options = names, options
        self.conv = GatedConv1d(6, 6, 3, dilation=2)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.conv(x, **dict(zip(self.names, more, strict=True)), **self.options)


def test_export_with_masks_lengths_packed_rows_and_cond() -> None:
    batch, length = torch.export.Dim("B"), torch.export.Dim("L", min=6)
    cases = [
        (["mask"], (torch.ones(2, 9, dtype=torch.bool),), ({0: batch, 1: length},)),
        (["lengths"], (torch.tensor([3, 9]),), ({0: batch},)),
        (["cond"], (torch.randn(2, 9, 12),), ({0: batch, 1: length},)),
    ]
    for names, more, shapes in cases:
        module = Arguments(names).eval()
        x = torch.randn(2, 9, 6)
        program = torch.export.export(module, (x, *more), dynamic_shapes=({0: batch, 1: length}, shapes))
        assert is_standard(program.graph)
        assert torch.allclose(program.module()(x, *more), module(x, *more), atol=1e-5)
    module = Arguments(["cu_seqlens"]).eval()
    rows = torch.export.Dim("T", min=6)
    program = torch.export.export(
        module,
        (torch.randn(12, 6), torch.tensor([0, 5, 12])),
        dynamic_shapes=({0: rows}, ({0: torch.export.Dim("N", min=3)},)),
    )
    assert is_standard(program.graph)
    x, bounds = torch.randn(31, 6), torch.tensor([0, 9, 9, 31])
    assert torch.allclose(program.module()(x, bounds), module(x, bounds), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_has_standard_operators_only() -> None:
    """What the older ONNX exporter and many serving stacks start from; other lengths than the traced one work."""
    stack = Stack().eval()
    traced = torch.jit.trace(stack, (torch.randn(2, 9, 8),), check_trace=False)
    assert is_standard(traced.inlined_graph)
    x = torch.randn(3, 21, 8)
    assert torch.allclose(traced(x), stack(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx")
@pytest.mark.parametrize("with_mask", [False, True])
def test_onnx_export_has_standard_operators_only(with_mask: bool, tmp_path: Any) -> None:
    """Dynamic B and L, parity at two lengths in the evaluator of the onnx package."""
    stack = Stack(padding="causal", value_act="tanh").eval()
    batch, length = torch.export.Dim("B"), torch.export.Dim("L", min=4)
    example = (torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool))[: 2 if with_mask else 1]
    exported = through_onnx(stack, example, ({0: batch, 1: length},) * len(example), tmp_path)
    for b, n in [(1, 40), (3, 5)]:
        inputs = (torch.randn(b, n, 8), torch.rand(b, n) < 0.7)[: len(example)]
        (got,) = exported(*inputs)
        assert torch.allclose(got, stack(*inputs), atol=1e-5)


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """#16: float32 parameters and any x give the result of casting everything by hand, gradients in their own dtype."""
    for case in CASES.values():
        p = problem(case, torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            got = evaluate(p.inputs, case.dy, **p.options, backend=backend)
            mixed = p.inputs | {"x": p.inputs["x"].to(dtype)}
            assert torch.equal(evaluate(mixed, None, **p.options, backend=backend)["y"], got["y"])
        expected = evaluate({n: t.to(dtype) for n, t in p.inputs.items()}, case.dy, **p.options, backend=backend)
        assert got["y"].dtype == dtype
        for name, t in p.inputs.items():
            assert got[f"d{name}"].dtype == t.dtype
            assert torch.equal(got[f"d{name}"].to(dtype), expected[f"d{name}"]), (name, case)


def test_autocast_leaves_float64_alone(backend: str) -> None:
    p = problem(Case(), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(p.inputs, None, **p.options, backend=backend)["y"].dtype == torch.float64


def test_autocast_compiles(extension: object) -> None:
    p = problem(Case(), torch.float32)
    compiled = torch.compile(gated_conv1d, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(p.inputs, Case().dy, call=compiled, **p.options)
        assert_equal(got, evaluate(p.inputs, Case().dy, **p.options))


def test_autocast_with_a_prepacked_module(extension: object) -> None:
    module = GatedConv1d(6, 6, 3).eval()
    x = torch.randn(2, 9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = module(x)
        assert torch.equal(module.prepack()(x), expected) and expected.dtype == torch.bfloat16


# --- function transforms ---


def test_functional_gradients(kernels: str) -> None:
    p = problem(Case(), torch.float64)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return gated_conv1d(x, weight, dilation=2, backend=kernels).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(p.inputs["x"], p.inputs["weight"])
    x, weight = (p.inputs[n].clone().requires_grad_() for n in ("x", "weight"))
    for a, b in zip(got, torch.autograd.grad(loss(x, weight), (x, weight)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_vmap_and_forward_mode_are_refused_by_name(kernels: str) -> None:
    """#30: named errors instead of silently dropped tangents, with and without gradients."""
    x, weight = torch.randn(3, 2, 9, 4), torch.randn(8, 4, 3)
    for gradients in (False, True):
        weight.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            assert_transforms_are_refused("gated_conv1d", lambda t: gated_conv1d(t, weight, backend=kernels), x)

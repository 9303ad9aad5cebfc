"""gated_conv1d on CUDA tensors: values, gradients, layouts, masks, random bits and determinism by the rules of the CPU
tests. References are computed on the CPU, but for large cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import GatedConv1d, _backend, gated_conv1d
from tests.gated_conv_cases import Case, Problem, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, SIZES, Results, assert_equal
from tests.on_gpu import DTYPES, KERNEL_MARKS, on

pytestmark = KERNEL_MARKS
RESIDUALS, PADDINGS = ("highway", "add", "none"), ("same", "causal", "valid")
CONDS, ROWS = ("none", "one", "all"), ("all", "mask", "lengths", "packed")


def run(inputs: dict[str, Tensor], dy: Any, **options: Any) -> Results:
    """evaluate() on the GPU by the CUDA kernels; what comes out is on the CPU again."""
    if isinstance(dy, Tensor):
        dy = dy.cuda()
    elif dy is not None:
        dy = partial(lambda make, y: make(y.cpu()).cuda(), dy)
    got = evaluate(on("cuda", inputs), dy, **{"backend": "cuda", **on("cuda", options)})
    assert all(t.is_cuda for t in got.values())
    return on("cpu", got)


def problem_by_gpu(case: Case, dtype: torch.dtype) -> Problem:
    """problem(), evaluated by PyTorch's own kernels on the GPU."""
    inputs, options = case.inputs(dtype), case.options()
    same = run(inputs, case.dy, **options, backend="reference")
    exact = {name: t.double() for name, t in inputs.items()}
    truth = run(exact, case.dy(same["y"]).double(), **options, backend="reference")
    return Problem(case, inputs, options, truth, same)


def check_case(case: Case, dtype: str, make: Callable[[Case, torch.dtype], Problem] = problem) -> None:
    """Training by the error rule; inference and recomputation give the same bits."""
    p = make(case, FLOATS[dtype])
    trained = run(p.inputs, case.dy, **p.options)
    p.check(trained)
    assert torch.equal(run(p.inputs, None, **p.options)["y"], trained["y"]), f"{case}: inference and training differ"
    assert_equal(run(p.inputs, case.dy, **p.options, recompute=True), trained, case)


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """PyTorch's float32 convolutions in float32: its default for them is tf32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def legal(**axes: tuple) -> list[Case]:
    cases = [Case(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return [case for case in cases if case.legal]


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form(dtype: str, residual: str) -> None:
    forms = legal(
        L=(11,), residual=(residual,), value_act=("identity", "tanh"), padding=PADDINGS, cond=CONDS, rows=ROWS,
        split=("value_gate", "gate_value"), two_weights=(False, True),
    )  # fmt: skip
    for index, case in enumerate(forms):
        if index % 3 == DTYPES.index(dtype):  # a third each: combinations are many, and the dtypes share their code
            check_case(replace(case, C_out=7) if residual == "none" else case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_and_lengths(dtype: str) -> None:
    """Around tiles in every direction; sizes whose rows are copied first, and those read as they are."""
    for i, channels in enumerate((*SIZES[:-1], 64, 72, 128, 200)):
        for K, rows in ((1, "all"), (3, "lengths"), (2, "packed")):
            length = SIZES[(i + K) % len(SIZES)] if channels < 128 else 40
            check_case(Case(B=2, L=length, C_in=channels, C_out=channels, K=K, rows=rows), dtype)
    for c_in, c_out in ((1, 40), (40, 1), (5, 130), (130, 24), (64, 33)):
        check_case(Case(B=3, L=50, C_in=c_in, C_out=c_out, residual="none", cond="one"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype: str) -> None:
    """Empty batches and sequences, one row, dilations beyond the sequence, many taps."""
    for case in (
        Case(B=0), Case(L=0), Case(B=1, L=1), Case(L=4, padding="valid"), Case(B=300, L=1, K=2, dilation=64),
        Case(dilation=1000), Case(K=41, L=23, dilation=1), Case(K=5, dilation=30, padding="causal"),
        Case(B=0, rows="packed"), Case(B=3, L=0, rows="packed"), Case(B=1, L=0, rows="lengths", cond="one"),
    ):  # fmt: skip
        check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gate_dropout", "gate_noise"])
def test_random_bits(kind: str, dtype: str) -> None:
    """The bits are those of the definition, which the reference uses."""
    shapes = [(5, "all", "same"), (17, "lengths", "causal"), (33, "packed", "same"), (8, "mask", "valid")]
    for channels, rows, padding in shapes:
        for residual, value_act in [("highway", "identity"), ("none", "tanh")]:
            case = Case(
                B=3, L=21, C_in=channels, C_out=channels, rows=rows, padding=padding, residual=residual,
                value_act=value_act, cond="one", **{kind: 0.4},
            )  # fmt: skip
            check_case(case, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_seven_input_layouts_by_seven_gradient_layouts(dtype: str) -> None:
    """Results depend on values, not on strides, bit for bit; also where rows could be read 16 bytes at a time."""
    for channels in (7, 16):
        case = Case(B=3, L=13, C_in=channels, C_out=channels, cond="all", rows="mask")
        p = problem(case, FLOATS[dtype])
        for layout, grad in itertools.product(LAYOUTS, LAYOUTS):
            x, dy = LAYOUTS[layout](p.inputs["x"].cuda()), LAYOUTS[grad](case.dy(p.same["y"]).cuda())
            got = run(p.inputs | {"x": x}, dy, **p.options)
            inputs = p.inputs | {"x": x.contiguous().clone()}
            assert_equal(got, run(inputs, dy.contiguous().clone(), **p.options), (layout, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_argument(layout: str, dtype: str) -> None:
    for case in (
        Case(B=3, L=13, C_in=16, C_out=16, cond="all", rows="mask"),
        Case(B=3, L=13, two_weights=True, cond="one", rows="lengths", padding="causal"),
        Case(B=3, L=13, C_in=4, C_out=9, residual="none", cond="one", rows="packed"),
    ):
        p = problem(case, FLOATS[dtype])
        change = lambda t: LAYOUTS[layout](t.cuda()) if isinstance(t, Tensor) else t  # noqa: E731
        inputs = {name: change(t) for name, t in p.inputs.items()}
        options = {n: t if n == "cu_seqlens" and layout == "expanded" else change(t) for n, t in p.options.items()}
        clone = lambda d: {n: t.contiguous().clone() if isinstance(t, Tensor) else t for n, t in d.items()}  # noqa: E731
        assert_equal(run(inputs, case.dy, **options), run(clone(inputs), case.dy, **clone(options)), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["mask", "lengths"])
def test_padding_content_changes_nothing(rows: str, dtype: str) -> None:
    """NaN and inf in masked rows of x, cond and dy; y, dx and all other gradients stay bitwise."""
    for residual, padding in itertools.product(RESIDUALS, PADDINGS):
        case = Case(B=4, L=23, residual=residual, padding=padding, rows=rows, cond="all", K=4, C_in=8, C_out=8)
        p = problem(case, FLOATS[dtype])
        live = p.options.get("mask")
        if live is None:
            live = torch.arange(case.L) < p.options["lengths"].unsqueeze(-1)
        out = live[:, case.L - case.L_out :]
        dy = case.dy(p.same["y"])
        expected = run(p.inputs, dy, **p.options)
        for content in (float("nan"), float("inf")):
            x, cond, grad = p.inputs["x"].clone(), p.inputs["cond"].clone(), dy.clone()
            x[~live], cond[~out], grad[~out] = content, content, content
            assert_equal(run(p.inputs | {"x": x, "cond": cond}, grad, **p.options), expected, (case, content))
        for name, keep in [("y", out), ("dx", live), ("dcond", out)]:
            assert (expected[name][~keep] == 0).all(), (name, case)


def test_lengths_equal_mask_packed_rows_and_each_sequence_alone() -> None:
    for padding, dtype in itertools.product(("same", "causal"), DTYPES):
        case = Case(B=5, L=130, K=3, dilation=4, padding=padding, rows="lengths", C_in=24, C_out=24)
        p = problem(case, FLOATS[dtype])
        lengths, options = p.options["lengths"], {n: v for n, v in p.options.items() if n != "lengths"}
        live = torch.arange(case.L) < lengths.unsqueeze(-1)
        x, rest = p.inputs["x"], {n: t for n, t in p.inputs.items() if n != "x"}
        y = run(p.inputs, None, **p.options)["y"]
        for same in ({"mask": live}, {"mask": live.int()}, {"lengths": lengths.int()}):
            assert torch.equal(run(p.inputs, None, **options, **same)["y"], y)
        bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)])
        for index in (torch.int32, torch.int64):
            packed = run({"x": x[live], **rest}, None, **options, cu_seqlens=bounds.to(index))["y"]
            assert torch.equal(packed, y[live])
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(run({"x": x[b : b + 1, :n], **rest}, None, **options)["y"][0], y[b, :n])


def test_boundaries_that_lie_outside_are_cut_off() -> None:
    """Values on the device are not waited for; wrong ones must not reach beyond the tensors."""
    p = problem(Case(B=2, L=19, C_in=8, C_out=8), torch.float32)
    cut = run(p.inputs, p.case.dy, **p.options, lengths=torch.tensor([99, -3]))
    assert_equal(cut, run(p.inputs, p.case.dy, **p.options, lengths=torch.tensor([19, 0])))
    rows = {**p.inputs, "x": p.inputs["x"][0]}
    wild = torch.tensor([-5, 30, 7, 2**40])
    got = run(rows, torch.ones(19, 8), **p.options, cu_seqlens=wild)
    assert all(torch.isfinite(t).all() for t in got.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal(dtype: str) -> None:
    """Outputs and gradients bit for bit, over runs and beside another stream's work."""
    for case in (
        Case(B=1, L=7000, C_in=33, C_out=33, cond="one"),
        Case(B=40, L=300, C_in=64, C_out=64, rows="packed", cond="all", gate_dropout=0.2),
        Case(B=6, L=150, C_in=40, C_out=64, rows="mask", residual="none", value_act="tanh", two_weights=True),
    ):
        p = problem(case, FLOATS[dtype])
        expected = run(p.inputs, case.dy, **p.options)
        for _ in range(5):
            assert_equal(run(p.inputs, case.dy, **p.options), expected, case)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = run(p.inputs, case.dy, **p.options)
        torch.cuda.current_stream().wait_stream(side)
        assert_equal(got, expected, case)


def test_tf32_follows_the_setting_of_cuda_matrix_products() -> None:
    case = Case(B=4, L=200, C_in=96, C_out=96)
    p = problem(case, torch.float32)
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            got = run(p.inputs, case.dy, **p.options)
        finally:
            torch.set_float32_matmul_precision("highest")
        errors[precision] = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
    # tf32 keeps ten bits of mantissa: its unit roundoff is 2**-11.
    assert all(e < 1e-6 for e in errors["highest"].values()), errors
    assert all(1e-5 < e < 2**-10 for n, e in errors["high"].items() if n in ("y", "dx", "dweight")), errors


def test_capture_in_a_cuda_graph() -> None:
    """Nothing waits for the device: calls with lengths can be captured, and replays see new values."""
    p = problem(Case(B=4, L=64, C_in=32, C_out=32, rows="lengths"), torch.bfloat16)
    inputs, options = on("cuda", p.inputs), on("cuda", p.options)
    call = lambda: gated_conv1d(**inputs, **options, backend="cuda")  # noqa: E731
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        inputs["x"].mul_(0.5)
        options["lengths"].copy_(torch.tensor([7, 64, 0, 33]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, call())


def test_auto_takes_the_cuda_kernels_and_float64_the_reference() -> None:
    assert _backend.choose("gated_conv1d", None, "cuda", torch.bfloat16) == "cuda"
    assert _backend.choose("gated_conv1d", None, "cuda", torch.float64) == "reference"
    with pytest.raises(RuntimeError, match="^backend: 'cuda'.* on cpu"):
        gated_conv1d(torch.zeros(1, 2, 4), torch.zeros(8, 4, 1), backend="cuda")


def test_module_prepacked_and_compiled() -> None:
    """A module's packed weights, autocast, torch.compile without graph breaks."""
    module = GatedConv1d(40, 40, 3, dilation=2).cuda().eval()
    x = torch.randn(3, 50, 40, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():
        y = module(x)
        assert torch.equal(module.prepack()(x), y)
    module.train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    compiled = torch.compile(module, fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(module.parameters())),
        torch.autograd.grad(module(x).square().sum(), list(module.parameters())),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tiles(dtype: str) -> None:
    """Enough tiles for the large shapes on any GPU, with remainders in all directions, and long sums over rows."""
    for case in (
        Case(B=40, L=515, C_in=128, C_out=128, dilation=5),
        Case(B=64, L=300, C_in=136, C_out=136, rows="lengths", cond="one", residual="add"),
        Case(B=9, L=4000, C_in=160, C_out=72, rows="packed", residual="none", value_act="tanh", gate_dropout=0.1),
        Case(B=300, L=60, C_in=256, C_out=256, rows="mask", padding="valid", K=2, cond="all"),
    ):
        check_case(case, dtype, problem_by_gpu)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "^weight: expected .*like x", lambda: {"weight": torch.zeros(8, 4, 3, device="cuda").half()}),
        (ValueError, "^mask: expected shape", lambda: {"mask": torch.ones(2, 8, device="cuda", dtype=torch.bool)}),
        (TypeError, "^lengths: expected int32 or int64", lambda: {"lengths": torch.ones(2, device="cuda")}),
        (ValueError, "^weight: expected a tensor on cuda", lambda: {"weight": torch.zeros(8, 4, 3)}),
        (ValueError, "^cond: expected a tensor on cuda", lambda: {"cond": torch.zeros(2, 1, 8)}),
    ],
)
def test_errors_name_the_argument(error: type, message: str, change: Callable[[], dict[str, Tensor]]) -> None:
    tensors = {"x": torch.zeros(2, 9, 4, device="cuda"), "weight": torch.zeros(8, 4, 3, device="cuda")}
    with pytest.raises(error, match=message):
        gated_conv1d(**tensors | change())


def test_masks_and_lengths_may_be_on_the_cpu() -> None:
    """They are brought to x's device."""
    for rows in ("mask", "lengths", "packed"):
        p = problem(Case(rows=rows, C_in=8, C_out=8), torch.float32)
        got = evaluate(on("cuda", p.inputs), None, **p.options, backend="cuda")["y"]
        assert torch.equal(got.cpu(), run(p.inputs, None, **p.options)["y"])

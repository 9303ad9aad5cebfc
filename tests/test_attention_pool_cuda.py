"""attention_pool on CUDA tensors: values, gradients, layouts, masks, bags and determinism by the rules of the
CPU tests. References are computed on the CPU, but for large cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import AttentionPool, _backend, attention_pool
from tests.attention_pool_cases import PoolCase, PoolProblem, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, SIZES, Results, assert_equal
from tests.on_gpu import DTYPES, KERNEL_MARKS, on

pytestmark = KERNEL_MARKS
Incoming = Callable[[Results], Results] | None


def run(inputs: Results, incoming: Incoming, **options: Any) -> Results:
    """evaluate() on the GPU by the CUDA kernels; what comes out is on the CPU again."""
    grads = None if incoming is None else lambda results: on("cuda", incoming(on("cpu", results)))
    got = evaluate(on("cuda", inputs), grads, **{"backend": "cuda", **on("cuda", options)})
    assert all(t.is_cuda for t in got.values())
    return on("cpu", got)


def problem_by_gpu(case: PoolCase, dtype: torch.dtype) -> PoolProblem:
    """problem(), evaluated by PyTorch's own kernels on the GPU."""
    inputs, options = case.inputs(dtype), case.options()
    same = run(inputs, case.gradients, **options, backend="reference")
    grads = case.gradients({name: t for name, t in same.items() if not name.startswith("d")})
    exact = {name: t.double() for name, t in inputs.items()}
    truth = run(exact, lambda _: {n: t.double() for n, t in grads.items()}, **options, backend="reference")
    return PoolProblem(case, inputs, options, truth, same)


def check_case(case: PoolCase, dtype: str, make: Callable[[PoolCase, torch.dtype], PoolProblem] = problem) -> None:
    """Training with both ways of backward by the error rule; inference gives the same bits."""
    p = make(case, FLOATS[dtype])
    trained = run(p.inputs, case.gradients, **p.options)
    p.check(trained)
    kept = run(p.inputs, case.gradients, **p.options, recompute=False)
    p.check(kept)
    for name, t in run(p.inputs, None, **p.options).items():
        assert torch.equal(t, trained[name]), f"{name} of {case}: inference and training differ"
        assert torch.equal(t, kept[name]), f"{name} of {case}: differs with recompute=False"


@pytest.mark.parametrize("activation", ["tanh", "swish", "relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form(dtype: str, activation: str) -> None:
    axes = {
        "gated": (False, True), "J": (0, 1, 3), "bias": (True, False), "rows": ("all", "mask", "lengths", "packed"),
        "returned": (None, "raw", "softmax"),
    }  # fmt: skip
    for index, values in enumerate(itertools.product(*axes.values())):
        if index % 3 == DTYPES.index(dtype):  # a third each: combinations are many, and the dtypes share their code
            check_case(PoolCase(activation=activation, **dict(zip(axes, values, strict=True))), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str) -> None:
    """Around tiles and chunks in every direction; rows that are copied first, and those read as they are."""
    for i, size in enumerate((*SIZES[:-1], 64, 72, 128, 200)):
        for axis in ("D", "L", "H", "B"):
            other = {"L": 40, "D": 6, "H": 6, "B": 2} | ({"L": 3} if axis == "B" else {})
            check_case(PoolCase(**{**other, axis: size}, gated=i % 2 == 1, returned="raw"), dtype)
        check_case(PoolCase(B=3, L=SIZES[(i + 1) % len(SIZES)], D=size, H=size, rows="lengths"), dtype)
    for heads in (2, 5, 33, 65):
        check_case(PoolCase(B=2, L=40, J=heads, returned="softmax"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype: str) -> None:
    """Empty batches, sequences and dimensions, one row, wide rows."""
    for case in (
        PoolCase(B=0), PoolCase(L=0), PoolCase(D=0), PoolCase(H=0), PoolCase(B=1, L=1), PoolCase(B=300, L=1),
        PoolCase(B=0, rows="packed"), PoolCase(B=3, L=0, rows="packed"), PoolCase(B=1, L=0, rows="lengths", J=2),
        PoolCase(B=1, L=80, D=2100, H=16), PoolCase(B=2, L=70, D=8, H=2100, gated=True),
    ):  # fmt: skip
        check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tiles(dtype: str) -> None:
    """Enough rows for the large shapes on any GPU, with remainders in all directions, and more than one wave."""
    for case in (
        PoolCase(B=40, L=515, D=128, H=128, J=2),
        PoolCase(B=64, L=300, D=136, H=136, rows="lengths", gated=True, returned="softmax"),
        PoolCase(B=9, L=4000, D=160, H=72, rows="packed", activation="swish"),
        PoolCase(B=300, L=60, D=768, H=768, rows="mask", activation="gelu", returned="raw"),
        PoolCase(B=1, L=90_000, D=8, H=400),
    ):
        check_case(case, dtype, problem_by_gpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bag_of_many_rows(dtype: str) -> None:
    check_case(PoolCase(B=1, L=100_000, D=64, H=32, J=2, gated=True, returned="raw"), dtype, problem_by_gpu)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_seven_input_layouts_by_seven_gradient_layouts(dtype: str) -> None:
    """Results depend on values, not on strides, bit for bit; also where rows could be read 16 bytes at a time."""
    for width in (7, 16):
        case = PoolCase(B=3, L=13, D=width, J=2, gated=True, rows="mask", returned="raw")
        p = problem(case, FLOATS[dtype])
        incoming = case.gradients(evaluate(p.inputs, None, **p.options))
        for layout, grad in itertools.product(LAYOUTS, LAYOUTS):
            inputs = p.inputs | {"x": LAYOUTS[layout](p.inputs["x"])}
            grads = {n: LAYOUTS[grad](t) for n, t in incoming.items()}
            plain = [{n: t.contiguous().clone() for n, t in tensors.items()} for tensors in (inputs, grads)]
            got = run(inputs, lambda _, g=grads: g, **p.options)
            assert_equal(got, run(plain[0], lambda _, g=plain[1]: g, **p.options), (layout, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_argument(layout: str, dtype: str) -> None:
    for case in (
        PoolCase(L=13, J=2, gated=True, rows="mask", returned="raw"),
        PoolCase(L=13, J=2, D=16, H=16, rows="packed", returned="softmax"),
        PoolCase(L=13, gated=True, rows="lengths", activation="gelu"),
    ):
        p = problem(case, FLOATS[dtype])
        change = lambda t: LAYOUTS[layout](t) if isinstance(t, Tensor) else t  # noqa: E731
        inputs = {name: change(t) for name, t in p.inputs.items()}
        options = {n: t if n == "cu_seqlens" and layout == "expanded" else change(t) for n, t in p.options.items()}
        plain = [
            {name: t.contiguous().clone() if isinstance(t, Tensor) else t for name, t in tensors.items()}
            for tensors in (inputs, options)
        ]
        got = run(inputs, case.gradients, **options)
        assert_equal(got, run(plain[0], case.gradients, **plain[1]), (layout, case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["mask", "lengths"])
def test_padding_content_changes_nothing(rows: str, dtype: str) -> None:
    """NaN and inf in masked rows of x and of incoming gradients; all else stays bitwise, masked rows get zeros."""
    for gated, returned in itertools.product((False, True), ("raw", "softmax")):
        case = PoolCase(B=4, L=140, D=9, J=2, gated=gated, rows=rows, returned=returned)
        p, live = problem(case, FLOATS[dtype]), case.live()
        incoming = case.gradients(evaluate(p.inputs, None, **p.options))
        expected = run(p.inputs, lambda _, i=incoming: i, **p.options)
        for content in (float("nan"), float("inf"), 3e4):
            x, dscores = p.inputs["x"].clone(), incoming["scores"].clone()
            x[~live] = content
            dscores.transpose(1, 2)[~live] = content
            grads = incoming | {"scores": dscores}
            assert_equal(run(p.inputs | {"x": x}, lambda _, g=grads: g, **p.options), expected, (case, content))
        assert (expected["dx"][~live] == 0).all() and (expected["scores"].transpose(1, 2)[~live] == 0).all()


def test_rows_that_are_all_masked() -> None:
    """Zeros out and zero, finite gradients."""
    nan = lambda results: {n: torch.full_like(t, torch.nan) for n, t in results.items()}  # noqa: E731
    for returned, length in (("raw", 19), ("softmax", 200)):
        inputs = PoolCase(B=2, L=length, J=2, gated=True, returned=returned).inputs(torch.float32)
        inputs["x"] = torch.full_like(inputs["x"], torch.nan)
        for options in ({"mask": torch.zeros(2, length, dtype=torch.bool)}, {"lengths": torch.zeros(2).int()}):
            for name, t in run(inputs, nan, **options, return_scores=returned).items():
                assert torch.equal(t, torch.zeros_like(t)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_equal_mask_packed_rows_and_each_sequence_alone(dtype: str) -> None:
    """Bit for bit, whatever the neighbours and the padding behind."""
    for length in (15, 30, 300):
        case = PoolCase(B=5, L=length, D=24, H=40, J=2, rows="lengths", returned="raw")
        p, live = problem(case, FLOATS[dtype]), case.live()
        x, rest = p.inputs["x"], {n: t for n, t in p.inputs.items() if n != "x"}
        lengths = p.options["lengths"]
        call = partial(run, incoming=None, return_scores="raw")
        expected = call(p.inputs, lengths=lengths)
        for same in ({"mask": live}, {"mask": live.int()}, {"lengths": lengths.int()}):
            assert_equal(call(p.inputs, **same), expected, same)
        bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)])
        for index in (torch.int32, torch.int64):
            packed = call({"x": x[live], **rest}, cu_seqlens=bounds.to(index))
            assert torch.equal(packed["out"], expected["out"])
            assert torch.equal(packed["scores"], expected["scores"].transpose(1, 2)[live].T)
        longer = torch.nn.functional.pad(x, (0, 0, 0, 100), value=torch.nan)
        assert torch.equal(call({"x": longer, **rest}, lengths=lengths)["out"], expected["out"])
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(call({"x": x[b : b + 1, :n], **rest})["out"][0], expected["out"][b])


def test_boundaries_that_lie_outside_are_cut_off() -> None:
    """Values on the device are not waited for; wrong ones must not reach beyond the tensors."""
    p = problem(PoolCase(B=2, L=90, D=8, returned="softmax"), torch.float32)
    call = partial(run, incoming=p.case.gradients, **p.options)
    assert_equal(call(p.inputs, lengths=torch.tensor([199, -3])), call(p.inputs, lengths=torch.tensor([90, 0])))
    rows = {**p.inputs, "x": p.inputs["x"][0]}
    for wild in ([-5, 130, 7, 2**40], [80, 90, 0, 30], [30, 10, 5, 2]):
        call(rows, cu_seqlens=torch.tensor(wild))
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal(dtype: str) -> None:
    """Outputs, scores and gradients bit for bit, over runs and beside another stream's work."""
    for case in (
        PoolCase(B=1, L=17_000, D=33, H=33, returned="raw"),
        PoolCase(B=40, L=300, D=64, H=64, rows="packed", J=3),
        PoolCase(B=6, L=350, D=40, H=64, rows="mask", activation="gelu", J=2, gated=True, returned="softmax"),
    ):
        p = problem(case, FLOATS[dtype])
        expected = run(p.inputs, case.gradients, **p.options)
        for _ in range(5):
            assert_equal(run(p.inputs, case.gradients, **p.options), expected, case)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = run(p.inputs, case.gradients, **p.options)
        torch.cuda.current_stream().wait_stream(side)
        assert_equal(got, expected, case)


def test_tf32_follows_the_setting_of_cuda_matrix_products() -> None:
    case = PoolCase(B=4, L=200, D=96, H=96, returned="raw")
    p = problem(case, torch.float32)
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            got = run(p.inputs, case.gradients, **p.options)
        finally:
            torch.set_float32_matmul_precision("highest")
        errors[precision] = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
    # tf32 keeps ten bits of mantissa: its unit roundoff is 2**-11.
    assert all(e < 1e-5 for e in errors["highest"].values()), errors
    assert all(1e-5 < e < 2**-9 for n, e in errors["high"].items() if n in ("scores", "dx", "dweight")), errors


def test_capture_in_a_cuda_graph() -> None:
    """Nothing waits for the device: calls with lengths can be captured, and replays see new values."""
    p = problem(PoolCase(B=4, L=200, D=32, H=32, rows="lengths"), torch.bfloat16)
    inputs, options = on("cuda", p.inputs), on("cuda", p.options)
    call = lambda: attention_pool(**inputs, **options, backend="cuda")  # noqa: E731
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        inputs["x"].mul_(0.5)
        options["lengths"].copy_(torch.tensor([7, 200, 0, 133]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, call())


def test_peak_memory_of_a_large_bag() -> None:
    """No [1, N, H] tensor in forward, and in backward no more than a wave of it."""
    x = torch.randn(1, 400_000, 64, device="cuda").bfloat16().requires_grad_()
    weight, query = (torch.randn(*shape, device="cuda").bfloat16().requires_grad_() for shape in ((256, 64), (256,)))
    whole = x.numel() // 64 * 256 * 2
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention_pool(x, weight, query, backend="cuda")
    assert torch.cuda.max_memory_allocated() - before < whole / 8
    out.sum().backward()
    # dx has the size of x, and partial sums take some of the rest.
    assert torch.cuda.max_memory_allocated() - before < x.numel() * 2 + (100 << 20) < whole + x.numel() * 2


def test_auto_takes_the_cuda_kernels_and_float64_the_reference() -> None:
    assert _backend.choose("attention_pool", None, "cuda", torch.bfloat16) == "cuda"
    assert _backend.choose("attention_pool", None, "cuda", torch.float64) == "reference"
    with pytest.raises(RuntimeError, match="^backend: 'cuda'.* on cpu"):
        attention_pool(torch.zeros(1, 2, 4), torch.zeros(8, 4), torch.zeros(8), backend="cuda")


def test_module_autocast_and_compiled() -> None:
    module = AttentionPool(40, 24, 2, bias=True, gated=True).cuda()
    x = torch.randn(3, 50, 40, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    compiled = torch.compile(module, fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(module.parameters())),
        torch.autograd.grad(module(x).square().sum(), list(module.parameters())),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "^query: expected .*like x", lambda: {"query": torch.zeros(8, device="cuda").half()}),
        (ValueError, "^mask: expected shape", lambda: {"mask": torch.ones(2, 8, device="cuda", dtype=torch.bool)}),
        (TypeError, "^lengths: expected int32 or int64", lambda: {"lengths": torch.ones(2, device="cuda")}),
        (ValueError, "^weight: expected a tensor on cuda", lambda: {"weight": torch.zeros(8, 4)}),
    ],
)
def test_errors_name_the_argument(error: type, message: str, change: Callable[[], dict[str, Tensor]]) -> None:
    tensors = {
        "x": torch.zeros(2, 9, 4, device="cuda"), "weight": torch.zeros(8, 4, device="cuda"),
        "query": torch.zeros(8, device="cuda"),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        attention_pool(**tensors | change())


def test_masks_and_lengths_may_be_on_the_cpu() -> None:
    """They are brought to x's device."""
    for rows in ("mask", "lengths", "packed"):
        p = problem(PoolCase(rows=rows), torch.float32)
        inputs = on("cuda", p.inputs)
        got = attention_pool(**inputs, **p.options, backend="cuda")
        assert torch.equal(got, attention_pool(**inputs, **on("cuda", p.options), backend="cuda"))

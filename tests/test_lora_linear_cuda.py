"""lora_linear on CUDA tensors: values, gradients, layouts, adapters, random bits and determinism by the rules of the
CPU tests. References are computed on the CPU, but for large cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import _backend, dora_linear, lora_linear, lora_linear_stacked
from tests.helpers import FLOATS, LAYOUTS, SIZES, Results, assert_equal
from tests.lora_linear_cases import LoraCase, LoraProblem, evaluate, problem
from tests.on_gpu import DTYPES, KERNEL_MARKS, on
from tests.test_dora_linear import tensors as dora_tensors
from tests.test_lora_linear_stacked import SCALES
from tests.test_lora_linear_stacked import problem as stacked_problem

pytestmark = KERNEL_MARKS


def run(inputs: dict[str, Tensor], dy: Any, **options: Any) -> Results:
    """evaluate() on the GPU by the CUDA kernels; what comes out is on the CPU again."""
    if isinstance(dy, Tensor):
        dy = dy.cuda()
    elif dy is not None:
        dy = partial(lambda make, y: make(y.cpu()).cuda(), dy)
    got = evaluate(on("cuda", inputs), dy, **{"backend": "cuda", **on("cuda", options)})
    assert all(t.is_cuda for t in got.values())
    return on("cpu", got)


def problem_by_gpu(case: LoraCase, dtype: torch.dtype) -> LoraProblem:
    """problem(), evaluated by PyTorch's own kernels on the GPU."""
    inputs, options = case.inputs(dtype), case.options()
    same = run(inputs, case.dy, **options, backend="reference")
    exact = {name: t.double() for name, t in inputs.items()}
    truth = run(exact, case.dy(same["y"]).double(), **options, backend="reference")
    return LoraProblem(case, inputs, options, truth, same)


def check_case(
    case: LoraCase, dtype: str, make: Callable[[LoraCase, torch.dtype], LoraProblem] = problem
) -> None:
    """Training by the error rule; inference gives the same bits."""
    p = make(case, FLOATS[dtype])
    trained = run(p.inputs, case.dy, **p.options)
    p.check(trained)
    assert torch.equal(run(p.inputs, None, **p.options)["y"], trained["y"]), f"{case}: inference and training differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form(dtype: str) -> None:
    axes = {
        "bias": (False, True), "E": (0, 3), "scales": (False, True), "dropout": (0.0, 0.4),
        "float_adapters": (False, True), "transposed": (False, True), "R": (0, 1, 3, 8), "K": (9, 40),
    }  # fmt: skip
    forms = [LoraCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    for index, case in enumerate(form for form in forms if form.E or not form.scales):
        if index % 3 == DTYPES.index(dtype):  # a third each: the dtypes share their code
            check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str) -> None:
    """Around tiles in every direction, few rows and many, ranks beyond a tile, empties."""
    for i, size in enumerate((*SIZES[:-1], 64, 72, 128, 200)):
        other = SIZES[(i + 5) % len(SIZES)]
        check_case(LoraCase(leading=(other,), K=size, N=SIZES[(i + 3) % 11], R=1 + i, dropout=0.1 * (i % 2)), dtype)
        check_case(LoraCase(leading=(1 + i % 9,), K=8 * size, N=size, R=4, E=i % 3), dtype)
    for case in (
        LoraCase(leading=(20,), K=40, N=33, R=130, float_adapters=True), LoraCase(()), LoraCase((), E=2),
        LoraCase(leading=(0,)), LoraCase(leading=(4, 0), E=2), LoraCase(K=0), LoraCase(N=0), LoraCase(K=0, dropout=0.1),
    ):  # fmt: skip
        check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tiles(dtype: str) -> None:
    """Enough tiles for the large shapes on any GPU, with remainders in all directions, and long sums over rows."""
    for transposed in (False, True):
        for case in (
            LoraCase(leading=(4096,), K=768, N=1160, R=8, dropout=0.1, transposed=transposed),
            LoraCase(leading=(70, 60), K=1032, N=776, R=16, E=4, indexed=1, float_adapters=True, transposed=transposed),
            LoraCase(leading=(9000,), K=520, N=400, R=64, E=2, dropout=0.1, transposed=transposed),
        ):
            check_case(case, dtype, problem_by_gpu)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_seven_input_layouts_by_seven_gradient_layouts(dtype: str) -> None:
    """Results depend on values, not on strides, bit for bit; also where rows could be read 16 bytes at a time."""
    for case in (LoraCase(leading=(3, 13), K=7, N=9), LoraCase(leading=(3, 13), K=16, N=24, E=2)):
        p = problem(case, FLOATS[dtype])
        for layout, grad in itertools.product(LAYOUTS, LAYOUTS):
            inputs = {name: LAYOUTS[layout](t.cuda()) for name, t in p.inputs.items()}
            dy = LAYOUTS[grad](case.dy(p.same["y"]).cuda())
            plain = {name: t.contiguous().clone() for name, t in inputs.items()}
            expected = run(plain, dy.contiguous().clone(), **p.options)
            assert_equal(run(inputs, dy, **p.options), expected, (layout, grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal(dtype: str) -> None:
    """Outputs and gradients bit for bit, over runs and beside another stream's work."""
    for case in (
        LoraCase(leading=(7000,), K=264, N=520, R=8, dropout=0.2),
        LoraCase(leading=(40, 60), K=520, N=264, R=16, E=5, float_adapters=True),
        LoraCase(leading=(5,), K=2048, N=1000, R=16),
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


def test_stacked() -> None:
    """Each projection's bits, their own dropout, and one gradient of x."""
    for dtype, options in itertools.product(DTYPES, ({}, {"dropout": 0.3, "training": True, "seed": 5})):
        given = stacked_problem(90, 96, FLOATS[dtype])
        device = {
            name: [t if t is None else t.detach().cuda().requires_grad_() for t in v] if isinstance(v, list)
            else v.detach().cuda().requires_grad_() for name, v in given.items()
        }  # fmt: skip
        ys = lora_linear_stacked(**device, scale=SCALES, **options, backend="cuda")
        expected = lora_linear_stacked(**device, scale=SCALES, **options, backend="reference")
        eps = torch.finfo(FLOATS[dtype]).eps
        for y, other in zip(ys, expected, strict=True):
            torch.testing.assert_close(y, other, rtol=8 * eps, atol=32 * eps)
        dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(y.dtype).cuda() for y in ys]
        leaves = [device["x"], *device["weights"]]
        for a, b in zip(
            torch.autograd.grad(ys, leaves, dys), torch.autograd.grad(expected, leaves, dys), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=16 * eps, atol=128 * eps)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora(dropout: float) -> None:
    given = {name: t.cuda().requires_grad_() for name, t in dora_tensors((40, 64, 40, 8), torch.float32).items()}
    options = {"scale": 1.5, "dropout": dropout, "training": True, "seed": 11}
    results = []
    for backend in ("cuda", "reference"):
        y = dora_linear(**given, **options, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(given.values()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tf32_follows_the_setting_of_cuda_matrix_products() -> None:
    case = LoraCase(leading=(800,), K=96, N=200, R=8)
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
    assert all(1e-5 < e < 2**-9 for n, e in errors["high"].items() if n != "dbias"), errors


def test_capture_in_a_cuda_graph() -> None:
    """Nothing waits for the device: calls can be captured, and replays see new values of indices and scales."""
    for rows in (4, 64):
        p = problem(LoraCase(leading=(rows,), K=64, N=40, R=8, E=3, scales=True), torch.bfloat16)
        inputs, options = on("cuda", p.inputs), on("cuda", p.options)
        call = partial(evaluate, inputs, None, **options, backend="cuda")
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()["y"]
        options["adapter_index"].copy_(torch.arange(rows) % 4 - 1)
        options["scale"].mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, call()["y"])


def test_indices_out_of_range_are_no_adapter() -> None:
    p = problem(LoraCase(leading=(40,), K=24, N=16, E=2), torch.float32)
    index, wrong = torch.tensor([0, 1, -1, 1] * 10), torch.tensor([0, 1, 2**40, 1, 0, 1, -5, 1] * 5)
    results = [run(p.inputs, p.case.dy, scale=p.case.scale, adapter_index=i) for i in (wrong, index)]
    assert_equal(*results)


def test_bytes_kept_for_backward() -> None:
    """x, S, and nothing for dropout."""
    inputs = {name: t.cuda() for name, t in LoraCase(leading=(512,), K=256, N=256, R=8).inputs(torch.bfloat16).items()}
    inputs["lora_a"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(**inputs, dropout=0.1, training=True, backend="cuda")
    given = {t.untyped_storage().data_ptr() for t in inputs.values()}
    own = [t for t in kept if t.is_cuda and t.untyped_storage().data_ptr() not in given]
    assert sum(t.numel() * t.element_size() for t in own) == 512 * 8 * 4


def test_auto_takes_the_cuda_kernels_and_float64_the_reference() -> None:
    assert _backend.choose("lora_linear", None, "cuda", torch.bfloat16) == "cuda"
    assert _backend.choose("lora_linear", None, "cuda", torch.float64) == "reference"
    with pytest.raises(RuntimeError, match="^backend: 'cuda'.* on cpu"):
        lora_linear(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(1, 4), torch.zeros(8, 1), backend="cuda")


def test_compiled_and_autocast() -> None:
    """torch.compile without graph breaks, forward and backward, gives the bits of eager; autocast casts all."""
    p = problem(LoraCase(leading=(30,), K=24, N=40, R=4), torch.float32)
    inputs = on("cuda", p.inputs)
    call = torch.compile(lora_linear, fullgraph=True)
    options = {"dropout": 0.2, "training": True, "seed": 3}
    got = evaluate(inputs, lambda y: torch.ones_like(y), call, **options)
    assert_equal(got, evaluate(inputs, lambda y: torch.ones_like(y), **options))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert lora_linear(**inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "^weight: expected .*like x", lambda: {"weight": torch.zeros(8, 4, device="cuda").half()}),
        (ValueError, "^weight: expected a tensor on cuda", lambda: {"weight": torch.zeros(8, 4)}),
        (ValueError, "^lora_a: expected a tensor on cuda", lambda: {"lora_a": torch.zeros(2, 4)}),
        (ValueError, r"^lora_b: expected \[N, R\]", lambda: {"lora_b": torch.zeros(8, 3, device="cuda")}),
    ],
)
def test_errors_name_the_argument(error: type, message: str, change: Callable[[], dict[str, Tensor]]) -> None:
    shapes = {"x": (9, 4), "weight": (8, 4), "lora_a": (2, 4), "lora_b": (8, 2)}
    tensors = {name: torch.zeros(shape, device="cuda") for name, shape in shapes.items()}
    with pytest.raises(error, match=message):
        lora_linear(**tensors | change())

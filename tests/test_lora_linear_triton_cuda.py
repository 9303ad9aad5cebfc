"""lora_linear's Triton kernels on a GPU, by the rules and cases of test_lora_linear_cuda.py."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from pykernels import lora_linear_stacked
from tests.helpers import FLOATS, LAYOUTS, SIZES, assert_equal
from tests.lora_linear_cases import LoraCase, LoraProblem, evaluate, problem
from tests.on_gpu import DTYPES, GPU_MARKS, on
from tests.test_lora_linear_cuda import check_case, problem_by_gpu, run
from tests.test_lora_linear_stacked import SCALES
from tests.test_lora_linear_stacked import problem as stacked_problem

pytest.importorskip("triton")
pytestmark = GPU_MARKS


def on_triton(p: LoraProblem) -> LoraProblem:
    return replace(p, options=p.options | {"backend": "triton"})


def make(case: LoraCase, dtype: torch.dtype) -> LoraProblem:
    return on_triton(problem(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str) -> None:
    axes = {
        "bias": (False, True), "E": (0, 3), "scales": (False, True), "dropout": (0.0, 0.4),
        "float_adapters": (False, True), "transposed": (False, True), "R": (0, 1, 3, 8), "leading": ((2, 11), (5,)),
    }  # fmt: skip
    forms = [LoraCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    for case in random.Random(dtype).sample([form for form in forms if form.E or not form.scales], 16):
        check_case(case, dtype, make)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str) -> None:
    for i, size in enumerate((*SIZES[:-1:2], 64, 200)):
        case = LoraCase(leading=(SIZES[-2 - i],), K=size, N=SIZES[i + 1], R=1 + i, dropout=0.1 * (i % 2))
        check_case(case, dtype, make)
    for case in (
        LoraCase(leading=(20,), K=40, N=33, R=130, float_adapters=True), LoraCase(()), LoraCase(leading=(4, 0), E=2),
        LoraCase(K=0), LoraCase(N=0), LoraCase(leading=(8,), K=3000, N=500, R=20),
    ):  # fmt: skip
        check_case(case, dtype, make)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tiles(dtype: str) -> None:
    """Remainders in all directions and long sums."""
    for case in (
        LoraCase(leading=(4096,), K=768, N=1160, R=8, dropout=0.1),
        LoraCase(leading=(70, 60), K=1032, N=776, R=16, E=4, indexed=1, float_adapters=True, transposed=True),
    ):
        check_case(case, dtype, lambda c, d: on_triton(problem_by_gpu(c, d)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    p = make(LoraCase(leading=(3, 13), K=16, N=24), torch.bfloat16)
    inputs = {name: LAYOUTS[layout](t.cuda()) for name, t in p.inputs.items()}
    dy = LAYOUTS[layout](p.case.dy(p.same["y"]).cuda())
    plain = {name: t.contiguous().clone() for name, t in inputs.items()}
    assert_equal(run(inputs, dy, **p.options), run(plain, dy.contiguous().clone(), **p.options), layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tuner_may_choose_again(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration of the tuned kernels gives the same bits on this GPU."""
    from pykernels.triton_kernels.lora_linear import lora_product, lora_shrink
    from pykernels.triton_kernels.lora_linear_bwd import lora_adapter_sums, lora_weight_sums
    from pykernels.triton_kernels.lora_linear_few import lora_few_product

    tuned = (lora_shrink, lora_product, lora_few_product, lora_adapter_sums, lora_weight_sums)
    every, results = {kernel: kernel.configs for kernel in tuned}, []
    p = make(LoraCase(leading=(900,), K=264, N=520, R=20, dropout=0.2, float_adapters=True), FLOATS[dtype])
    few = make(LoraCase(leading=(5,), K=1032, N=520, R=8), FLOATS[dtype])
    for i in range(6):
        for kernel, configs in every.items():
            monkeypatch.setattr(kernel, "configs", [configs[i % len(configs)]])
        y = run(few.inputs, None, **few.options)["y"]
        results.append(run(p.inputs, p.case.dy, **p.options) | {"few": y})
        assert_equal(results[-1], results[0], f"configuration {i}")


def test_stacked() -> None:
    for dtype, options in itertools.product(DTYPES, ({}, {"dropout": 0.3, "training": True, "seed": 5})):
        given = stacked_problem(90, 96, FLOATS[dtype])
        device = {
            name: [t if t is None else t.detach().cuda().requires_grad_() for t in v] if isinstance(v, list)
            else v.detach().cuda().requires_grad_() for name, v in given.items()
        }  # fmt: skip
        results = []
        for backend in ("triton", "reference"):
            ys = lora_linear_stacked(**device, scale=SCALES, **options, backend=backend)
            results.append([*ys, *torch.autograd.grad(sum(y.sum() for y in ys), [device["x"], *device["weights"]])])
        eps = torch.finfo(FLOATS[dtype]).eps
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=16 * eps, atol=128 * eps)


def test_capture_in_a_cuda_graph() -> None:
    """After a call that has tuned; replays see new values of indices and scales."""
    for rows in (4, 64):
        p = make(LoraCase(leading=(rows,), K=64, N=40, R=8, E=3, scales=True), torch.bfloat16)
        inputs, options = on("cuda", p.inputs), on("cuda", p.options)
        evaluate(inputs, None, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = evaluate(inputs, None, **options)["y"]
        options["adapter_index"].copy_(torch.arange(rows) % 4 - 1)
        options["scale"].mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, evaluate(inputs, None, **options)["y"])

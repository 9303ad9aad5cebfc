"""attention_pool's Triton kernels on a GPU, by the rules and cases of test_attention_pool_cuda.py."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from pykernels import attention_pool
from tests.attention_pool_cases import PoolCase, PoolProblem, problem
from tests.helpers import FLOATS, LAYOUTS, SIZES, assert_equal
from tests.on_gpu import DTYPES, GPU_MARKS, on
from tests.test_attention_pool_cuda import check_case, problem_by_gpu, run

pytest.importorskip("triton")
pytestmark = GPU_MARKS


def on_triton(case: PoolCase, dtype: torch.dtype) -> PoolProblem:
    p = problem(case, dtype)
    return replace(p, options=p.options | {"backend": "triton"})


def large_on_triton(case: PoolCase, dtype: torch.dtype) -> PoolProblem:
    p = problem_by_gpu(case, dtype)
    return replace(p, options=p.options | {"backend": "triton"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str) -> None:
    axes = {
        "activation": ("tanh", "swish", "relu", "gelu"), "gated": (False, True), "J": (0, 1, 3), "bias": (True, False),
        "rows": ("all", "mask", "lengths", "packed"), "returned": (None, "raw", "softmax"), "L": (19, 70),
    }  # fmt: skip
    forms = [PoolCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    for case in random.Random(dtype).sample(forms, 16):
        check_case(case, dtype, on_triton)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str) -> None:
    for i, size in enumerate((*SIZES[:-1:2], 64, 200)):
        rows = ("all", "lengths", "packed")[i % 3]
        check_case(PoolCase(B=3, L=SIZES[i + 1], D=size, H=size, rows=rows, gated=i % 2 == 1), dtype, on_triton)
    for case in (
        PoolCase(B=0), PoolCase(L=0), PoolCase(D=0), PoolCase(H=0), PoolCase(B=3, L=0, rows="packed"),
        PoolCase(B=2, L=40, J=67, returned="softmax"), PoolCase(B=1, L=80, D=2100, H=16),
    ):  # fmt: skip
        check_case(case, dtype, on_triton)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_batches_and_bags(dtype: str) -> None:
    for case in (
        PoolCase(B=64, L=300, D=136, H=136, rows="lengths", gated=True, returned="softmax"),
        PoolCase(B=100, L=60, D=768, H=768, rows="mask", activation="gelu", returned="raw"),
        PoolCase(B=1, L=100_000, D=64, H=32, J=2, gated=True, returned="raw"),
    ):
        check_case(case, dtype, large_on_triton)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    p = on_triton(PoolCase(B=3, L=13, D=16, J=2, gated=True, rows="mask", returned="raw"), torch.bfloat16)
    inputs = p.inputs | {"x": LAYOUTS[layout](p.inputs["x"])}
    plain = p.inputs | {"x": inputs["x"].contiguous().clone()}
    expected = run(plain, p.case.gradients, **p.options)
    assert_equal(run(inputs, p.case.gradients, **p.options), expected, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tuner_may_choose_again(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration of the tuned kernels gives the same bits on this GPU."""
    from pykernels.triton_kernels.attention_pool import attention_pool_forward
    from pykernels.triton_kernels.attention_pool_bwd import hidden_backward, pool_input_backward

    every = {kernel: kernel.configs for kernel in (attention_pool_forward, hidden_backward, pool_input_backward)}
    for width in (64, 300):
        p, results = on_triton(PoolCase(B=6, L=150, D=width, H=200, J=2, rows="lengths"), FLOATS[dtype]), []
        for i in range(max(map(len, every.values()))):
            for kernel, configs in every.items():
                monkeypatch.setattr(kernel, "configs", [configs[i % len(configs)]])
            results.append(run(p.inputs, p.case.gradients, **p.options))
            assert_equal(results[-1], results[0], f"configuration {i}")


def test_capture_in_a_cuda_graph() -> None:
    """After a call that has tuned; replays see new values."""
    p = on_triton(PoolCase(B=4, L=200, D=32, H=32, rows="lengths"), torch.bfloat16)
    inputs, options = on("cuda", p.inputs), on("cuda", p.options)
    with torch.no_grad():
        attention_pool(**inputs, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention_pool(**inputs, **options)
        inputs["x"].mul_(0.5)
        options["lengths"].copy_(torch.tensor([7, 200, 0, 133]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, attention_pool(**inputs, **options))

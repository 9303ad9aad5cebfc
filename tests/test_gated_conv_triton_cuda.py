"""gated_conv1d's Triton kernels on a GPU, by the rules and cases of test_gated_conv_cuda.py."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from pykernels import gated_conv1d
from tests.gated_conv_cases import Case, Problem, problem
from tests.helpers import FLOATS, LAYOUTS, SIZES, assert_equal
from tests.on_gpu import DTYPES, GPU_MARKS, on
from tests.test_gated_conv_cuda import (
    CONDS,
    PADDINGS,
    RESIDUALS,
    ROWS,
    check_case,
    exact_convolutions,  # noqa: F401
    legal,
    run,
)

pytest.importorskip("triton")
pytestmark = GPU_MARKS


def on_triton(case: Case, dtype: torch.dtype) -> Problem:
    p = problem(case, dtype)
    return replace(p, options=p.options | {"backend": "triton"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str) -> None:
    forms = legal(
        L=(11,), residual=RESIDUALS, value_act=("identity", "tanh"), padding=PADDINGS, cond=CONDS, rows=ROWS,
        split=("value_gate", "gate_value"), two_weights=(False, True),
    )  # fmt: skip
    for case in random.Random(dtype).sample(forms, 12):
        check_case(replace(case, C_out=7) if case.residual == "none" else case, dtype, on_triton)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str) -> None:
    for i, channels in enumerate((*SIZES[:-1:2], 64, 200)):
        rows = ("all", "lengths", "packed")[i % 3]
        check_case(Case(B=2, L=40, C_in=channels, C_out=channels, rows=rows), dtype, on_triton)
    for case in (Case(B=0), Case(L=0), Case(dilation=1000), Case(K=41, L=23), Case(B=9, L=700, C_in=64, C_out=64)):
        check_case(case, dtype, on_triton)


@pytest.mark.parametrize("kind", ["gate_dropout", "gate_noise"])
def test_random_bits(kind: str) -> None:
    for dtype, channels in zip(DTYPES, (5, 17, 64), strict=True):
        check_case(Case(B=3, L=21, C_in=channels, C_out=channels, **{kind: 0.4}), dtype, on_triton)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    p = on_triton(Case(B=3, L=13, C_in=16, C_out=16, cond="all", rows="mask"), torch.bfloat16)
    x, dy = LAYOUTS[layout](p.inputs["x"].cuda()), LAYOUTS[layout](p.case.dy(p.same["y"]).cuda())
    got = run(p.inputs | {"x": x}, dy, **p.options)
    assert_equal(got, run(p.inputs | {"x": x.contiguous().clone()}, dy.contiguous().clone(), **p.options), layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tuner_may_choose_again(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration of the tuned kernels gives the same bits on this GPU."""
    from pykernels.triton_kernels.gated_conv import gated_conv_forward
    from pykernels.triton_kernels.gated_conv_bwd import input_backward, weight_backward

    case, results = Case(B=6, L=150, C_in=64, C_out=64, rows="lengths"), []
    every = {kernel: kernel.configs for kernel in (gated_conv_forward, input_backward, weight_backward)}
    p = on_triton(case, FLOATS[dtype])
    for i in range(6):
        for kernel, configs in every.items():
            monkeypatch.setattr(kernel, "configs", [configs[i]])
        results.append(run(p.inputs, case.dy, **p.options))
        assert_equal(results[-1], results[0], f"configuration {i}")


def test_capture_in_a_cuda_graph() -> None:
    """After a call that has tuned; replays see new values."""
    p = on_triton(Case(B=4, L=64, C_in=32, C_out=32, rows="lengths"), torch.bfloat16)
    inputs, options = on("cuda", p.inputs), on("cuda", p.options)
    with torch.no_grad():
        gated_conv1d(**inputs, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gated_conv1d(**inputs, **options)
        inputs["x"].mul_(0.5)
        options["lengths"].copy_(torch.tensor([7, 64, 0, 33]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, gated_conv1d(**inputs, **options))

"""ChildTuning's optimizers on CUDA tensors: values against the definition on the CPU, with the same random bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.child_update_cases import make
from tests.child_update_kernels import (  # noqa: F401
    test_compact_moments_change_nothing,
    test_nothing_waits_for_the_device,
    test_stochastic_rounding_draws_the_bits_of_the_definition,
    trained,
)
from tests.helpers import FLOATS, assert_close_to_reference, rounding_floor
from tests.on_gpu import DTYPES, KERNEL_MARKS

pytestmark = KERNEL_MARKS


@pytest.fixture
def on_gpu() -> str:
    return "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_form_is_that_of_the_definition(kind: str, dtype: str) -> None:
    axes = (("F", "D", "none"), ("grad", "update"), ("all", "reserved"), (False, True))
    for mode, where, decay, clipped in itertools.product(*axes):
        options: dict[str, Any] = {"mode": mode, "where": where, "decay": decay, "seed": 2**63 + 7}
        if kind == "adamw":
            options["order"] = "hf" if clipped else "torch"
        if clipped:
            options["max_grad_norm"] = 0.5
        if mode == "D" and kind == "sgd" and decay == "all":
            options["compact"] = False
        got = trained(kind, FLOATS[dtype], "cuda", "cuda", **options)
        same = trained(kind, FLOATS[dtype], "cpu", "reference", **options)
        truth = trained(kind, FLOATS[dtype], "cpu", "reference", exact=True, **options)
        for a, t, s in zip(got, truth, same, strict=True):
            if a.numel():
                assert_close_to_reference(a, t, s, factor=2, floor=rounding_floor(t, a.dtype, 4), what=f"{options}")


def test_with_a_grad_scaler() -> None:
    """A step whose gradients overflow is left out, and does not count."""
    p = torch.ones(1000, device="cuda", requires_grad=True)
    optimizer, scaler = make("adamw", [p], mode="F"), torch.amp.GradScaler("cuda", init_scale=4.0)
    for t, factor in enumerate((1.0, float("inf"), 1.0)):
        before = p.detach().clone()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(p, before) == (t == 1)
    assert int(optimizer.state[p]["step"]) == 2


def test_a_captured_step_is_refused_and_changes_nothing() -> None:
    p = torch.ones(1000, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = make("adamw", [p], mode="F")
    optimizer.step()
    before, graph = p.detach().clone(), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="^step: expected"), torch.cuda.graph(graph):
        optimizer.step()
    assert torch.equal(p, before) and int(optimizer.state[p]["step"]) == 1

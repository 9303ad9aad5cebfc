"""ChildTuning's Triton kernels on a GPU, by the rules and cases of test_child_update_cuda.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pykernels import child_update
from tests.child_update_cases import gradients, make, masks_for, parameters, with_masks
from tests.helpers import FLOATS, assert_close_to_reference, rounding_floor
from tests.on_gpu import DTYPES, GPU_MARKS
from tests.test_child_update_cuda import trained

pytest.importorskip("triton")
pytestmark = GPU_MARKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_form_is_that_of_the_definition(kind: str, dtype: str) -> None:
    for mode, where, clipped in itertools.product(("F", "D", "none"), ("grad", "update"), (False, True)):
        options: dict[str, Any] = {"mode": mode, "where": where, "seed": 2**63 + 7}
        if kind == "adamw":
            options |= {"order": "hf" if clipped else "torch", "decay": "reserved" if clipped else "all"}
        if clipped:
            options["max_grad_norm"] = 0.5
        got = trained(kind, FLOATS[dtype], "cuda", "triton", **options)
        same = trained(kind, FLOATS[dtype], "cpu", "reference", **options)
        truth = trained(kind, FLOATS[dtype], "cpu", "reference", exact=True, **options)
        for a, t, s in zip(got, truth, same, strict=True):
            if a.numel():
                assert_close_to_reference(a, t, s, factor=2, floor=rounding_floor(t, a.dtype, 4), what=f"{options}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_moments_change_nothing(dtype: str) -> None:
    got = [trained("adamw", FLOATS[dtype], "cuda", "triton", mode="D", compact=compact) for compact in (True, False)]
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)


def test_stochastic_rounding_draws_the_bits_of_the_definition() -> None:
    options = {"mode": "F", "stochastic_rounding": True, "lr": 2.0**-10, "weight_decay": 0.0}
    got = trained("adamw", torch.bfloat16, "cuda", "triton", **options)
    same = trained("adamw", torch.bfloat16, "cpu", "reference", **options)
    for a, s in zip(got, same, strict=True):
        # A difference in float32's last place moves few of them across the drawn number.
        assert a.numel() == 0 or (a != s).float().mean() < 0.01


def test_nothing_waits_for_the_device() -> None:
    """Also where gradients are clipped by their norm."""
    params = [p.detach().cuda().requires_grad_() for p in parameters()]
    masks = with_masks(params, [mask.cuda() for mask in masks_for(parameters())])
    optimizers = [
        make("adamw", params, mode="F", max_grad_norm=1.0, backend="triton"),
        make("adamw", params, mode="D", masks=masks, backend="triton"),
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for optimizer in optimizers:
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sums_of_squares() -> None:
    grads = gradients(parameters(torch.bfloat16), 1)
    expected = sum(g.double().square().sum().item() for g in grads)
    got = child_update._triton_square_sum([g.cuda() for g in grads])
    assert got.is_cuda and got.item() == pytest.approx(expected, rel=1e-12)


def test_tables_in_flight_are_not_overwritten() -> None:
    """Steps follow each other faster than the device makes them: each table lives until its launch has read it."""
    params = [torch.zeros(1 << 22, device="cuda", requires_grad=True) for _ in range(2)]
    optimizer = make("sgd", params, mode="none", momentum=0.0, lr=1.0, weight_decay=0.0, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(50):
        optimizer.step()
    assert all((p == -50).all() for p in params)

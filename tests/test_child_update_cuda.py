"""ChildTuning's optimizers on CUDA tensors: values against the definition on the CPU, with the same random bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.child_update_cases import gradients, make, masks_for, parameters, with_masks
from tests.helpers import FLOATS, assert_close_to_reference, rounding_floor
from tests.on_gpu import DTYPES, KERNEL_MARKS

pytestmark = KERNEL_MARKS


def trained(
    kind: str, dtype: torch.dtype, device: str, backend: str, exact: bool = False, **options: Any
) -> list[Tensor]:
    """Parameters after four steps, on the CPU. exact: float64 of the same values."""
    source = parameters(dtype)
    masks = masks_for(source)
    params = [p.detach().to(device, torch.float64 if exact else dtype).requires_grad_() for p in source]
    if options.get("mode") == "D":
        options["masks"] = with_masks(params, [m.to(device) for m in masks])
    optimizer = make(kind, params, backend=backend, **options)
    for t in range(4):
        for p, grad in zip(params, gradients(source, t), strict=True):
            p.grad = grad.to(p.device, p.dtype)
        optimizer.step()
    return [p.detach().cpu() for p in params]


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_moments_change_nothing(dtype: str) -> None:
    got = [trained("adamw", FLOATS[dtype], "cuda", "cuda", mode="D", compact=compact) for compact in (True, False)]
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)


def test_stochastic_rounding_draws_the_bits_of_the_definition() -> None:
    options = {"mode": "F", "stochastic_rounding": True, "lr": 2.0**-10, "weight_decay": 0.0}
    got = trained("adamw", torch.bfloat16, "cuda", "cuda", **options)
    same = trained("adamw", torch.bfloat16, "cpu", "reference", **options)
    for a, s in zip(got, same, strict=True):
        # A difference in float32's last place moves few of them across the drawn number.
        assert a.numel() == 0 or (a != s).float().mean() < 0.01


def test_nothing_waits_for_the_device() -> None:
    """Also where gradients are clipped by their norm."""
    params = [p.detach().cuda().requires_grad_() for p in parameters()]
    masks = with_masks(params, [mask.cuda() for mask in masks_for(parameters())])
    optimizers = [make("adamw", params, mode="F", max_grad_norm=1.0), make("adamw", params, mode="D", masks=masks)]
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

"""What ChildTuning's kernels are held to, whoever compiled them. A module that imports these tests has a fixture of the
name that they take: `emulated`, with calls of raw operators going to the kernels too, or `on_gpu`; each gives the name
of the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import ChildTuningAdamW
from tests import test_child_update_compact as compact
from tests import test_child_update_random as drawn
from tests import test_child_update_values as values
from tests.child_update_cases import gradients, make, masks_for, parameters, with_masks
from tests.helpers import FLOATS, LAYOUTS
from tests.on_gpu import DTYPES

# --- without a GPU ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_form_is_that_of_the_definition(kind: str, dtype: str, emulated: str) -> None:
    values.test_every_form_is_that_of_the_definition(kind, dtype, emulated)


def test_any_strides(emulated: str) -> None:
    for layout in LAYOUTS:
        if layout != "expanded":
            values.test_any_strides(layout, emulated)


def test_clipping_is_that_of_torch(emulated: str) -> None:
    values.test_clipping_is_that_of_torch(emulated)


def test_masks(emulated: str) -> None:
    compact.test_masked_gradients_count_for_nothing(emulated)
    compact.test_decay_of_masked_elements(emulated)
    compact.test_parameters_without_a_mask_train_normally(emulated)
    compact.test_sgd_keeps_all_momentum_where_all_decay(emulated)


def test_shards_draw_the_bits_of_the_whole(emulated: str) -> None:
    for runs in drawn.RUNS:
        drawn.test_shards_draw_the_bits_of_the_whole(runs, emulated)


def test_stochastic_rounding(emulated: str) -> None:
    drawn.test_stochastic_rounding(emulated)


def test_norms_that_are_not_finite(emulated: str) -> None:
    """As torch.nn.utils.clip_grad_norm_: an infinite norm leaves nothing of finite gradients, NaN spreads."""
    for bad in (torch.inf, torch.nan):
        params = parameters(sizes=((5,), (3,)))
        options = {"lr": 0.1, "weight_decay": 0.0, "mode": "none", "max_grad_norm": 1.0}
        optimizer = ChildTuningAdamW(params, **options, backend=emulated)
        before = params[1].detach().clone()
        params[0].grad, params[1].grad = torch.full((5,), bad), torch.ones(3)
        optimizer.step()
        if bad == torch.inf:
            assert torch.equal(params[1], before)
        else:
            assert params[1].isnan().all()


# --- on a GPU ---


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
def test_compact_moments_change_nothing(dtype: str, on_gpu: str) -> None:
    got = [trained("adamw", FLOATS[dtype], "cuda", on_gpu, mode="D", compact=compact) for compact in (True, False)]
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)


def test_stochastic_rounding_draws_the_bits_of_the_definition(on_gpu: str) -> None:
    options = {"mode": "F", "stochastic_rounding": True, "lr": 2.0**-10, "weight_decay": 0.0}
    got = trained("adamw", torch.bfloat16, "cuda", on_gpu, **options)
    same = trained("adamw", torch.bfloat16, "cpu", "reference", **options)
    for a, s in zip(got, same, strict=True):
        # A difference in float32's last place moves few of them across the drawn number.
        assert a.numel() == 0 or (a != s).float().mean() < 0.01


def test_nothing_waits_for_the_device(on_gpu: str) -> None:
    """Also where gradients are clipped by their norm."""
    params = [p.detach().cuda().requires_grad_() for p in parameters()]
    masks = with_masks(params, [mask.cuda() for mask in masks_for(parameters())])
    optimizers = [
        make("adamw", params, mode="F", max_grad_norm=1.0, backend=on_gpu),
        make("adamw", params, mode="D", masks=masks, backend=on_gpu),
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

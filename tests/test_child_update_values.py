"""ChildTuning's optimizers: values against torch.optim, the definition, and recorded steps of the original."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pykernels import ChildTuningAdamW, ChildTuningSGD, child_update
from pykernels.random_bits import draws16, keep_threshold
from tests.child_update_cases import gradients, make, masks_for, parameters, steps, with_masks
from tests.helpers import FLOATS, LAYOUTS, assert_close_to_reference, rounding_floor
from tests.recorded import recorded


def check(actual: list[Tensor], truth: list[Tensor], same: list[Tensor], count: int, what: str) -> None:
    for a, t, s in zip(actual, truth, same, strict=True):
        if a.numel():
            floor = rounding_floor(t, a.dtype, count)
            assert_close_to_reference(a.detach(), t.detach(), s.detach(), factor=2, floor=floor, what=what)


@pytest.mark.parametrize("maximize", [False, True])
def test_without_masks_it_is_adamw(backend: str, maximize: bool) -> None:
    """50 steps with weight decay, against fp64, with the error that torch.optim.AdamW(fused=True) makes."""
    ours, same, truth = parameters(), parameters(), [p.detach().double().requires_grad_() for p in parameters()]
    options = {"lr": 0.01, "weight_decay": 0.1, "maximize": maximize}
    own = ChildTuningAdamW(ours, mode="none", backend=backend, **options)
    fused, double = torch.optim.AdamW(same, fused=True, **options), torch.optim.AdamW(truth, **options)
    for t in range(50):
        for params, optimizer in ((ours, own), (same, fused), (truth, double)):
            for p, grad in zip(params, gradients(ours, t), strict=True):
                p.grad = grad.to(p.dtype)
            optimizer.step()
    check(ours, truth, same, 50, "parameters")


SGD: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
]


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_is_that_of_torch_on_the_masked_gradient(backend: str, options: dict[str, Any]) -> None:
    """F and D, 20 steps with weight decay: torch.optim.SGD gets the gradient that the definition masks."""
    for mode in ("F", "D", "none"):
        ours, same, truth = parameters(), parameters(), [p.detach().double().requires_grad_() for p in parameters()]
        masks = masks_for(ours)
        given = with_masks(ours, masks) if mode == "D" else None
        common = {"lr": 0.02, "weight_decay": 0.1, **options}
        own = ChildTuningSGD(ours, mode=mode, reserve_p=0.4, seed=5, masks=given, backend=backend, **common)
        fused, double = torch.optim.SGD(same, fused=True, **common), torch.optim.SGD(truth, **common)
        threshold = keep_threshold(0.4)
        for t in range(20):
            for i, grad in enumerate(gradients(ours, t)):
                ours[i].grad, masked = grad, grad
                if mode == "F":
                    kept = draws16(torch.tensor(5), 1, grad.numel(), i, t + 1).view(grad.shape) < threshold
                    masked = grad * kept * (65536 / threshold)
                elif mode == "D":
                    masked = grad * masks[i]
                same[i].grad, truth[i].grad = masked, masked.double()
            for optimizer in (own, fused, double):
                optimizer.step()
        check(ours, truth, same, 20, mode)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_form_is_that_of_the_definition(kind: str, dtype: str, kernels: str) -> None:
    """All combinations of mode, where, order and decay, in 4 steps from the same state; masks must be the same bits."""
    forms = itertools.product(("F", "D"), ("grad", "update"), ("torch", "hf"), ("all", "reserved"))
    for mode, where, order, decay in forms:
        if kind == "sgd" and order == "hf":
            continue
        options: dict[str, Any] = {"mode": mode, "where": where, "decay": decay, "weight_decay": 0.1, "reserve_p": 0.25}
        if kind == "adamw":
            options["order"] = order
        results = []
        for chosen in (kernels, "reference"):
            params = parameters(FLOATS[dtype], sizes=((7,), (3, 171), (5, 820)))
            given = with_masks(params, masks_for(params)) if mode == "D" else None
            steps(make(kind, params, masks=given, backend=chosen, **options), params, 0, 4)
            results.append(params)
        for a, b in zip(*results, strict=True):
            # Each step may round the other way, and a parameter moves by less than a few units.
            tolerance = 16 * torch.finfo(FLOATS[dtype]).eps * max(1.0, b.abs().max().item())
            assert (a.double() - b.double()).abs().max() <= tolerance, (mode, where, order, decay)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_any_strides(layout: str, backend: str) -> None:
    """Parameters and gradients of any layout have the values of contiguous ones, with masks by the logical index."""
    results = []
    for change in (torch.clone, LAYOUTS[layout]):
        params = [change(p.detach()).requires_grad_() for p in parameters(sizes=((6, 10), (40, 33)))]
        own = ChildTuningAdamW(params, lr=0.01, seed=3, backend=backend)
        for t in range(3):
            for p, grad in zip(params, gradients(params, t), strict=True):
                p.grad = change(grad)
            own.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_results_do_not_depend_on_threads(kernels: str) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for mode in ("F", "D"):
            params = parameters(sizes=((300, 1000), (7,), (5, 820)))
            given = with_masks(params, masks_for(params)) if mode == "D" else None
            steps(make("adamw", params, mode=mode, masks=given, max_grad_norm=1.0), params, 0, 3)
            results.append(params)
    for i, params in enumerate(results):
        for a, b in zip(params, results[i % 2], strict=True):
            assert torch.equal(a, b)


def test_gradients_are_only_read(backend: str) -> None:
    for mode in ("F", "D"):
        params = parameters(sizes=((3, 171),))
        given = with_masks(params, masks_for(params)) if mode == "D" else None
        own = make("adamw", params, mode=mode, masks=given, max_grad_norm=0.1, backend=backend)
        params[0].grad = gradients(params, 0)[0]
        before, version = params[0].grad.clone(), params[0]._version
        own.step()
        assert torch.equal(params[0].grad, before) and params[0].grad._version == 0 and params[0]._version > version


def test_clipping_is_that_of_torch(backend: str) -> None:
    """max_grad_norm = clip_grad_norm_ before the step: of all groups together, before the masks."""
    ours, theirs = parameters(), parameters()
    groups = [{"params": ours[:4]}, {"params": ours[4:], "weight_decay": 0.0}]
    own = ChildTuningAdamW(groups, lr=0.01, seed=9, max_grad_norm=0.7, backend=backend)
    groups = [{"params": theirs[:4]}, {"params": theirs[4:], "weight_decay": 0.0}]
    other = ChildTuningAdamW(groups, lr=0.01, seed=9, backend=backend)
    for t in range(4):
        for i, grad in enumerate(gradients(ours, t)):
            ours[i].grad, theirs[i].grad = grad * (0.01 if t == 3 else 1), grad.clone() * (0.01 if t == 3 else 1)
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        own.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- the original's recorded steps ---


@pytest.mark.parametrize("run", ["none", "D", "F", "F_wd0_eps8", "D_nobias"])
def test_recorded_steps_of_the_original(run: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks of mode F come from another generator: they are given to the same kernel as stored ones, scaled."""
    data = np.load(recorded("golden", "child_tuning.npz"))
    t32 = {name: torch.from_numpy(data[name]) for name in data.files if name != "__meta__"}
    params = [t32[f"init/p{i}"].clone().requires_grad_() for i in range(5)]
    decay = 0.0 if run == "F_wd0_eps8" else 0.01
    groups = [{"params": params[0::2], "weight_decay": decay}, {"params": params[1::2], "weight_decay": 0.0}]
    drawn = run.startswith("F")
    p = 0.2 if run == "F_wd0_eps8" else 0.3
    masks = {params[i]: t32[f"D/mask/p{i}"] for i in (0, 2, 3, 4)} if run.startswith("D") else None
    own = ChildTuningAdamW(
        groups, lr=2e-2, eps=1e-8 if run == "F_wd0_eps8" else 1e-6, mode="none" if run == "none" else "D", masks=masks,
        order="hf", correct_bias=run != "D_nobias", compact=not drawn, backend=backend,
    )  # fmt: skip
    for t in range(1, 6):
        for i, param in enumerate(params):
            grad = t32.get(f"grad/p{i}/step{t}")
            if drawn and grad is not None:
                grad = grad * t32[f"{run}/mask/p{i}/step{t}"] / p
            param.grad = grad
        own.step()
        for i, param in enumerate(params):
            error = (param - t32[f"{run}/p{i}/step{t}"]).abs().max().item()
            assert error <= 2e-6, f"p{i} step {t}: {error}"
    for i, param in enumerate(params):
        if f"{run}/step_count/p{i}" in t32:
            assert int(own.state[param]["step"]) == int(t32[f"{run}/step_count/p{i}"])
            for name in own.moments:
                expected = t32[f"{run}/{name}/p{i}"]
                mask = own.state[param].get("mask")
                got = own.state[param][name]
                got = got if mask is None else child_update.expand(got, mask, expected.shape)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)

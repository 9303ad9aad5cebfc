"""ChildTuning's optimizers on the factors of LoRA: LoRA+'s groups with their own rates, and masks by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykernels import ChildTuningAdamW, ChildTuningSGD, apply_lora, fisher_masks, loraplus_param_groups
from pykernels.child_update import unpack_mask
from pykernels.random_bits import draws16_at, keep_threshold

LR, RATIO = 2**-6, 16.0
KINDS = ("ours", "peft")


def network(kind: str) -> nn.Module:
    """Two adapted layers, a trained head and layer norm; both factors away from zero, so that all have gradients."""
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential()
    for name, layer in {"up": nn.Linear(12, 33), "norm": nn.LayerNorm(33), "down": nn.Linear(33, 12)}.items():
        model.add_module(name, layer)
    model.add_module("head", nn.Linear(12, 3))
    if kind == "ours":
        apply_lora(model, ["up", "down"], 4, 8, trainable=["head", "norm"])
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], modules_to_save=["head", "norm"])
        model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, std=0.3)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, t: int) -> Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(t))
    return nn.functional.cross_entropy(model(x), torch.arange(16) % 3)


def steps(model: nn.Module, own: torch.optim.Optimizer, first: int, last: int) -> None:
    for t in range(first, last):
        own.zero_grad()
        loss_of(model, t).backward()
        own.step()


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return fisher_masks(copy.deepcopy(model), loss_of, [100, 101], 0.3, include="lora")


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_has_its_rate_and_its_own_bits(kind: str, backend: str) -> None:
    """F: w - lr g m / p with lora_b's larger lr; streams are counted over LoRA+'s groups."""
    model = network(kind)
    groups = loraplus_param_groups(model, LR, RATIO, weight_decay=0.0)
    own = ChildTuningSGD(groups, LR, reserve_p=0.25, seed=9, backend=backend)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, own, 0, 1)
    names = {id(p): name for name, p in model.named_parameters()}
    params = [(group["lr"], p) for group in own.param_groups for p in group["params"]]
    assert len(params) == len(trained(model)) == 8
    for stream, (lr, p) in enumerate(params):
        name = names[id(p)]
        output_side = "lora_b" in name.lower() or p.dim() == 1
        assert lr == (LR * RATIO if output_side else LR), name
        kept = draws16_at(torch.tensor(9), torch.arange(p.numel()), stream, 1).view(p.shape) < keep_threshold(0.25)
        wanted = before[name] - lr * torch.where(kept, 4 * p.grad, 0)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(p == before[name], ~kept | (p.grad == 0) | (wanted == before[name])), name
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(torch.equal(model.get_parameter(name), before[name]) for name in frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_without_masks_it_is_loraplus(kind: str, backend: str) -> None:
    model = network(kind)
    other = copy.deepcopy(model)
    own = ChildTuningAdamW(loraplus_param_groups(model, LR, RATIO), mode="none", weight_decay=0.1, backend=backend)
    plain = torch.optim.AdamW(loraplus_param_groups(other, LR, RATIO), weight_decay=0.1)
    steps(model, own, 0, 5)
    steps(other, plain, 0, 5)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("ratio", [RATIO, "article"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_by_name(kind: str, ratio: Any, backend: str) -> None:
    """D trains the selected entries of the factors, and head and norm whole; empty groups have names too."""
    model = network(kind)
    masks = masks_of(model)
    assert len(masks) == 4 and all("lora" in name for name in masks)
    groups = loraplus_param_groups(model, LR, ratio, weight_decay=0.0, named=True)
    assert not groups[1]["params"] and groups[1]["param_names"] == []
    own = ChildTuningAdamW(groups, mode="D", masks=masks, backend=backend)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    steps(model, own, 0, 3)
    share = 0
    for name, p in trained(model).items():
        selected = unpack_mask(masks[name], p.shape) if name in masks else torch.ones(p.shape, dtype=torch.bool)
        assert torch.equal(p != before[name], selected), name
        assert own.state[p]["exp_avg"].numel() == int(selected.sum())
        share += int(selected.sum()) if name in masks else 0
    assert share == pytest.approx(0.3 * sum(before[name].numel() for name in masks), abs=1)
    assert len(own.state) == len(before)


@pytest.mark.parametrize("mode", ["F", "D"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_runs_are_the_uninterrupted_ones(kind: str, mode: str, backend: str) -> None:
    """Bit for bit, with the saved rates, names and masks."""
    model = network(kind)
    masks = masks_of(model) if mode == "D" else None
    own = ChildTuningAdamW(
        loraplus_param_groups(model, LR, RATIO, named=True), mode=mode, masks=masks, seed=3, backend=backend
    )
    steps(model, own, 0, 3)
    other, state = copy.deepcopy(model), copy.deepcopy(own.state_dict())
    steps(model, own, 3, 6)
    groups = loraplus_param_groups(other, 1.0, 2.0, named=True)
    again = ChildTuningAdamW(groups, mode=mode, backend=backend)
    again.load_state_dict(state)
    assert [g["lr"] for g in again.param_groups] == [LR, 1e-6, LR * RATIO, LR * RATIO]
    steps(other, again, 3, 6)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_masks_by_name_need_names() -> None:
    model = network("ours")
    with pytest.raises(ValueError, match=r"^masks: expected named_parameters\(\) as params"):
        ChildTuningAdamW(loraplus_param_groups(model, LR), mode="D", masks=masks_of(model))


def test_masks_of_the_first_moment_leave_a_factor_out() -> None:
    """lora_b begins at zero, so that lora_a has no gradient before the first step."""
    model = network("ours")
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.zeros_(p)

    def selected() -> dict[str, bool]:
        return {name: bool(mask.any()) for name, mask in masks_of(model).items()}

    assert selected() == {f"{layer}.lora_{f}": f == "b" for layer in ("up", "down") for f in ("a", "b")}
    steps(model, torch.optim.AdamW(loraplus_param_groups(model, LR, RATIO)), 0, 2)
    assert all(selected().values())

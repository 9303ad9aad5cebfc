"""ChildTuning's optimizers in the training loops of others: transformers' Trainer, and accelerate's wrapper."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykernels import ChildTuningAdamW, ChildTuningSGD, fisher_masks
from pykernels.child_update import unpack_mask
from tests.small_bert import make_bert

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

STEPS = 6
WAYS = ("optimizers", "optimizer_cls_and_kwargs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def another_accelerator() -> Iterator[None]:
    """Its state is global."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def network(folder: Path, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(4)
    sizes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "num_labels": 2}
    return transformers.BertForSequenceClassification.from_pretrained(folder, **sizes)


def samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(5, 15, (4 * STEPS, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in rows]


def batches() -> list[dict[str, Tensor]]:
    rows = samples()
    return [transformers.default_data_collator(rows[i : i + 4]) for i in range(0, len(rows), 4)]


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return fisher_masks(copy.deepcopy(model), lambda m, batch: m(**batch).loss, batches()[:2], 0.3)


def rate(step: int) -> float:
    return 1 - step / STEPS


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *arguments: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model: nn.Module, out: Path, way: str, cls: Any, **options: Any) -> transformers.Trainer:
    settings = options.pop("settings", {})
    given: dict[str, Any]
    if way == "optimizers":
        own = cls(model.named_parameters(), **options)
        given = {"optimizers": (own, torch.optim.lr_scheduler.LambdaLR(own, rate))}
    else:
        if "masks" in options:
            # Trainer's groups have no names.
            params = dict(model.named_parameters())
            options["masks"] = {params[name]: mask for name, mask in options["masks"].items()}
        given = {"optimizer_cls_and_kwargs": (cls, options)}
    arguments = transformers.TrainingArguments(
        str(out), use_cpu=True, report_to=[], disable_tqdm=True, save_steps=3, logging_steps=100,
        **{"max_steps": STEPS, "per_device_train_batch_size": 4, "weight_decay": 0.0, "max_grad_norm": 0.1, **settings},
    )  # fmt: skip
    return InOrder(model, arguments, train_dataset=samples(), **given)


def by_hand(model: nn.Module, own: torch.optim.Optimizer, clip: float) -> list[float]:
    """What the Trainer does, written out; the norms of the gradients."""
    schedule, norms = torch.optim.lr_scheduler.LambdaLR(own, rate), []
    model.train()
    for batch in batches():
        model(**batch).loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        own.step()
        schedule.step()
        own.zero_grad()
    return norms


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("mode", ["F", "D"])
@pytest.mark.parametrize("cls", [ChildTuningAdamW, ChildTuningSGD])
def test_the_trainer_makes_our_steps(cls: Any, mode: str, folder: Path, tmp_path: Path) -> None:
    """Bit for bit those of a loop by hand, with the Trainer's own clipping."""
    model, other = network(folder, 0.0), network(folder, 0.0)
    options = {"lr": 1e-2, "mode": mode, "masks": masks_of(model) if mode == "D" else None}
    before = copy.deepcopy(model)
    trainer(model, tmp_path, "optimizers", cls, **options).train()
    assert min(by_hand(other, cls(other.named_parameters(), **options), 0.1)) > 0.1, "nothing was clipped"
    assert_equal(model, other)
    moved = {name: p != q for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True)}
    assert all(bool(m.any()) for name, m in moved.items() if mode == "F" or name not in options["masks"])
    selected = {name: unpack_mask(mask, moved[name].shape) for name, mask in (options["masks"] or {}).items()}
    assert not any((moved[name] & ~mask).any() for name, mask in selected.items() if cls is ChildTuningSGD)


def test_the_trainer_makes_our_class(folder: Path, tmp_path: Path) -> None:
    """With groups of its own, whose decay it sets, and lr and betas from what it was given."""
    model = network(folder, 0.0)
    settings = {"weight_decay": 0.2, "lr_scheduler_type": "constant"}
    masks = masks_of(model)
    options = {"lr": 1e-2, "mode": "D", "masks": masks, "betas": (0.8, 0.9)}
    own = trainer(model, tmp_path, "optimizer_cls_and_kwargs", ChildTuningAdamW, settings=settings, **options)
    own.train()
    inner = own.optimizer.optimizer
    assert type(inner) is ChildTuningAdamW and [g["weight_decay"] for g in inner.param_groups] == [0.2, 0.0]
    assert all(g["mode"] == "D" and g["betas"] == (0.8, 0.9) for g in inner.param_groups)
    for name, p in model.named_parameters():
        mask = unpack_mask(masks[name], p.shape) if name in masks else torch.ones(p.shape, dtype=torch.bool)
        held = inner.state[p].get("mask")
        assert torch.equal(mask, torch.ones_like(mask) if held is None else unpack_mask(held, p.shape)), name


def test_clipping_in_the_step_is_the_trainers(folder: Path, tmp_path: Path) -> None:
    model, other = network(folder, 0.0), network(folder, 0.0)
    for one, clip, fused in ((model, 0.1, None), (other, 0.0, 0.1)):
        options = {"lr": 1e-2, "mode": "F", "max_grad_norm": fused, "settings": {"max_grad_norm": clip}}
        trainer(one, tmp_path / str(clip), "optimizers", ChildTuningAdamW, **options).train()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["F", "D"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_resume_bitwise(way: str, mode: str, folder: Path, tmp_path: Path) -> None:
    """With dropout; the resumed optimizer begins without masks and with another seed."""
    model, other = network(folder), network(folder)
    options = {"lr": 1e-2, "mode": mode, "masks": masks_of(model) if mode == "D" else None}
    options = {name: value for name, value in options.items() if value is not None}
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = trainer(model, tmp_path, way, ChildTuningAdamW, seed=8, settings=dict(settings), **options)
    whole.train()
    options.pop("masks", None)
    again = trainer(other, tmp_path / "other", way, ChildTuningAdamW, seed=9, settings=dict(settings), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == STEPS
    assert_equal(model, other)
    state, found = whole.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"]
    for i, entry in state.items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(found[i][name]), torch.as_tensor(value)), (i, name)
    assert any("mask" in entry for entry in found.values()) == (mode == "D")


# --- accelerate ---


@pytest.mark.parametrize("mode", ["F", "D"])
def test_accelerates_wrapper(mode: str, folder: Path, tmp_path: Path) -> None:
    """prepare() loads the optimizer's own state into it; accumulation skips steps; states go to a folder and back."""
    options = {"lr": 1e-2, "mode": mode, "seed": 3}

    def made(model: nn.Module, count: int) -> tuple[Any, Any]:
        """After each of the first `count` pairs of batches a step."""
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        masks = masks_of(network(folder, 0.0)) if mode == "D" else None
        own = ChildTuningAdamW(model.named_parameters(), masks=masks, **options)
        model, own = accelerator.prepare(model, own)
        run(accelerator, model, own, 0, count)
        return accelerator, own

    def run(accelerator: Any, model: nn.Module, own: Any, first: int, last: int) -> None:
        for batch in batches()[2 * first : 2 * last]:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                own.step()
                own.zero_grad()

    model = network(folder, 0.0)
    made(model, 3)
    plain = network(folder, 0.0)
    own = ChildTuningAdamW(plain.named_parameters(), masks=masks_of(plain) if mode == "D" else None, **options)
    for i in range(3):
        for batch in batches()[2 * i : 2 * i + 2]:
            (plain(**batch).loss / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        own.step()
        own.zero_grad()
    assert_equal(model, plain)

    again = network(folder, 0.0)
    accelerator, _ = made(again, 1)
    accelerator.save_state(str(tmp_path))
    other = network(folder, 0.0)
    accelerator, wrapped = made(other, 0)
    accelerator.load_state(str(tmp_path))
    run(accelerator, other, wrapped, 1, 3)
    assert_equal(other, plain)


def test_parameters_that_are_replaced_do_not_lose_their_masks(backend: str) -> None:
    """accelerate's prepare() puts FSDP's parameters into the groups after the masks were given."""
    make = functools.partial(ChildTuningAdamW, lr=0.1, mode="D", weight_decay=0.0, backend=backend)
    first, mask = nn.Linear(8, 4), torch.rand(4, 8) < 0.5
    own = make(first.named_parameters(), masks={"weight": mask})
    second = copy.deepcopy(first)
    own.param_groups[0]["params"] = list(second.parameters())
    second(torch.ones(8)).sum().backward()
    before = copy.deepcopy(second)
    with pytest.raises(ValueError, match=r"^params: expected the parameters that masks were given for, got others"):
        own.step()
    assert torch.equal(second.weight, before.weight) and torch.equal(second.bias, before.bias)
    own.set_masks({"weight": mask})
    own.step()
    assert torch.equal(second.weight != before.weight, mask)
    assert len(own.state_dict()["state"]) == len(own.state) == 2

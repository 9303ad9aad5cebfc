"""Adapted and fused models in transformers' Trainer and under DistributedDataParallel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pykernels import apply_lora, fuse, load_lora, lora_layers, loraplus_param_groups, save_lora, unfuse

KINDS = ["ours", "fused"]


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_labels": 2, "initializer_range": 0.3}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **dropouts))


def adapted(kind: str, dropout: float) -> nn.Module:
    """BERT with LoRA of queries and values and a trained classifier."""
    model = bert()
    torch.manual_seed(2)
    if kind == "ours":
        return apply_lora(model, ["query", "value"], 4, 8.0, dropout, trainable=["classifier"])
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return fuse(peft.get_peft_model(model, config))


def examples(count: int) -> list[dict[str, Tensor]]:
    """Whether a row begins with a small number."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 30, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": (row[0] < 15).long()} for row in rows]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- Trainer ---


def train(model: nn.Module, folder: Path, plus: bool, resume: str | None = None, steps: int = 12) -> list[float]:
    """The losses of the steps that were made."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=5, max_steps=steps,
        per_device_train_batch_size=8, learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1, save_steps=4,
    )  # fmt: skip
    optimizers: tuple[Any, Any] = None, None
    if plus:
        optimizers = torch.optim.AdamW(loraplus_param_groups(model, 0.01, 4.0, weight_decay=0.0)), None
    trainer = transformers.Trainer(model, arguments, train_dataset=examples(24), optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_trainer(kind: str, tmp_path: Path) -> None:
    """Learns, changes what is trained alone, continues bitwise in the middle of an epoch; with dropout and LoRA+."""
    model = adapted(kind, 0.1)
    before = values(model)
    losses = train(model, tmp_path / "run", plus=True, steps=48)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    after = values(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained

    whole, again = adapted(kind, 0.1), adapted(kind, 0.1)
    first = train(whole, tmp_path / "whole", plus=True)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    second = train(again, tmp_path / "again", plus=True, resume=checkpoint)
    assert len(first) == 12 and second == first
    for name, p in values(whole).items():
        assert torch.equal(p, values(again)[name]), name


def test_trainer_has_the_losses_of_peft(tmp_path: Path) -> None:
    fused = train(adapted("fused", 0.0), tmp_path / "fused", plus=False)
    own = train(unfuse(adapted("fused", 0.0)), tmp_path / "own", plus=False)
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(own), rtol=1e-3, atol=1e-4)


# --- DistributedDataParallel ---


def batch() -> tuple[Tensor, Tensor]:
    rows = examples(8)
    return torch.stack([row["input_ids"] for row in rows]), torch.stack([row["labels"] for row in rows])


def steps(model: nn.Module, ids: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def process(rank: int, kind: str, folder: str) -> None:
    """One of two: half of the batch. Writes all parameters."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        model = adapted(kind, 0.0)
        ids, labels = batch()
        steps(DistributedDataParallel(model), ids[4 * rank : 4 * rank + 4], labels[4 * rank : 4 * rank + 4])
        torch.save(values(model), f"{folder}/{rank}.pt")
        if kind == "ours":
            save_lora(model, f"{folder}/adapter{rank}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_steps_of_one(kind: str, tmp_path: Path) -> None:
    single = adapted(kind, 0.0)
    before = values(single)
    steps(single, *batch())
    mp.spawn(process, (kind, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    trained = {name for name, p in single.named_parameters() if p.requires_grad}
    for name, p in values(single).items():
        assert torch.equal(results[0][name], results[1][name]), f"{name} on both processes"
        torch.testing.assert_close(results[0][name], p, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(p, before[name]) != (name in trained), name
    if kind == "ours":
        loaded, ids = load_lora(bert().eval(), tmp_path / "adapter0"), batch()[0]
        torch.testing.assert_close(loaded(ids).logits, single(ids).logits, rtol=1e-4, atol=1e-4)


def test_wrapped_models_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = bert()
        with pytest.raises(TypeError, match=r"^model: expected the model itself, got DistributedDataParallel"):
            apply_lora(DistributedDataParallel(copy.deepcopy(model)), ["query"])
        assert len(lora_layers(DistributedDataParallel(apply_lora(model, ["query"])))) == 2
    finally:
        torch.distributed.destroy_process_group()

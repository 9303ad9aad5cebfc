"""Adapted and fused models under FSDP2: two processes make the steps of one, in float32 and with 16-bit parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pykernels import (
    LoRALinear,
    apply_lora,
    fuse,
    load_lora,
    loraplus_param_groups,
    merge_lora,
    save_lora,
    unfuse,
    unload_lora,
)

TARGETS = ["query", "value", "intermediate.dense"]


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_labels": 2, "initializer_range": 0.3}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **dropouts))


def adapted(kind: str) -> nn.Module:
    """BERT with adapters that are not zero and a trained classifier."""
    model = bert()
    torch.manual_seed(2)
    owner, form = kind.split()
    if owner == "ours":
        model = apply_lora(model, TARGETS, 3, 8.0, trainable=["classifier"], dora=form == "dora")
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(
            r=3, lora_alpha=8, target_modules=TARGETS, modules_to_save=["classifier"], use_dora=form == "dora"
        )
        model = fuse(peft.get_peft_model(model, config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_b" in name or "lora_B" in name:
                p.normal_(std=0.1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 30, (8, 8), generator=torch.Generator().manual_seed(3))
    return ids, (ids[:, 0] < 15).long()


def train(model: nn.Module, rows: slice) -> list[float]:
    ids, labels = (t[rows] for t in batch())
    optimizer = torch.optim.SGD(loraplus_param_groups(model, 0.2, 2.0, weight_decay=0.0))
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "BertLayer"]


def shard(model: nn.Module, dtype: torch.dtype, reshard: bool) -> nn.Module:
    """Each block, then what is left: frozen and trained parameters in one group."""
    policy = {"param_dtype": dtype, "reduce_dtype": torch.float32}
    for block in blocks(model):
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**policy), reshard_after_forward=reshard)
    whole = MixedPrecisionPolicy(**policy, output_dtype=torch.float32)
    return fully_shard(model, mp_policy=whole, reshard_after_forward=reshard)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


FP32, BF16 = torch.float32, torch.bfloat16
CASES = [
    ("ours lora", FP32, True, False),
    ("ours lora", FP32, False, True),
    ("ours lora", BF16, True, True),
    ("ours dora", FP32, True, True),
    ("ours dora", BF16, False, False),
    ("fused lora", FP32, True, True),
    ("fused lora", BF16, True, False),
    ("fused dora", FP32, True, False),
]


def steps(kind: str, dtype: torch.dtype, reshard: bool, checkpointing: bool, rank: int) -> Any:
    model = adapted(kind).train()
    shard(model, dtype, reshard)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind.startswith("ours"):
        return train(model, slice(4 * rank, 4 * rank + 4)), whole(model)
    from tests.peft_cases import record_calls

    with pytest.MonkeyPatch.context() as patch:
        calls = record_calls(patch)
        losses = train(model, slice(4 * rank, 4 * rank + 4))
    assert len(calls) == 4 * 6 * (1 + checkpointing), "all layers are ours, also when they are computed again"
    return losses, whole(model)


def folder_of_a_sharded_model(rank: int, folder: str) -> Any:
    model = shard(adapted("ours dora").eval(), FP32, True)
    save_lora(model, f"{folder}/adapter")
    return model(batch()[0]).logits.detach()


def refusals(rank: int, folder: str) -> list[str]:
    """Messages."""
    told = []

    def refused(call: Any, *arguments: Any) -> None:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            call(*arguments)
        told.append(f"{type(error.value).__name__}: {error.value}")

    refused(apply_lora, shard(bert(), FP32, True), ["query"])
    model = shard(adapted("ours lora"), FP32, True)
    refused(merge_lora, model)
    refused(unload_lora, model)
    return told


def single_layers(rank: int, folder: str) -> Any:
    """fully_shard of the layers themselves, which changes their class."""
    results = {}
    for kind in ("ours lora", "ours dora", "fused lora"):
        model = adapted(kind)
        expected = model(batch()[0]).logits
        for block in blocks(model):
            fully_shard(block.attention.self.query)
        results[kind] = (model(batch()[0]).logits.detach(), expected.detach())
    for call in (fuse, unfuse):
        with pytest.raises(ValueError, match="query: expected a layer before fully_shard, got FSDPFusedLinear"):
            call(model)
    return results


def fused_after_sharding(rank: int, folder: str) -> Any:
    model = unfuse(adapted("fused lora")).eval()
    expected = model(batch()[0]).logits
    shard(model, FP32, True)
    fuse(model)
    assert "FusedLinear" in repr(model)
    fused = model(batch()[0]).logits
    assert "FusedLinear" not in repr(unfuse(model))
    return fused.detach(), expected.detach(), model(batch()[0]).logits.detach()


def from_meta(rank: int, folder: str) -> Any:
    """Made without memory, sharded, and initialised piece by piece."""
    model = nn.Sequential(*(LoRALinear(16, 16, 3, dora=dora, device="meta") for dora in (True, False)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model).to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in model:
        layer.reset_parameters()
    norm = whole(model)["0.weight"].norm(dim=1)
    return whole(model)["0.magnitude"], norm, model(torch.ones(2, 16)).detach()


def compiled(rank: int, folder: str) -> Any:
    """Results without torch.compile, with compiled layers, and with the whole model compiled around FSDP2's hooks."""
    results = []
    for how in ("eager", "layers", "whole"):
        torch.manual_seed(0)
        model = nn.Sequential(*(LoRALinear(16, 16, 3, dropout=0.2, dora=dora) for dora in (True, False)))
        nn.init.normal_(model[0].lora_b)
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        if how == "layers":
            for layer in model:
                layer.compile(backend="aot_eager")
        call = torch.compile(model, backend="aot_eager") if how == "whole" else model
        torch.manual_seed(3)
        y = call(torch.ones(5, 16))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.full_tensor() for p in model.parameters() if p.grad is not None)])
    return results


OTHERS = [folder_of_a_sharded_model, refusals, single_layers, fused_after_sharding, from_meta, compiled]


def process(rank: int, folder: str) -> None:
    """One of two, with half of the batch. All cases in one, as it takes long to start."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results: dict[Any, Any] = {case: steps(*case, rank) for case in CASES}
        for other in OTHERS:
            results[other.__name__] = other(rank, folder)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    path = tmp_path_factory.mktemp("fsdp")
    mp.spawn(process, (str(path),), nprocs=2)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[Any, Any]]:
    """Of each process."""
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_make_the_steps_of_one(case: Any, results: list[dict[Any, Any]]) -> None:
    kind, dtype, *_ = case
    single = adapted(kind).train()
    before = whole(single)
    losses = train(single, slice(None))
    (first, after), (second, other) = results[0][case], results[1][case]
    allowed = 1e-4 if dtype == FP32 else 0.1
    mean = (torch.tensor(first) + torch.tensor(second)) / 2
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=allowed, atol=0)
    trained = {name for name, p in single.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trained) and losses[-1] < losses[0]
    for name, p in whole(single).items():
        assert torch.equal(after[name], other[name]), f"{name} on both processes"
        moved, wanted = after[name] - before[name], p - before[name]
        assert (moved - wanted).norm() <= allowed * wanted.norm(), name
        assert bool(moved.any()) == (name in trained), name


def test_folder_of_a_sharded_model(folder: Path, results: list[dict[Any, Any]]) -> None:
    ids, single = batch()[0], adapted("ours dora").eval()
    loaded = load_lora(bert().eval(), folder / "adapter")
    torch.testing.assert_close(loaded(ids).logits, single(ids).logits, rtol=1e-5, atol=1e-5)
    for result in results:
        torch.testing.assert_close(result["folder_of_a_sharded_model"], single(ids).logits, rtol=1e-5, atol=1e-5)


def test_refusals(results: list[dict[Any, Any]]) -> None:
    for result in results:
        apply, merge, unload = result["refusals"]
        assert apply.startswith("TypeError: model: expected whole parameters, got sharded ones (bert.embeddings.")
        assert merge.startswith("RuntimeError: LoRALinear: expected whole parameters to merge, got sharded ones")
        assert unload.startswith("TypeError: model: expected whole parameters, got sharded ones (bert.encoder.layer.0.")


def test_single_layers(results: list[dict[Any, Any]]) -> None:
    for result in results:
        for got, expected in result["single_layers"].values():
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_fused_after_sharding(results: list[dict[Any, Any]]) -> None:
    for result in results:
        fused, expected, unfused = result["fused_after_sharding"]
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(unfused, expected)


def test_initialised_after_sharding(results: list[dict[Any, Any]]) -> None:
    for result in results:
        magnitude, norm, y = result["from_meta"]
        torch.testing.assert_close(magnitude, norm)
        assert torch.isfinite(y).all() and torch.equal(y, results[0]["from_meta"][2])


def test_compiled(results: list[dict[Any, Any]], extension: object) -> None:
    for result in results:
        eager, *others = result["compiled"]
        assert len(eager) == 6 and all(t.any() for t in eager[1:4])
        for other in others:
            for a, b in zip(eager, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

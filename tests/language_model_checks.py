"""What every language model must do, whatever it computes. Imports transformers and peft: guard the import."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pykernels import ChildTuningAdamW, apply_lora, fisher_masks, fuse, lora_layers, merge_lora
from pykernels.child_update import unpack_mask


def ids(rows: int = 2, length: int = 9, *, vocabulary: int = 30) -> Tensor:
    return torch.randint(4, vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, labels=input_ids).loss


def check_shapes_and_gradients(model: PreTrainedModel) -> None:
    model.train()
    output = model(input_ids=ids(), labels=ids())
    assert output.logits.shape == (2, 9, model.config.vocab_size) and output.loss.dim() == 0
    output.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    more = model.eval()(input_ids=ids(), output_hidden_states=True)
    assert len(more.hidden_states) == model.config.num_hidden_layers + 1
    last = model(input_ids=ids(), logits_to_keep=1).logits
    torch.testing.assert_close(last[:, 0], more.logits[:, -1], rtol=1e-5, atol=1e-6)  # of a product with fewer rows


def check_round_trip(model: PreTrainedModel, folder: Path) -> None:
    model.eval().save_pretrained(folder)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    loaded, about = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(about.values()) and loaded.config.to_dict().keys() == model.config.to_dict().keys()
    assert torch.equal(loaded(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def check_bf16(model: PreTrainedModel) -> None:
    exact = model.eval()(input_ids=ids()).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    logits = half(input_ids=ids()).logits
    assert logits.dtype == torch.bfloat16 and (logits - exact).abs().max() < 0.03 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model.train(), ids())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def check_compiled(model: PreTrainedModel, backend: str) -> None:
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for call in (model, compiled):
        model.zero_grad()
        output = call(input_ids=ids(), labels=ids(), use_cache=False)
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, ours in zip(*results, strict=True):
        assert torch.allclose(plain, ours, rtol=1e-4, atol=1e-5 * max(1.0, plain.abs().max().item()))


def check_cached_generation(model: PreTrainedModel, **more: Any) -> None:
    """Greedy and sampled, with and without a cache, alone and in a batch padded on the left."""
    model.eval()
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 8, "temperature": 1.3}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            found.append(model.generate(ids(), max_new_tokens=12, use_cache=use_cache, **options, **more))
        assert found[0].shape == (2, 21) and torch.equal(*found)
    alone = model.generate(ids(1, 5), max_new_tokens=8, do_sample=False, **more)
    pad = model.generation_config.pad_token_id
    padded = torch.cat([torch.full((1, 4), pad), ids(1, 5)], 1)
    batch = torch.cat([padded, ids(1, 9)])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    both = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, **more)
    assert torch.equal(both[0, 4:], alone[0])


def check_gradient_checkpointing(model: PreTrainedModel) -> None:
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(6)  # of the dropout
        loss_of(model, ids()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    # Products of tensors that lie elsewhere may be summed in another order.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def check_apply_lora(model: PreTrainedModel, targets: list[str], count: int) -> None:
    """The kernels' loss and gradients are those of the reference, and a merged model says the same."""
    plain = model.eval()(input_ids=ids()).logits
    values = []
    for backend in ("auto", "reference"):
        torch.manual_seed(7)
        adapted = apply_lora(copy.deepcopy(model), targets, r=4, alpha=8, backend=backend)
        assert len(lora_layers(adapted)) == count
        assert torch.allclose(adapted(input_ids=ids()).logits, plain, atol=1e-5)
        for layer in lora_layers(adapted).values():
            nn.init.normal_(layer.lora_b, std=0.1)
        loss = loss_of(adapted, ids())
        loss.backward()
        values.append([loss.detach(), *(p.grad for p in adapted.parameters() if p.requires_grad)])
    assert len(values[0]) == 2 * count + 1
    for ours, reference in zip(*values, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())
    before = adapted(input_ids=ids()).logits
    assert not torch.allclose(before, plain, atol=1e-3)
    assert torch.allclose(merge_lora(adapted)(input_ids=ids()).logits, before, atol=1e-4)


def check_peft(model: PreTrainedModel, targets: list[str], folder: Path, **config: Any) -> None:
    """PEFT's adapters, our kernels in their place, and generation."""
    model.eval()
    base = copy.deepcopy(model)
    torch.manual_seed(8)
    options = {"target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options, **config)).eval()
    logits = adapted(input_ids=ids()).logits
    fuse(adapted)
    assert torch.allclose(adapted(input_ids=ids()).logits, logits, atol=1e-4)
    loss_of(adapted, ids()).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert adapted.generate(input_ids=ids(), min_new_tokens=3, max_new_tokens=3).shape == (2, 12)
    adapted.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, folder).eval()
    assert torch.allclose(loaded(input_ids=ids()).logits, logits, atol=1e-5)


def check_child_tuning(model: PreTrainedModel, mode: str) -> None:
    """A few steps lower the loss, tied weights are one parameter, and D trains no more than its masks."""
    model.eval()
    batch = {"input_ids": ids(), "labels": ids()}
    masks = fisher_masks(model, lambda m, b: m(**b).loss, [batch], 0.3) if mode == "D" else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ChildTuningAdamW(model.named_parameters(), lr=1e-2, weight_decay=0, mode=mode, masks=masks)
    first = loss_of(model, ids()).item()
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model, ids()).backward()
        optimizer.step()
    assert loss_of(model, ids()).item() < first
    kept = entries = 0
    for name, mask in (masks or {}).items():
        moved = (model.get_parameter(name) != before[name]).flatten()
        reserved = unpack_mask(mask, before[name].shape).flatten()
        assert not (moved & ~reserved).any()
        kept += int(reserved.sum())
        entries += len(reserved)
    assert masks is None or 0.25 < kept / entries < 0.35


def check_messages(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"input_ids: expected integers \[B, L\], got torch.float32 \[2, 9\]"):
        model(input_ids=ids().float())
    with pytest.raises(ValueError, match=r"input_ids: expected integers \[B, L\], got torch.int64 \[9\]"):
        model(input_ids=ids()[0])
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected one of them, got none"):
        model.base_model()

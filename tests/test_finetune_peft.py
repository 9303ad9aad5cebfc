"""The PEFT example: the losses of a fused model are PEFT's, batches and seeds are alike, and runs go on."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import finetune_peft
import pytest
import sentence_classifier
import torch
from finetune_peft import FUSED, OTHER, PEFT, PeftConfig, adamw, compare, differences, peft_model
from sentence_classifier import HEAD, Fit, Plan, Pretrained, Sentences, score
from sentence_data import PACKAGE
from torch import nn

from kit.progress import Progress
from kit.stop import Stop
from kit.training import Diverged
from tests.recorded import recorded

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


def arguments(task: Path, bert: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(task), "--encoder", str(bert), "--out", str(out), "--threads", "1", "--quiet", *more]


# --- sentences and models ---


def test_batches_hold_each_sentence_once_and_little_padding(parts: dict[str, Sentences]) -> None:
    train = parts["train"]
    first, again, other, seeded = (train.batches(16, *key) for key in ((1, 0), (1, 0), (1, 1), (2, 0)))
    assert first == again and first != other and first != seeded
    assert sorted(i for batch in first for i in batch) == list(range(len(train)))
    real = sum(map(len, train.ids))
    padded = sum(train.batch(batch)["input_ids"].numel() for batch in first)
    alike = torch.arange(len(train)).split(16)
    assert padded < 1.1 * real < sum(train.batch(batch.tolist())["input_ids"].numel() for batch in alike)
    assert [len(batch) for batch in first].count(16) == len(train) // 16


def test_padding_and_the_size_of_batches_change_no_score(pretrained: Pretrained, task: Path) -> None:
    texts = [("the cat sat .",), ("a",), ("the dog ran under the mat not a cat",)]
    sentences = pretrained.tokenize(texts, torch.tensor([0, 1, 1]))
    model = pretrained.classifier(1).eval()
    with torch.no_grad():
        whole = model(**sentences.batch([0, 1, 2])).logits
        alone = torch.cat([model(**sentences.batch([i])).logits for i in range(3)])
        own = torch.cat([model(**pretrained.tokenizer(*text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole, own, rtol=1e-4, atol=1e-6)
    pair = pretrained.tokenize([("a cat", "the dog")], torch.tensor([0]))
    assert pair.batch([0])["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    found = score(model, sentences)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(alone, sentences.labels).item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((alone.argmax(1) == sentences.labels).double().mean().item())


def test_a_seed_decides_the_head_and_dtype_leaves_it_in_float32(pretrained: Pretrained) -> None:
    one, again, other = (pretrained.classifier(seed) for seed in (1, 1, 2))
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    config = PeftConfig(data="x", targets=("query",))
    model = peft_model(config, pretrained, "bf16", 1)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    float32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= float32
    assert all("lora_" in name or f".{HEAD}." in name for name in float32)
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def test_rates_rise_and_fall() -> None:
    rates = [Plan(10, warmup=0.3).rate(step) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert [Plan(4).rate(step) for step in range(4)] == [1, 0.75, 0.5, 0.25]


def test_a_fit_that_takes_turns_is_the_fit_alone(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    """Dropout included, and whatever else draws from the generator in between; clipping bounds the gradients."""
    model = pretrained.classifier(1)
    made = {}
    for name in ("alone", "turns", "stream"):
        fit = Fit(copy.deepcopy(model), _sgd, parts["train"], Plan(5, 8, 1, clip=1e-3), stream=name == "stream")
        while not fit.finished:
            if name == "turns":
                torch.rand(7)
            fit.step()
        made[name] = fit
    assert made["alone"].losses == made["turns"].losses != made["stream"].losses
    assert len(made["alone"].seconds) == 5 and min(made["alone"].seconds) > 0
    gradients = [p.grad.flatten() for p in made["alone"].model.parameters() if p.grad is not None]
    assert torch.cat(gradients).norm() <= 1.001e-3


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def test_a_loss_that_is_not_finite_ends_it(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    fit = Fit(pretrained.classifier(1), _sgd, parts["train"], Plan(3, 8))
    fit.step()
    with torch.no_grad():
        fit.model.classifier.bias.fill_(float("inf"))
    before = fit.model.classifier.weight.clone()
    with pytest.raises(Diverged, match=r"^step 2: the loss is (nan|inf); a lower rate may help"):
        fit.step()
    assert torch.equal(fit.model.classifier.weight, before) and len(fit.losses) == 1


# --- PEFT's losses and ours ---


def compared(pretrained: Pretrained, parts: dict[str, Sentences], dtype: str, **options: Any) -> dict[str, Any]:
    options = {"data": "x", "steps": 30, "batch_size": 16, "block": 4, "lr": 5e-3} | options
    with Stop() as stop, Progress(1, quiet=True) as progress:
        result = compare(PeftConfig(**options), pretrained, parts, dtype, 1, progress, stop)
    assert result is not None
    return result


def test_losses_are_pefts(
    pretrained: Pretrained, parts: dict[str, Sentences], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the encoder's dropout. Where products this small are summed in another order, training enlarges it."""
    from pykernels.peft_linear import FusedLinear

    served, one = [], FusedLinear._one
    monkeypatch.setattr(FusedLinear, "_one", lambda self, *args: served.append(self) or one(self, *args))
    result = compared(pretrained, parts, "fp32")
    assert len(served) >= 30
    assert set(result) == {PEFT, FUSED} and all(len(run["losses"]) == 30 for run in result.values())
    far = differences(result, FUSED)
    assert max(far[:5]) < 1e-5 and max(far) < 1e-3
    losses = result[PEFT]["losses"]
    assert losses[-1] < losses[0] and len(set(losses)) == 30


def test_losses_are_pefts_on_a_bfloat16_model(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    half, full = (compared(pretrained, parts, dtype, dropout=0.0) for dtype in ("bf16", "fp32"))
    rounding = max(abs(a - b) for a, b in zip(half[PEFT]["losses"], full[PEFT]["losses"], strict=True))
    assert max(differences(half, FUSED)) < 2 * rounding < 0.1


def test_with_lora_dropout_losses_differ_as_with_another_seed_of_it(
    pretrained: Pretrained, parts: dict[str, Sentences]
) -> None:
    result = compared(pretrained, parts, "fp32", lora_dropout=0.3)
    ours, seeds = (sum(differences(result, name)) / 30 for name in (FUSED, OTHER))
    assert 0.2 * seeds < ours < 5 * seeds and seeds > 1e-3


def test_the_head_and_adapters_alone_are_trained(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    config = PeftConfig(data="x", targets=("query", "value"))
    model = peft_model(config, pretrained, "fp32", 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit = Fit(model, lambda m: adamw(config, m), parts["train"], Plan(3, 8))
    while not fit.finished:
        fit.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"lora_A" in name or "lora_B" in name or "modules_to_save" in name for name in changed} == {True}
    assert len(changed) == 2 * 2 * 2 + 2


# --- the whole ---


def test_the_whole_and_its_resumption(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = arguments(task, bert, tmp_path / "run", "--quick", "--lora-dropout", "0.1", "--seeds", "2")
    assert finetune_peft.main(quick) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.split()[:1] in (["fp32"], ["bf16"])]
    assert len(rows) == 2 * 2 * 3 and sum(FUSED in row for row in rows) == 4
    assert (tmp_path / "run" / "losses.png").stat().st_size > 1000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["fp32, seed 1", "fp32, seed 2", "bf16, seed 1", "bf16, seed 2"]
    for result in results.values():
        assert {len(run["losses"]) for run in result.values()} == {8}

    assert finetune_peft.main(quick) == 2
    assert "holds a run already: give --resume auto" in capsys.readouterr().err
    monkeypatch.setattr(Fit, "step", lambda self: pytest.fail("all runs are finished"))
    assert finetune_peft.main([*quick, "--resume", "auto"]) == 0
    assert capsys.readouterr().out == printed
    assert finetune_peft.main([*quick, "--resume", "auto", "--steps", "9"]) == 2
    assert "was begun with other options: steps: 8, now 9" in capsys.readouterr().err


def test_a_signal_keeps_what_is_finished(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = arguments(task, bert, tmp_path, "--quick")
    step, made = sentence_classifier.Fit.step, []

    def signalled(self: Fit) -> float:
        made.append(1)
        if len(made) == 20:  # fp32 takes 16
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Fit, "step", signalled)
    assert finetune_peft.main(quick) == 130
    assert "--resume auto goes on" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["fp32, seed 1"]
    assert finetune_peft.main([*quick, "--resume", "auto"]) == 0
    assert len(made) == 20 + 16


def test_real_weights(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 on CoLA: equal losses for some steps."""
    pytest.importorskip(PACKAGE, reason=f"{PACKAGE} is not installed")
    data = recorded("data", "glue", "CoLA")
    some = ["--quick", "--dtypes", "fp32", "--quiet"]
    assert finetune_peft.main(["--data", str(data), "--out", str(tmp_path), *some]) == 0
    result = json.loads((tmp_path / "results.json").read_text())["fp32, seed 1"]
    assert max(differences(result, FUSED)) < 1e-4


def test_mistakes_are_told(task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        try:
            assert finetune_peft.main(argv) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    out = tmp_path / "run"
    assert "data: expected a folder with train.tsv and dev.tsv" in refused()
    assert "dtypes: expected fp32 or bf16, got fp8" in refused("--data", "x", "--dtypes", "fp8")
    assert "steps: expected 1 or more, got 0" in refused("--data", "x", "--steps", "0")
    assert "holdout: expected 0 < holdout < 1, got 1.0" in refused("--data", "x", "--holdout", "1")
    assert "there is no such folder" in refused(*arguments(task, tmp_path / "nowhere", out))
    assert "transformers cannot load it" in refused(*arguments(task, task, out))
    assert "train.tsv: cannot be read" in refused(*arguments(tmp_path, bert, tmp_path / "other"))
    assert finetune_peft.main(arguments(task, bert, tmp_path / "lr", "--quick", "--lr", "1e30")) == 3
    assert "the loss is nan; a lower rate may help" in capsys.readouterr().err

"""The language model's fine-tuning example: memory by arithmetic, losses, models that go on and that are kept."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import finetune_lm  # noqa: E402
import train_lm  # noqa: E402
from finetune_lm import SIZES, Source, TuneConfig, made, optimizer_for, published, sizes_of  # noqa: E402
from finetune_ways import WAYS, adapt  # noqa: E402
from sentence_classifier import Fit  # noqa: E402
from training_memory import expected  # noqa: E402

from kit.progress import Progress  # noqa: E402
from kit.stop import Stop  # noqa: E402
from pykernels import load_lora  # noqa: E402
from pykernels.models import GPT2ML, GPT2MLConfig  # noqa: E402

PAIRS = [("full", "adafactor"), *((way, kind) for way in WAYS for kind in ("adamw", "F", "D"))]
SMALL = {"layers": 1, "width": 16, "heads": 2, "context": 24, "min_count": 1, "holdout": 0.2, "seeds": 1}
SMALL |= {"fisher_batches": 2, "mask_steps": 4, "dropout": 0.0, "lora_lr": 1e-2, "loraplus_lr": 5e-3, "full_lr": 1e-2}


def options(poems: Path, **more: Any) -> TuneConfig:
    return TuneConfig(**{"data": (str(poems),), "steps": 6, **SMALL, **more})


def arguments(poems: Path, out: Path, *more: str) -> list[str]:
    known = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    known += ["--data", str(poems), "--out", str(out), "--threads", "1", "--quiet"]
    return [*known, *(() if "--steps" in more else ("--steps", "6")), *more]


def run(config: TuneConfig, way: str, kind: str) -> dict[str, Any]:
    with Progress(1, quiet=True) as progress:
        return made(config, Source(config), way, kind, 1, progress, Stop(), "a run")


# --- memory ---


@pytest.mark.parametrize(("way", "kind", "dtype"), [*((*pair, "fp32") for pair in PAIRS), ("lora", "adamw", "bf16")])
def test_arithmetic_is_what_is_allocated(way: str, kind: str, dtype: str, poems: Path) -> None:
    """From shapes on the meta device; F's and D's state too, after masks of real gradients."""
    config = options(poems, dtype=dtype, layers=2)
    counted = run(config, way, kind)["bytes"]
    sizes = Source(config).sizes
    with torch.device("meta"):
        model = GPT2ML(sizes).to(torch.bfloat16 if dtype == "bf16" and way != "full" else torch.float32)
    wanted = expected(adapt(config, way, model), kind, config.reserve_p)
    assert all(t.device.type == "meta" for t in model.parameters())
    # Entries without gradient that D's threshold meets are reserved beyond its share.
    assert counted == wanted if kind != "D" else counted == pytest.approx(wanted, rel=2e-3)
    assert counted["weights"] == wanted["weights"] and counted["gradients"] == wanted["gradients"]


def test_the_published_network(poems: Path) -> None:
    lines = {line[:39].strip(): line[39:].split() for line in published(options(poems)).splitlines()[2:]}
    parameters = 1_393_944_576
    with torch.device("meta"):
        model = GPT2ML(GPT2MLConfig(**sizes_of(SIZES)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    whole = {kind: lines[f"full, {kind}"] for kind in ("AdamW", "AdaFactor", "ChildTuning-F", "ChildTuning-D")}
    assert {row[0] for row in whole.values()} == {f"{parameters:,}"}
    assert {(row[1], row[2]) for row in whole.values()} == {(f"{4 * parameters / 1e9:.2f}",) * 2}
    assert whole["AdamW"][3] == whole["ChildTuning-F"][3] == f"{8 * parameters / 1e9:.2f}"
    # A row and a column of each matrix, all of each vector: a thousandth.
    assert float(whole["AdaFactor"][3]) < 0.02 < 3 < float(whole["ChildTuning-D"][3]) < 4
    # r rows and columns of c_attn, both c_proj and c_fc of each block.
    adapters = 48 * 8 * 1536 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    for name, weights in (("LoRA, AdamW", 4), ("LoRA, AdamW, frozen weights in bfloat16", 2)):
        held = [weights * parameters + 4 * adapters, 4 * adapters, 8 * adapters]
        wanted = [f"{adapters:,}", *(f"{value / 1e9:.2f}" for value in held)]
        assert lines[name][:4] == wanted
    for row in lines.values():
        assert float(row[4]) == pytest.approx(sum(map(float, row[1:4])), abs=0.02)


# --- training ---


@pytest.mark.parametrize(("way", "kind"), PAIRS)
def test_every_pair_learns_and_trains_no_more(
    way: str, kind: str, poems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    train = finetune_lm.train_run
    monkeypatch.setattr(finetune_lm, "train_run", lambda *args: (models.append(args[4]), train(*args))[1])
    config = options(poems, steps=25)
    result = run(config, way, kind)
    assert result["held_loss"] < result["held_loss_before"] - 0.005
    torch.manual_seed(1)
    before = Source(config).network(1, torch.float32)
    adapt(config, way, before)
    begun = dict(before.named_parameters())
    moved = {name for name, p in models[0].named_parameters() if not torch.equal(p, begun[name])}
    adapters = {name for name in begun if name.endswith(("lora_a", "lora_b"))}
    assert moved <= (set(begun) if way == "full" else adapters) and len(moved) > 4
    whole = sum(begun[name].numel() for name in (begun if way == "full" else adapters))
    assert result["trained"] == whole if kind != "D" else result["trained"] < 0.9 * whole


def test_adafactor_is_pytorchs(poems: Path) -> None:
    model = Source(options(poems)).network(1, torch.float32)
    own = optimizer_for(options(poems, adafactor_lr=3e-3), "full", "adafactor", 1, model)
    assert type(own) is torch.optim.Adafactor and [group["lr"] for group in own.param_groups] == [3e-3, 3e-3]
    assert [group["weight_decay"] for group in own.param_groups] == [0.01, 0.0]
    config = options(poems, train=("full", "lora"), optimizers=("adafactor", "adamw"))
    assert config.pairs == [("full", "adafactor"), ("full", "adamw"), ("lora", "adamw")]


def test_goes_on_from_a_trained_network(poems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss before is what the training ended with; kept models have the losses after."""
    small = "--layers 1 --width 16 --heads 2 --context 24 --min-count 1 --dropout 0 --threads 1 --quiet --holdout 0.2"
    known = [*small.split(), "--batch-size", "8", "--data", str(poems), "--seed", "3"]
    assert train_lm.main([*known, "--out", str(tmp_path / "lm"), "--epochs", "2", "--samples", "0"]) == 0
    trained = json.loads((tmp_path / "lm" / "scores.json").read_text())["held_loss"]
    some = ["--model", str(tmp_path / "lm"), "--train", "full", "lora", "--seed", "3", "--steps", "12", "--save"]
    assert finetune_lm.main(arguments(poems, tmp_path / "run", *some)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for result in results.values():
        assert result["held_loss_before"] == pytest.approx(trained, rel=1e-5)
        assert result["held_loss"] < trained
    printed = capsys.readouterr().out
    assert printed.count("\nfull     adamw") == printed.count("\nlora     adamw") == 1
    assert "1,393,944,576 parameters, by arithmetic" in printed
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000

    source = Source(options(poems, model=str(tmp_path / "lm"), seed=3))
    folder = tmp_path / "run" / "models"
    kept = {
        "full": GPT2ML.from_pretrained(folder / "seed-3-full-adamw"),
        "lora": load_lora(source.network(1, torch.float32), folder / "seed-3-lora-adamw"),
    }
    for way, model in kept.items():
        loss = finetune_lm.held_loss(model, source.held, 8, TuneConfig.autocast(source.config, way))
        assert loss == pytest.approx(results[f"seed 3, {way}, adamw"]["held_loss"], rel=1e-5)
        vocabulary = folder / f"seed-3-{way}-adamw" / "vocab.txt"
        assert vocabulary.read_text(encoding="utf-8") == source.tokens.text()


def test_a_signal_keeps_what_is_finished(
    poems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = ["--dropout", "0.1", "--train", "full", "lora", "--optimizers", "adafactor", "D"]
    assert finetune_lm.main(arguments(poems, tmp_path / "whole", *some)) == 0
    calls, step = [], Fit.step

    def signalled(self: Fit) -> float:
        calls.append(1)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Fit, "step", signalled)
    argv = arguments(poems, tmp_path / "run", *some)
    assert finetune_lm.main(argv) == 130
    assert "--resume auto goes on after the runs that are finished" in capsys.readouterr().err
    assert finetune_lm.main([*argv, "--resume", "auto"]) == 0 and len(calls) == 9 + 2 * 6
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "run"))
    assert list(one) == list(other) == [f"seed 1, {pair}" for pair in ("full, adafactor", "full, D", "lora, D")]
    for name, result in one.items():
        assert all(result[key] == other[name][key] for key in ("losses", "held_loss", "trained", "bytes")), name


def test_mistakes_are_told(poems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        try:
            assert finetune_lm.main(argv) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    assert "data: expected either --data FILE or --sample" in refused()
    assert "expected full in --train with adafactor alone" in refused(
        *("--sample", "--train", "lora", "--optimizers", "adafactor")
    )
    assert "expected a multiple of 2 * heads = 4, got 15" in refused(*arguments(poems, tmp_path, "--width", "15"))
    assert "holdout: expected 0 < holdout < 1, got 0.0" in refused(*arguments(poems, tmp_path, "--holdout", "0"))
    assert "nothing of 64 texts is held out" in refused(*arguments(poems, tmp_path / "a", "--holdout", "0.001"))
    assert "expected the folder of a run of examples/train_lm.py" in refused(
        *arguments(poems, tmp_path / "b", "--model", str(tmp_path))
    )
    assert "none.json: there is no such file" in refused(*arguments(tmp_path / "none.json", tmp_path / "c"))
    assert "--targets query: target_modules: expected names" in refused(
        *arguments(poems, tmp_path / "d", "--train", "lora", "--targets", "query")
    )
    assert finetune_lm.main(arguments(poems, tmp_path / "e", "--full-lr", "1e30", "--warmup", "0")) == 3
    assert "seed 1, full, adamw: step 2: the loss is nan; a lower rate may help" in capsys.readouterr().err

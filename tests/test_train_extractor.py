"""The training example of the extractor: batches, schedule, resuming, learning and what it says of mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_extractor
from extractor_data import load
from train_extractor import ExtractorTrainer, TrainConfig, build, make_batch, sampled_subject

from kit import log
from kit.run import Run
from kit.training import COLUMNS, State, Trainer
from pykernels.models import extractor
from pykernels.models.extractor_decoding import Triple
from tests.runs import assert_same_run, contents

SCRIPT = Path(train_extractor.__file__)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 sentences, "<name>生于<place>，<wife>之夫" with a wife in half of them."""
    lines = []
    for i, name in enumerate("赵钱孙李周吴郑王冯陈"):
        for j, place in enumerate("京沪津渝粤浙"):
            text, triples = f"{name}先生生于{place}城", [(f"{name}先生", "出生地", f"{place}城")]
            if (i + j) % 2:
                text, triples = f"{text}，妻子是{place}女士", [*triples, (f"{name}先生", "妻子", f"{place}女士")]
            spo = [dict(zip(Triple._fields, t, strict=True)) for t in triples]
            lines.append(json.dumps({"text": text, "spo_list": spo}, ensure_ascii=False))
    path = tmp_path_factory.mktemp("data") / "ske.json"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    # 48 sentences to train on, 8 a step: 6 steps an epoch.
    small = "--holdout 0.2 --char-size 16 --batch-size 8 --word-vectors none --min-count 1 --threads 1 --quiet"
    return ["--data", str(data), "--out", str(out), *small.split(), *more]


def trainer_of(data: Path, out: Path, **options: object) -> ExtractorTrainer:
    options = {"data": (str(data),), "char_size": 8, "batch_size": 8, "min_count": 1, "word_vectors": "none"} | options
    config = TrainConfig(**options)  # type: ignore[arg-type]
    sentences, _ = load(data, config.max_length)
    run = Run(out, config, "no", [*COLUMNS, "precision", "recall"])
    return ExtractorTrainer(config, build(config, sentences), sentences, [], run)


# --- batches ---


def test_every_sentence_comes_once_an_epoch_among_others_of_its_length(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, batch_size=7)
    orders = [trainer.order(epoch) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(60))
    lengths = [len(trainer.sentences[i].text) for i in orders[0]]
    spread = [max(part) - min(part) for part in (lengths[i : i + 7] for i in range(0, 60, 7))]
    # Two lengths, 7 apart, and two windows of sorted sentences: at most one batch in each holds both.
    assert max(lengths) - min(lengths) == 7 and sum(spread) <= 2 * 7


def test_a_sampled_subject_may_be_made_of_two(data: Path, tmp_path: Path) -> None:
    subjects = [(0, 1), (4, 6), (3, 9)]
    drawn = {sampled_subject(subjects, np.random.default_rng(seed)) for seed in range(200)}
    assert drawn == {(0, 1), (0, 6), (0, 9), (4, 6), (4, 9), (3, 6), (3, 9)}


def test_targets_are_those_of_the_sampled_subject(data: Path, tmp_path: Path) -> None:
    e = trainer_of(data, tmp_path).extractor
    text = "赵先生，钱先生生于京城"
    triples = [Triple("钱先生", "出生地", "京城"), Triple("赵先生", "妻子", "钱先生")]
    seen = set()
    for seed in range(30):
        batch = make_batch(e, [(e.encode(text), triples)], [np.random.default_rng(seed)])
        subjects, objects = batch.targets
        assert subjects.start.nonzero().tolist() == [[0, 0], [0, 4]]
        assert subjects.end.nonzero().tolist() == [[0, 2], [0, 6]]
        span = batch.inputs["start"].item(), batch.inputs["end"].item()
        expected = {
            (0, 2): [[0, 4, e.predicate_id["妻子"], 6]],
            (4, 6): [[0, 9, e.predicate_id["出生地"], 10]],
        }.get(span, [])
        starts, ends = objects.start.nonzero().tolist(), objects.end.nonzero().tolist()
        assert [[b, i, c, j] for (b, i, c), (_, j, _) in zip(starts, ends, strict=True)] == expected
        seen.add(span)
    assert seen == {(0, 2), (0, 6), (4, 6)}


def test_known_triples_of_training_sentences_are_those_of_others(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, distant_supervision=True, swap=0.0)
    # Each triple of the data stands in one sentence, so no sentence knows its own ...
    assert all(encoded.known == {} for encoded in trainer.encoded)
    # ... until a second sentence says the same, and a new text knows all.
    triple = trainer.sentences[0].triples[0]
    assert trainer.extractor.encode(trainer.sentences[0].text).known == {(0, 2): [(0, 5, 6)]}
    trainer.extractor.known.counts[triple] = 2
    assert trainer.extractor.encode(trainer.sentences[0].text, trainer.sentences[0].triples).known == {
        (0, 2): [(0, 5, 6)]
    }
    # A triple that was swapped in is the answer as well, and is not told.
    swapping = trainer_of(data, tmp_path / "swap", distant_supervision=True, swap=0.999)
    examples = [swapping.example(0, np.random.default_rng(seed)) for seed in range(20)]
    assert len({encoded.text for encoded, _ in examples}) > 5 and all(not encoded.known for encoded, _ in examples)


# --- the schedule ---


def test_rate_rises_over_the_first_epoch(data: Path, tmp_path: Path) -> None:
    assert train_extractor.main(arguments(data, tmp_path, "--epochs", "2", "--preset", "reduced")) == 0
    rates = [float(row["lr"]) for row in log.read(tmp_path / "log.csv") if row["loss"]]
    assert rates == pytest.approx([1e-3 * min(1, (i + 1) / 6) for i in range(12)], rel=1e-4)


def test_a_second_stage_without_a_score_begins_with_the_average(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    real = Trainer._second_stage

    def second_stage(self: Trainer, progress: object) -> None:
        self.optimizer.state[self.optimizer.param_groups[0]["params"][0]]["step"].fill_(99)
        average = {name: t.clone() for name, t in self.ema.module.state_dict().items()}
        real(self, progress)  # type: ignore[arg-type]
        seen.append({name: t - average[name] for name, t in self.model.state_dict().items()})
        assert not self.optimizer.state and self.ema.n_averaged == 0

    monkeypatch.setattr(Trainer, "_second_stage", second_stage)
    schedule = ["--epochs", "3", "--switch-epoch", "1", "--lr", "1e-6"]
    assert train_extractor.main(arguments(data, tmp_path, "--preset", "reduced", *schedule)) == 0
    assert len(seen) == 1 and not any(t.any() for t in seen[0].values())
    state = State(**contents(tmp_path / "last.safetensors")[1])
    assert (state.stage, state.best, state.best_epoch) == (2, 0.0, 0)
    assert (tmp_path / "extractor.safetensors").exists(), "the average is kept, though nothing was right"
    rates = {float(row["lr"]) for row in log.read(tmp_path / "log.csv") if row["epoch"] == "2" and row["loss"]}
    assert rates == {1e-4}


@pytest.mark.parametrize("options", [["--preset", "reduced"], ["--distant-supervision"]], ids=["reduced", "known"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(data: Path, tmp_path: Path, options: list[str]) -> None:
    """40 steps and 20 + 20, stopped in the middle of an epoch; the second stage begins after 30 steps."""
    schedule = ["--epochs", "9", "--switch-epoch", "5", "--eval-every", "5", *options]
    assert train_extractor.main(arguments(data, tmp_path / "whole", *schedule, "--max-steps", "40")) == 0
    halves = arguments(data, tmp_path / "halves", *schedule, "--resume", "auto")
    assert train_extractor.main([*halves, "--max-steps", "20"]) == 0
    assert contents(tmp_path / "halves" / "last.safetensors")[1]["batch"] == 20 % 6 != 0
    torch.manual_seed(12345)  # the state of the generator comes from the checkpoint
    assert train_extractor.main([*halves, "--max-steps", "40"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert contents(tmp_path / "whole" / "last.safetensors")[1]["stage"] == 2


def test_training_learns_and_its_extractor_answers(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = "--epochs 20 --switch-epoch 18 --lr 0.006 --ema-decay 0.8 --eval-every 5 --preset reduced".split()
    assert train_extractor.main(arguments(data, tmp_path, *schedule, "--swap", "0.2", "--dtype", "bf16")) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["f1"] > 0.7 and f"F1 {scores['f1']:.4f}" in printed
    best = max(float(row["score"]) for row in log.read(tmp_path / "log.csv") if row["score"])
    assert scores["f1"] == pytest.approx(best, abs=1e-4)
    assert extractor.main([str(tmp_path), "赵先生生于京城", "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["sentence"] == "赵先生生于京城"


def test_loss_that_is_not_finite_stops_with_its_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = train_extractor.extractor_loss, []

    def loss(*args: object) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 9 else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(train_extractor, "extractor_loss", loss)
    assert train_extractor.main(arguments(data, tmp_path, "--preset", "reduced")) == 3
    assert "step 9: the loss is nan" in capsys.readouterr().err
    assert contents(tmp_path / "last.safetensors")[1]["step"] == 6


def test_sample_run_without_a_terminal(tmp_path: Path) -> None:
    """The README's command, cut short: no carriage returns, and less than a line a second."""
    short = "--max-steps 6 --log-seconds 1 --char-size 16 --threads 1 --holdout 0.02".split()
    command = [sys.executable, str(SCRIPT), "--sample", "--out", str(tmp_path), *short]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr + done.stdout
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert len(steps) <= seconds and "sentences to train on" in done.stderr
    assert "the extractor is in" in done.stdout


# --- mistakes ---


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        assert train_extractor.main(argv) == 2
    except SystemExit as end:
        assert end.code == 2
    return capsys.readouterr().err


def test_mistakes_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert "data: expected either --data FILE or --sample" in refused([], capsys)
    assert "dev: expected none with --sample" in refused(["--sample", "--dev", "x"], capsys)
    assert "swap: expected 0 <= swap <= 1, got 2.0" in refused(["--sample", "--swap", "2"], capsys)
    assert "ema_decay: expected 0 <= ema_decay < 1, got 1.0" in refused(["--sample", "--ema-decay", "1"], capsys)
    assert "batch_size: expected 1 or more, got 0" in refused(["--sample", "--batch-size", "0"], capsys)
    assert "nowhere.json: there is no such file" in refused(arguments(tmp_path / "nowhere.json", out), capsys)
    message = refused(arguments(data, out, "--word-vectors", "typo"), capsys)
    assert "--word-vectors: expected none, jieba, skip-gram or a file, got typo" in message
    assert train_extractor.main(arguments(data, out, "--max-steps", "1", "--preset", "reduced")) == 0
    assert "holds a run already" in refused(arguments(data, out, "--preset", "reduced"), capsys)
    message = refused(arguments(data, out, "--resume", "auto"), capsys)
    assert "preset: 'reduced', now 'full'" in message

"""The training example of the reader of 2018: targets, augmentation, resuming, learning, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_reader_2018
from reader_data import Passage, Record
from train_reader_2018 import ReaderTrainer, TrainConfig, encode, places, word_spans

from kit import log
from kit.run import Run
from kit.training import COLUMNS
from pykernels.models import DGCNNReader2018, DGCNNReader2018Config, reader
from pykernels.models.reader_2018 import Reader2018
from pykernels.models.word_vectors import WordVectors
from tests.runs import assert_same_run, contents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions, each with two passages, of which one says the answer twice."""
    entries = []
    for name in "赵钱孙李周吴郑王冯陈":
        for place in ("北京", "上海", "天津", "重庆", "广州", "杭州"):
            passages = [
                {"passage": f"{name}先生住在{place}，{place}很大。", "answer": place},
                {"passage": f"{name}先生不在这里，天气很好。", "answer": ""},
            ]
            entries.append({"question": f"{name}先生住在哪里？{place[0]}", "answers": [place], "passages": passages})
    path = tmp_path_factory.mktemp("data") / "webqa.json"
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    # 48 questions to train on, 8 a step: 6 steps an epoch.
    small = "--channels 16 --word-vectors jieba --batch-size 8 --threads 1 --quiet"
    return ["--data", str(data), "--out", str(out), *small.split(), *more]


# --- targets and augmentation ---


def reader_of(*words: str) -> Reader2018:
    vectors = WordVectors(list(words), torch.ones(len(words), 6))
    return Reader2018(DGCNNReader2018(DGCNNReader2018Config(word_size=6, channels=8)), vectors)


def test_targets_are_the_words_that_the_answer_lies_in() -> None:
    r = reader_of("白云山", "海拔")
    words = r.encode("白云山海拔３８２米，海82")
    assert words.tokens == ("白云山", "海拔", "3", "8", "2", "米", ",", "海", "8", "2")
    assert word_spans(words, "３８２米") == ((2, 5),)
    assert word_spans(words, "82") == ((3, 4), (8, 9))
    assert word_spans(words, "海") == ((1, 1), (7, 7))
    assert word_spans(words, "") == word_spans(words, "高") == ()


def test_parts_of_a_repeated_passage_go_on_at_its_beginning() -> None:
    assert places(5, 3, 0.0, np.random.default_rng(0)).tolist() == [0, 1, 2]
    assert places(0, 3, 0.9, np.random.default_rng(0)).tolist() == []
    seen = [places(5, 8, 0.999, np.random.default_rng(seed)).tolist() for seed in range(200)]
    for part in seen:
        assert 3 <= len(part) <= 8 and all(b == (a + 1) % 5 for a, b in zip(part, part[1:], strict=False))
    assert {part[0] for part in seen} == set(range(5)) and {len(part) for part in seen} == {3, 4, 5, 6, 7, 8}


def test_examples_drop_words_and_some_of_several_answers(tmp_path: Path) -> None:
    record = Record("住在哪里", (Passage("他住在北京，北京很大", "北京"),), ("北京",), "s")
    r = reader_of("他", "北京")
    options = {"drop_words": 0.3, "drop_answers": 0.4, "repeat": 0.5}
    config = TrainConfig(data=("x",), **options)
    trainer = ReaderTrainer(config, r, encode(r, [record]), [], Run(tmp_path, config, "no", COLUMNS))
    (item,) = trainer.items
    assert item.passages[0].tokens[3:6] == ("北京", ",", "北京") and item.targets[0] == ((3, 3), (5, 5))
    counts, dropped, repeated = [], 0, 0
    for seed in range(300):
        pair, marks = trainer.example(0, np.random.default_rng(seed))
        n = len(pair.passage)
        assert pair.features.shape == (n, 8) and marks.shape == (2, n)
        # What is marked is the answer: its row of the vectors, or 0 where the word was dropped.
        at = marks[0].nonzero().flatten()
        assert torch.equal(marks[0], marks[1]) and set(pair.passage[at].tolist()) <= {0, 2}
        if torch.equal(pair.features, item.pairs[0].features):
            counts.append(len(at))
            dropped += int((pair.passage[[0, 3, 5]] == 0).sum())
        else:
            repeated += 1
    assert set(counts) == {1, 2} and 0.1 < counts.count(1) / len(counts) < 0.8
    assert 0.2 < dropped / (3 * len(counts)) < 0.4 and repeated > 50


# --- training ---


def test_resumed_run_is_bitwise_the_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    """40 steps and 20 + 20, stopped in the middle of an epoch; the second stage begins after 30 steps."""
    schedule = ["--epochs", "9", "--switch-epoch", "5", "--eval-every", "5"]
    assert train_reader_2018.main(arguments(data, tmp_path / "whole", *schedule, "--max-steps", "40")) == 0
    halves = arguments(data, tmp_path / "halves", *schedule, "--resume", "auto")
    assert train_reader_2018.main([*halves, "--max-steps", "20"]) == 0
    torch.manual_seed(12345)  # the state of the generator comes from the checkpoint
    assert train_reader_2018.main([*halves, "--max-steps", "40"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    progress = contents(tmp_path / "whole" / "last.safetensors")[1]
    assert progress["stage"] == 2 and progress["step"] == 40


def test_training_learns_and_its_reader_answers(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = "--epochs 8 --switch-epoch 6 --lr 0.01 --eval-every 2 --dtype bf16 --word-vectors skip-gram".split()
    assert train_reader_2018.main(arguments(data, tmp_path, *schedule)) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["score"] > 0.8 and f"mean {scores['score']:.4f}" in printed
    rows = log.read(tmp_path / "log.csv")
    assert scores["score"] == pytest.approx(max(float(row["score"]) for row in rows if row["score"]), abs=1e-4)
    assert [row["epoch"] for row in rows if row["score"]] == ["2", "4", "6", "8"]
    assert reader.main([str(tmp_path), "赵先生住在哪里？北", "--passage", "赵先生住在北京，北京很大。"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"]


def test_without_averaging_the_kept_weights_are_those_of_the_last_step(data: Path, tmp_path: Path) -> None:
    assert train_reader_2018.main(arguments(data, tmp_path, "--max-steps", "3")) == 0
    tensors, _ = contents(tmp_path / "last.safetensors")
    names = [name.removeprefix("module.model.") for name in tensors if name.startswith("module.model.")]
    assert names
    for name in names:
        assert torch.equal(tensors[f"module.model.{name}"], tensors[f"module.ema.module.{name}"]), name


def test_mistakes_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        try:
            assert train_reader_2018.main(argv) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    assert "data: expected either --data FILE or --sample" in refused()
    assert "drop_words: expected 0 <= drop_words < 1, got 1.0" in refused("--sample", "--drop-words", "1")
    assert "nowhere.json: there is no such file" in refused(*arguments(tmp_path / "nowhere.json", tmp_path / "run"))
    message = refused(*arguments(data, tmp_path / "run", "--word-vectors", "typo"))
    assert "--word-vectors: expected skip-gram, jieba or a file, got typo" in message

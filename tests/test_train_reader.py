"""The training example: resuming, being killed, progress, log, configuration, and what it says of mistakes."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import plot
import pytest
import torch
import train_reader
from safetensors import safe_open

from kit import log
from kit.config import differences, option, parse
from kit.progress import Progress
from kit.training import Trainer
from pykernels.models.reader import Reader
from tests.runs import assert_same_run, contents

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_reader.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions, a name each: "<name>住在<place>。" """
    names, places = "赵钱孙李周吴郑王冯陈", "京沪津渝粤浙"
    entries = []
    for name in names:
        for place in places:
            passages = [
                {"passage": f"{name}先生住在{place}城，很高兴。", "answer": place},
                {"passage": f"{name}先生不在这里，天气很好。", "answer": ""},
            ]
            entries.append({"question": f"{name}先生住在哪里？{place}", "answers": [place], "passages": passages})
    path = tmp_path_factory.mktemp("data") / "webqa.json"
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    # 48 questions to train on, 8 a step: 6 steps an epoch.
    small = "--char-size 8 --batch-size 8 --word-vectors none --min-count 1 --threads 1 --quiet"
    return ["--data", str(data), "--out", str(out), *small.split(), *more]


def test_resumed_run_is_bitwise_the_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    """100 steps and 50 + 50, stopped in the middle of an epoch; the second stage begins after 60 steps."""
    schedule = ["--epochs", "40", "--switch-epoch", "10", "--eval-every", "5"]
    assert train_reader.main(arguments(data, tmp_path / "whole", *schedule, "--max-steps", "100")) == 0
    halves = arguments(data, tmp_path / "halves", *schedule, "--resume", "auto")
    assert train_reader.main([*halves, "--max-steps", "50"]) == 0
    assert contents(tmp_path / "halves" / "last.safetensors")[1]["batch"] == 50 % 6 != 0
    torch.manual_seed(12345)  # the state of the generator comes from the checkpoint
    assert train_reader.main([*halves, "--max-steps", "100"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    progress = contents(tmp_path / "whole" / "last.safetensors")[1]
    assert progress["stage"] == 2 and progress["step"] == 100
    with safe_open(tmp_path / "whole" / "last.safetensors", "pt") as file:
        assert file.get_tensor("optimizer.0.step").item() == 40, "the second stage counts its steps anew"


def test_killed_run_goes_on_from_its_last_checkpoint(data: Path, tmp_path: Path) -> None:
    """SIGKILL while a checkpoint is written at every step; the same 40 steps come out."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(SCRIPT), *arguments(data, killed, "--epochs", "9999", "--save-every", "1")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "last.safetensors").exists():
            # safetensors opens a path twice, and the file is replaced all the time.
            if contents(Path(shutil.copy(killed / "last.safetensors", tmp_path / "seen")))[1]["step"] >= 8:
                break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    reached = contents(killed / "last.safetensors")[1]["step"]
    steps = str(reached + 20)
    (killed / ".last.safetensors.1").write_bytes(b"what a killed process was writing")
    again = arguments(data, killed, "--epochs", "9999", "--max-steps", steps, "--resume", "auto")
    assert train_reader.main(again) == 0
    assert not list(killed.glob(".last*"))
    assert train_reader.main(arguments(data, whole, "--epochs", "9999", "--max-steps", steps)) == 0
    assert_same_run(killed, whole)


def test_signal_ends_a_run_after_a_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.step

    def step(self: Trainer, chosen: list[int]) -> float:
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, chosen)

    monkeypatch.setattr(Trainer, "step", step)
    assert train_reader.main(arguments(data, tmp_path)) == 130
    assert contents(tmp_path / "last.safetensors")[1]["step"] == 5


def test_loss_that_is_not_finite_stops_with_its_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = train_reader.reader_loss, []

    def loss(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 9 else 1)

    monkeypatch.setattr(train_reader, "reader_loss", loss)
    assert train_reader.main(arguments(data, tmp_path)) == 3
    assert "step 9: the loss is nan" in capsys.readouterr().err
    tensors, progress = contents(tmp_path / "last.safetensors")
    assert progress["step"] == 6 and all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_nothing_held_out(data: Path, tmp_path: Path) -> None:
    """The second stage starts on time from the averaged weights, and those of the end are the reader."""
    schedule = ["--holdout", "0", "--epochs", "3", "--switch-epoch", "2"]
    assert train_reader.main(arguments(data, tmp_path, *schedule)) == 0
    tensors, progress = contents(tmp_path / "last.safetensors")
    assert (progress["stage"], progress["epoch"], progress["best"]) == (2, 3, 0)
    weight = Reader.load(tmp_path).model.join.weight
    assert torch.equal(weight, tensors["module.ema.module.join.weight"])
    assert json.loads((tmp_path / "scores.json").read_text()) == {}


def test_backends_have_the_same_curve(data: Path, tmp_path: Path) -> None:
    curves = []
    for backend in ("auto", "reference"):
        out = tmp_path / backend
        assert train_reader.main(arguments(data, out, "--max-steps", "30", "--backend", backend)) == 0
        curves.append([float(row["loss"]) for row in log.read(out / "log.csv") if row["loss"]])
    assert len(curves[0]) == 30 and curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_training_learns_and_its_reader_answers(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "--epochs 30 --switch-epoch 25 --lr 0.01 --ema-decay 0.9 --dropout 0 --eval-every 10".split()
    assert train_reader.main(arguments(data, tmp_path, *schedule, "--eval-data", str(data), "--dtype", "bf16")) == 0
    rows = log.read(tmp_path / "log.csv")
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(losses) == 180 and sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert [row["epoch"] for row in rows if row["score"]] == ["10", "20", "25", "30"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"held out", str(data)}
    best = max(float(row["score"]) for row in rows if row["score"])
    assert (
        scores["held out"]["score"] == pytest.approx(best, abs=1e-4) and f"mean {best:.4f}" in capsys.readouterr().out
    )
    assert Reader.load(tmp_path).predict("赵先生住在哪里？京", ["赵先生住在京城，很高兴。"]).text

    picture = tmp_path / "curves.png"
    assert plot.main([str(tmp_path), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(tmp_path / "none"), "-o", str(picture)]) == 2


# --- progress ---


def test_sample_run_without_a_terminal(tmp_path: Path) -> None:
    """The README's command, cut short: no carriage returns, and less than a line a second."""
    short = "--max-steps 6 --log-seconds 1 --char-size 16 --threads 1 --holdout 0.01".split()
    command = [sys.executable, str(SCRIPT), "--sample", "--out", str(tmp_path), *short]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr + done.stdout
    lines = done.stderr.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) <= seconds and any("questions to train on" in line for line in lines)
    assert "the reader is in" in done.stdout and (tmp_path / "words.safetensors").exists()


def test_plain_lines_tell_elapsed_and_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, 2, every=1.0) as progress:
        progress.step("loss 3")
        progress.shown -= 2
        progress.step("loss 2")
        progress.step("loss 1")
        progress.say("a line")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1] == "a line"
    assert re.fullmatch(r"step 4/10 \[\d\d:\d\d elapsed, \d\d:\d\d left\] loss 2", lines[0]), lines


def test_remaining_time_counts_what_is_still_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """What an earlier run made took no time in this one."""
    with Progress(10, every=1.0) as progress:
        progress.skip(5)
        progress.extend(4)
        progress.begun -= 10
        progress.shown -= 12
        progress.step("one more")
    assert capsys.readouterr().err == "step 6/14 [00:10 elapsed, 01:20 left] one more\n"


def test_terminal_gets_a_bar() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        with Progress(8, stream=terminal) as progress:
            progress.extend(4)
            progress.skip(2)
            progress.step("loss 3")
            progress.at("evaluating")
    written = b""
    try:
        while chunk := os.read(master, 65536):
            written += chunk
    except OSError:
        pass  # how Linux tells that the other side is closed
    os.close(master)
    text = written.decode()
    assert "\r" in text and re.search(r"3/12 \[\d\d:\d\d<\d\d:\d\d,", text), text


# --- log ---


def test_log_drops_later_rows_and_half_a_row(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = log.Log(path, ["step", "loss"])
    for step in (1, 2, 3):
        rows.add(step=step, loss=step / 3)
    rows.flush()
    with open(path, "a") as file:
        file.write("4")  # the end of a killed process
    rows.cut(2)
    assert rows.rows == 2
    rows.add(step=3, loss=0.5)
    rows.flush()
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["1", "0.333333"], ["2", "0.666667"], ["3", "0.5"]]
    with pytest.raises(ValueError, match="log: no column speed"):
        rows.add(step=1, speed=2)


# --- configuration ---


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that ends with status 2 says."""
    try:
        assert train_reader.main(argv) == 2
    except SystemExit as end:
        assert end.code == 2
    return capsys.readouterr().err


def test_mistakes_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    broken = tmp_path / "broken.json"
    broken.write_text('{"data": [')
    out = tmp_path / "run"

    def with_config(text: str) -> str:
        config.write_text(text)
        return refused(["--config", str(config)], capsys)

    assert "unknown option 'epoch'; did you mean 'epochs'?" in with_config('{"epoch": 3}')
    assert 'epochs: expected int, got "3"' in with_config('{"epochs": "3"}')
    assert "dtype: expected one of fp32, bf16, got fp8" in with_config('{"dtype": "fp8"}')
    assert "config.json: no JSON: line 1" in with_config("{")
    assert "data: expected either --data FILE or --sample" in refused([], capsys)
    assert "unrecognized arguments: --epoch" in refused(["--sample", "--epoch", "3"], capsys)
    assert "dropout: expected 0 <= dropout < 1, got 1.5" in refused(["--sample", "--dropout", "1.5"], capsys)
    assert "nowhere.json: there is no such file" in refused(arguments(tmp_path / "nowhere.json", out), capsys)
    assert "broken.json: no JSON: line 1, column 11" in refused(arguments(broken, out), capsys)
    message = refused(arguments(data, out, "--word-vectors", "typo"), capsys)
    assert "--word-vectors: expected none, jieba, skip-gram or a file, got typo" in message
    assert "cannot be written to" in refused(arguments(data, broken / "below"), capsys)


def test_run_folder_is_neither_overwritten_nor_mixed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_reader.main(arguments(data, tmp_path, "--max-steps", "2")) == 0
    before = (tmp_path / "last.safetensors").read_bytes()
    assert "holds a run already: give --resume auto" in refused(arguments(data, tmp_path), capsys)
    message = refused(arguments(data, tmp_path, "--resume", "auto", "--seed", "2"), capsys)
    assert "was begun with other options: seed: 1, now 2" in message
    assert (tmp_path / "last.safetensors").read_bytes() == before

    (tmp_path / "last.safetensors").write_bytes(before[:100])
    assert "last.safetensors: no checkpoint" in refused(arguments(data, tmp_path, "--resume", "auto"), capsys)


def test_saved_configuration_is_the_effective_one_and_can_be_given_back(data: Path, tmp_path: Path) -> None:
    assert train_reader.main(arguments(data, tmp_path / "a", "--max-steps", "1", "--lr", "0.5")) == 0
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored["lr"] == 0.5 and stored["dtype"] == "fp32" and stored["data"] == [str(data)]
    versions = json.loads((tmp_path / "a" / "versions.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__
    again = ["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")]
    assert train_reader.main(again) == 0
    a, b = contents(tmp_path / "a" / "last.safetensors"), contents(tmp_path / "b" / "last.safetensors")
    assert all(torch.equal(t, b[0][name]) for name, t in a[0].items()), "one seed, one result"


def test_presets_stand_between_defaults_and_what_is_given(tmp_path: Path) -> None:
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Config:
        size: int = option(1, "")
        rate: float | None = option(None, "", may_change=True)
        small: bool = option(False, "")
        names: tuple[str, ...] = option((), "")

    def of(*argv: str) -> Config:
        return parse(Config, argv, description="", epilog="", presets={"small": {"size": 2, "rate": 0.5}})

    file = tmp_path / "c.json"
    file.write_text('{"rate": 1, "names": ["a"]}')
    assert of() == Config()
    assert of("--small") == Config(2, 0.5, True)
    assert of("--small", "--config", str(file)) == Config(2, 1.0, True, ("a",))
    assert of("--config", str(file), "--rate", "3", "--names", "b", "c") == Config(1, 3.0, False, ("b", "c"))
    assert differences(Config(3, 2.0), {"size": 1, "rate": 9, "small": False, "names": []}) == ["size: 1, now 3"]


def test_averaged_weights(data: Path, tmp_path: Path) -> None:
    """The average starts as the first step's weights, and follows with decay min(0.5, (1 + n) / (10 + n))."""
    seen, kept = [], {}
    real = Trainer.step

    def step(self: Trainer, chosen: list[int]) -> float:
        value = real(self, chosen)
        seen.append(self.model.join.weight.detach().double().clone())
        kept["ema"] = self.ema.module.join.weight.detach().clone()
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert train_reader.main(arguments(data, tmp_path, "--max-steps", "14", "--ema-decay", "0.5")) == 0
    average = seen[0]
    for n, weight in enumerate(seen[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(kept["ema"].double(), average, atol=1e-6)

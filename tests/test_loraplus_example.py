"""The LoRA+ example: the toy problem's gradient descent, the choice of rates, the table, and runs that go on."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loraplus
import loraplus_toy
import numpy as np
import pytest
import torch
from loraplus import PlusConfig, Weights, steps_to, table, train_one
from sentence_classifier import HEAD, Fit, Pretrained, Sentences
from torch import nn

from kit.progress import Progress
from kit.training import Diverged

pytest.importorskip("transformers", reason="transformers is not installed")


def arguments(task: Path, bert: Path, out: Path, *more: str) -> list[str]:
    known = ["--data", str(task), "--encoder", str(bert), "--out", str(out), "--max-length", "24", "--threads", "1"]
    return [*known, "--quiet", "--quick", *more]


# --- the toy problem ---


def test_toy_descent_is_the_formulas(backend: str) -> None:
    """In NumPy and float64, with the gradients of both factors written out."""
    lr_a, lr_b, steps = 2e-3, 1e-2, 12
    model, (x, y) = loraplus_toy.Toy(3), loraplus_toy.samples(3)
    w_in, w_out = model.w_in.double().numpy(), model.w_out.double().numpy()
    a, b = (p.detach().double().numpy() for p in (model.middle.lora_a, model.middle.lora_b))
    assert (w_in.shape, a.shape, b.shape, w_out.shape) == ((100, 5), (4, 100), (100, 4), (100,))
    assert abs(b.std() - 1) < 0.15 and abs(a.std() - 0.1) < 0.015 and abs(w_out.std() - 0.1) < 0.03
    xs, ys = x.double().numpy(), y.double().numpy()
    h, wanted = np.maximum(xs @ w_in.T, 0), []
    for step in range(steps + 1):
        s = h @ a.T
        z = s @ b.T
        error = np.maximum(z, 0) @ w_out - ys
        wanted.append((error[:1000] ** 2).mean())
        if step == steps:
            break
        dz = (2 * error / 1000)[:1000, None] * w_out * (z[:1000] > 0)
        da, db = (dz @ b).T @ h[:1000], dz.T @ s[:1000]
        a, b = a - lr_a * da, b - lr_b * db
    got = loraplus_toy.descend(lr_a, lr_b, steps, 3, backend)
    assert got["train"] == pytest.approx(wanted, rel=1e-3)
    assert got["test"] == pytest.approx((error[1000:] ** 2).mean(), rel=1e-3)
    np.testing.assert_allclose(ys, np.sin(xs.mean(1)), rtol=1e-6, atol=1e-7)
    assert wanted[-1] < 0.2 * wanted[0]


def test_rates_that_are_too_large_diverge() -> None:
    for rates in ((2.0, 2.0**-10), (2.0**-14, 16.0)):
        run = loraplus_toy.descend(*rates, 50, 1)
        assert run["test"] is None and len(run["train"]) < 50 and all(map(math.isfinite, run["train"]))
        assert loraplus_toy.final([run]) == math.inf


def run_of(*losses: float, test: float | None = 0.0) -> dict[str, Any]:
    return {"train": list(losses), "test": test}


def test_report_of_the_grid() -> None:
    grid: loraplus_toy.Grid = {
        (-4, -4): [run_of(3, 0.4, test=0.5), run_of(3, 0.2, test=0.3)],
        (-3, -3): [run_of(3, 0.1, test=0.1), run_of(3, test=None)],  # one seed diverged
        (-4, -2): [run_of(3, 0.1, test=0.2), run_of(3, 0.2, test=0.2)],
        (-6, -4): [run_of(3, 0.9, test=0.9), run_of(3, 0.9, test=0.9)],
        (-3, -8): [run_of(3, 0.1, test=0.1), run_of(3, 0.1, test=0.1)],
    }
    assert loraplus_toy.best_of_ratio(grid, 0) == (-4, -4) and loraplus_toy.best_of_ratio(grid, 1) is None
    lines = [line.split() for line in loraplus_toy.report(grid).splitlines()]
    assert lines[0][:6] == "toy problem: means of 2 seeds".split()
    assert lines[2:5] == [
        ["2^0", "2^-4", "2^-4", "0.3000", "0.4000"],
        ["2^2", "2^-4", "2^-2", "0.1500", "0.2000"],
        ["best:", "2^-5", "2^-3", "2^-8", "0.1000", "0.1000"],
    ]
    assert lines[5][-4:] == ["a", "2^-3,", "b", "2^-2"]


# --- the encoder ---


def test_ratio_sets_the_rates_about_their_mean(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    config = PlusConfig(data="x", targets=("query", "value"), steps=4, batch_size=8)
    for ratio in (1.0, 16.0):
        fit = train_one(config, pretrained, parts, ratio, 1e-2, 1)
        names = {id(p): name for name, p in fit.model.named_parameters()}
        rates = {names[id(p)]: group["lr"] for group in fit.optimizer.param_groups for p in group["params"]}
        assert {name.rpartition(".")[2] for name in rates} == {"lora_a", "lora_b", "weight", "bias"}
        for name, rate in rates.items():
            output_side = name.endswith(("lora_b", f"{HEAD}.bias"))
            assert rate == pytest.approx(1e-2 * math.sqrt(ratio) ** (1 if output_side else -1)), name


def test_ratio_one_is_plain_adamw(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    fit = train_one(PlusConfig(data="x", steps=4, batch_size=8), pretrained, parts, 1.0, 1e-2, 1)
    twin = train_one(PlusConfig(data="x", steps=4, batch_size=8), pretrained, parts, 1.0, 1e-2, 1)

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)

    twin = Fit(twin.model, plain, parts["train"], twin.plan)
    losses = [[one.step() for _ in range(4)] for one in (fit, twin)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


def test_best_rate_goes_on_where_the_best_is_at_the_end() -> None:
    def chosen(optimum: float, widen: int, diverging: float = math.inf) -> tuple[float, list[float]]:
        tried: list[float] = []

        def result(ratio: float, rate: float, seed: int) -> dict[str, Any]:
            tried.append(rate)
            if rate > diverging:
                return {"diverged": "step 3"}
            return {"val": {"loss": abs(math.log2(rate / optimum))}}

        config = PlusConfig(data="x", rates=(1.0, 2.0, 4.0), widen=widen)
        with Progress(3 * config.steps, quiet=True) as progress:
            weights: Any = SimpleNamespace(config=config, result=result, progress=progress)
            best = Weights.best_rate(weights, 4.0)
        assert progress.total == len(tried) * config.steps
        return best, tried

    assert chosen(2.0, 3) == (2.0, [1.0, 2.0, 4.0])
    assert chosen(16.0, 9) == (16.0, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert chosen(16.0, 1) == (8.0, [1.0, 2.0, 4.0, 8.0])
    assert chosen(0.5, 9) == (0.5, [1.0, 2.0, 4.0, 0.5, 0.25])
    assert chosen(16.0, 9, diverging=5.0) == (4.0, [1.0, 2.0, 4.0, 8.0])


def test_table() -> None:
    config = PlusConfig(data="x", steps=100, seeds=2)

    def run(end: float, matthews: float) -> dict[str, Any]:
        losses = np.linspace(1, end, 100).tolist()
        return {"losses": losses, "val": {"loss": end}, "dev": {"accuracy": 0.75, "matthews": matthews}}

    found = {
        1.0: [run(0.5, 0.1), run(0.5, 0.2)],
        4.0: [run(0.1, 0.3), run(0.1, 0.3)],
        16.0: [run(0.1, 0.3), {"diverged": "step 3"}],
    }
    lines = table(config, {1.0: 1e-3, 4.0: 1e-3, 16.0: 1e-3}, found).splitlines()
    slow, fast = np.linspace(1, 0.5, 100), np.linspace(1, 0.1, 100)
    target = slow[50:].mean()
    faster = next(n for n in range(50, 101) if fast[n - 50 : n].mean() <= target)
    assert lines[2].split() == ["1", "0.001", "0.001", f"{target:.4f}", "+-", "0.0000", "100"] + (
        "0.5000 +- 0.0000 0.7500 +- 0.0000 0.1500 +- 0.0707".split()
    )
    assert lines[3].split()[1:3] == ["0.0005", "0.002"] and lines[3].split()[6] == str(faster) != "100"
    assert lines[4].endswith("1 of 2 runs diverged")
    assert steps_to([1.0] * 90, 0.5) is None and steps_to([0.1] * 90, 0.5) == 50, "a mean of 50 from the first on"
    dips = [0.1] * 60 + [1.0] * 60 + [0.1] * 60
    assert steps_to(dips, 0.5) == 120 + 28, "the mean of 50 holds at most 22 of the high ones"
    assert steps_to(dips[:120], 0.5) is None


# --- the whole ---


def test_the_whole_and_its_resumption(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = arguments(task, bert, tmp_path / "run")
    assert loraplus.main(quick) == 0
    printed = capsys.readouterr().out
    assert "the best pair of each ratio" in printed and "dev.tsv: 2 seeds" in printed
    for picture in ("toy.png", "encoder.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 1000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    runs = [name.partition(": ")[2] for name in results if "ratio" in name]
    assert runs == [f"ratio {ratio}, rate 0.001, seed {seed}" for seed in (1, 2) for ratio in (1, 16)]
    assert loraplus.main(quick) == 2
    assert "holds a run already: give --resume auto" in capsys.readouterr().err

    made, step = [], Fit.step
    monkeypatch.setattr(Fit, "step", lambda self: (made.append(self.plan.seed), step(self))[1])
    assert loraplus.main([*quick, "--resume", "auto"]) == 0
    assert capsys.readouterr().out == printed and not made
    assert loraplus.main([*quick, "--resume", "auto", "--seeds", "3"]) == 0
    assert made == [3] * 12 and "dev.tsv: 3 seeds" in capsys.readouterr().out, "the third alone was trained"


def test_the_encoder_learns_with_every_ratio(task: Path, bert: Path, tmp_path: Path) -> None:
    """32 sentences by heart."""
    longer = ["--toy-seeds", "0", "--seeds", "1", "--steps", "70", "--limit", "32", "--alpha", "32"]
    longer += ["--rates", "0.003", "--ratios", "1", "2"]
    assert loraplus.main(arguments(task, bert, tmp_path, *longer)) == 0
    for name, run in json.loads((tmp_path / "results.json").read_text()).items():
        assert np.mean(run["losses"][-10:]) < 0.4 < 0.6 < np.mean(run["losses"][:10]), name


def test_runs_that_diverge_are_told(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Fit.step

    def diverging(self: Fit) -> float:
        if self.optimizer.param_groups[2]["initial_lr"] > 2e-3:
            raise Diverged("step 1: the loss is nan")
        return step(self)

    monkeypatch.setattr(Fit, "step", diverging)
    assert loraplus.main(arguments(task, bert, tmp_path, "--toy-seeds", "0")) == 0
    assert "2 of 2 runs diverged" in capsys.readouterr().out
    assert (tmp_path / "encoder.png").exists()


def test_a_signal_keeps_what_is_finished(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step = [], Fit.step

    def signalled(self: Fit) -> float:
        made.append(1)
        if len(made) == 9:  # a run takes 6
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Fit, "step", signalled)
    argv = arguments(task, bert, tmp_path, "--toy-seeds", "0")
    assert loraplus.main(argv) == 130
    assert "--resume auto goes on after the runs that are finished" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1
    assert loraplus.main([*argv, "--resume", "auto"]) == 0
    assert len(made) == 9 + 3 * 6


def test_the_toy_alone_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loraplus.main(["--quick", "--out", str(tmp_path), "--quiet"]) == 0
    assert "toy.png are in" in capsys.readouterr().out and not (tmp_path / "encoder.png").exists()


def test_mistakes_are_told(task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        try:
            assert loraplus.main(argv) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    assert "data: expected a folder with train.tsv and dev.tsv where --toy-seeds is 0" in refused("--toy-seeds", "0")
    assert "ratios: expected each once, and 1 among them, got (4.0, 2.0)" in refused("--ratios", "4", "2")
    assert "rates: expected numbers > 0, got (0.0,)" in refused("--rates", "0")
    assert "steps: expected 1 or more, got 0" in refused("--steps", "0")
    out = ["--toy-seeds", "0"]
    assert "there is no such folder" in refused(*arguments(task, tmp_path / "nowhere", tmp_path / "a", *out))
    assert "train.tsv: cannot be read" in refused(*arguments(tmp_path, bert, tmp_path / "b", *out))
    (tmp_path / "b" / "results.json").write_text("{")
    assert "results.json: no JSON: " in refused(*arguments(tmp_path, bert, tmp_path / "b", *out, "--resume", "auto"))

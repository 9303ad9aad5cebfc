"""The generative example: data, scores, runs that go on, the fairness of the comparison, and what it refuses."""

from __future__ import annotations

import gzip
import json
import math
import signal
from pathlib import Path
from typing import Any

import generative_data
import matplotlib.image
import numpy as np
import pytest
import torch
import train_generative
from generative_plots import save_grid
from generative_scores import frechet_distance, modes
from safetensors import safe_open
from train_generative import TrainConfig, Training

from kit import log
from pykernels.models import load_generative


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 + 20 images of each of ten "digits": a bright square in one of ten places, over noise."""
    random = np.random.default_rng(0)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(10 * count) % 10
        x = random.integers(0, 60, (len(labels), 28, 28))
        for image, k in zip(x, labels, strict=True):
            image[4 + 10 * (k // 5) :, 1 + 5 * (k % 5) :][:8, :5] = 250
        return x.astype(np.uint8), labels.astype(np.uint8)

    folder = tmp_path_factory.mktemp("mnist")
    (x_train, y_train), (x_test, y_test) = images(40), images(20)
    np.savez(folder / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    small = "--batch-size 20 --epochs 2 --width 4 --layers 2 --latent 8 --samples 100 --threads 1 --quiet"
    return ["--data", str(data), "--out", str(out), *small.split(), *more]


# --- data and scores ---


def test_both_forms_of_the_data_are_read_alike(data: Path, tmp_path: Path) -> None:
    expected = generative_data.load(data)
    assert expected.train.shape == (400, 28, 28) and expected.train.dtype == torch.uint8
    names = "train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images.idx3-ubyte t10k-labels.idx1-ubyte.gz"
    for name, t in zip(names.split(), expected, strict=True):
        sizes = np.array(t.shape, ">i4").tobytes()
        content = bytes([0, 0, 8, t.dim()]) + sizes + t.to(torch.uint8).numpy().tobytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for a, b in zip(generative_data.load(tmp_path), expected, strict=True):
        assert torch.equal(a, b)
    for model in ("vae", "gan"):
        for networks, shape in (("image", (400, 1, 28, 28)), ("sequence", (400, 28, 28))):
            x = generative_data.as_input(expected.train, model, networks)
            assert x.shape == shape and x.min() == (0 if model == "vae" else -1) and x.max() <= 1
            assert torch.allclose(generative_data.as_images(x, model), expected.train / 255, atol=1e-6)


def test_frechet_distance_of_normal_features() -> None:
    """Diagonal covariances have the sum over features of squared differences of means and of deviations."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(100, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def shaped(t: torch.Tensor, mean: list[float], deviation: list[float]) -> torch.Tensor:
        """With exactly that mean and a diagonal covariance."""
        t = t - t.mean(0)
        white = t @ torch.linalg.inv(torch.linalg.cholesky(t.T.cov())).T
        return white * torch.tensor(deviation, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)

    x, y = shaped(a, [0, 1, 2, 3], [1, 2, 3, 0]), shaped(b, [0, 1, 4, 3], [3, 2, 1, 0.5])
    assert frechet_distance(x, y) == pytest.approx(4 + 4 + 0 + 4 + 0.25, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # A rotation of both changes nothing; general covariances against the product's eigenvalues.
    q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    # Less exactly: an eigenvalue of zero comes out as eps, and its root as sqrt(eps).
    assert frechet_distance(x @ q, y @ q) == pytest.approx(12.25, rel=1e-6)
    s, t = x @ q, y
    product = np.linalg.eigvals((s.T.cov() @ t.T.cov()).numpy())
    root = np.sqrt(np.clip(product.real, 0, None)).sum()
    general = (s.mean(0) - t.mean(0)).square().sum() + s.T.cov().trace() + t.T.cov().trace() - 2 * root
    assert frechet_distance(s, t) == pytest.approx(general.item(), rel=1e-6)


def test_modes_are_counted_where_the_classifier_is_sure() -> None:
    rows = torch.eye(10, dtype=torch.float64)
    assert modes(rows.repeat(20, 1)) == (10, pytest.approx(10))
    assert modes(rows[[3]].repeat(200, 1)) == (1, pytest.approx(1))
    count, effective = modes(torch.cat([rows[[1]].repeat(150, 1), rows[[2]].repeat(50, 1)]))
    assert count == 2 and effective == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    # Two of 200 are 1 %, one is not; and nobody is sure of an even spread.
    mixed = torch.cat([rows[[0]].repeat(197, 1), rows[[1]].repeat(2, 1), rows[[2]]])
    assert modes(mixed)[0] == 2 and modes(torch.full((50, 10), 0.1))[0] == 0


def test_grid_has_the_images_in_rows(tmp_path: Path) -> None:
    images = torch.arange(7.0).view(7, 1, 1).expand(7, 3, 2) / 10
    save_grid(images, tmp_path / "grid.png", columns=3)
    grid = matplotlib.image.imread(tmp_path / "grid.png")[..., 0]
    assert grid.shape == (6, 6)
    assert grid[1::3, ::2] == pytest.approx(np.array([[0, 0.1, 0.2], [0.3, 0.4, 0.5]]), abs=0.01)


# --- runs ---


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        progress.pop("seconds")
        return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118


def test_all_models_train_and_are_rated(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train_generative.main(arguments(data, out, "--dtype", "bf16")) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads((out / "results.json").read_text())
    assert list(results) == [f"{name}-1" for name in train_generative.MODELS]
    for name, result in results.items():
        model = name[:-2]
        (line,) = [line for line in lines if line.split()[:1] == [model]]
        assert [rating["step"] for rating in result["history"]] == [20, 40]
        assert f"{result['frechet']:.2f}" in line and 0 <= result["modes"] <= 10 and result["effective"] >= 1
        assert ("loss" in result, "error" in result) == (model == "vae", not model.startswith("gan"))
        grid = matplotlib.image.imread(out / name / "epoch-002.png")
        assert grid.shape[:2] == (280, 280) and grid.std() > 0
        rows = log.read(out / name / "log.csv")
        assert len(rows) == 42 and sum(bool(row["frechet"]) for row in rows) == 2
        loaded = load_generative(out / name / "model.safetensors")
        assert loaded.config.shape == (1, 28, 28) and loaded.sample(2).shape == (2, 1, 28, 28)
        assert (out / name / "reconstructions.png").exists() == (not model.startswith("gan"))
    assert results["gan-1"]["frechet"] != results["gan-plain-1"]["frechet"]
    assert (out / "scores.png").stat().st_size > 10_000
    # What is finished is not done again.
    before = (out / "gan-1" / "last.safetensors").stat().st_mtime_ns
    assert train_generative.main(arguments(data, out, "--dtype", "bf16", "--resume", "auto")) == 0
    assert (out / "gan-1" / "last.safetensors").stat().st_mtime_ns == before


def test_vae_of_rows_learns(data: Path, tmp_path: Path) -> None:
    schedule = "--models vae --networks sequence --epochs 10 --width 16 --vae-lr 0.01".split()
    assert train_generative.main(arguments(data, tmp_path, *schedule)) == 0
    losses = [float(row["loss"]) for row in log.read(tmp_path / "vae-1" / "log.csv") if row["loss"]]
    result = json.loads((tmp_path / "results.json").read_text())["vae-1"]
    digits = generative_data.load(data)
    of_mean = ((digits.test / 255 - (digits.train / 255).mean(0)) ** 2).mean().item()
    # An encoder that tells nothing of x comes as far as the mean image.
    assert result["loss"] < 0.75 * losses[0] and result["error"] < 0.95 * of_mean


@pytest.mark.parametrize("model", ["gan", "ali"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", model, "--critic-batches", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train_generative.main(arguments(data, whole, *options)) == 0
    of_step = Training._step

    def stopped(self: Training, *given: Any) -> None:
        of_step(self, *given)
        if self.step == 13:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", stopped)
        assert train_generative.main(arguments(data, halves, *options)) == 130
    assert "--resume auto goes on" in capsys.readouterr().err
    assert contents(halves / f"{model}-1" / "last.safetensors")[1]["step"] == 13
    assert train_generative.main(arguments(data, halves, *options)) == 2
    assert "holds a run already: give --resume auto" in capsys.readouterr().err
    torch.manual_seed(99)  # the state of the generator comes from the checkpoint
    assert train_generative.main(arguments(data, halves, *options, "--resume", "auto")) == 0
    (a, a_progress), (b, b_progress) = (contents(run / f"{model}-1" / "last.safetensors") for run in (whole, halves))
    assert a_progress == b_progress and a_progress["step"] == (20 if model == "gan" else 40) and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_comparison_differs_in_the_regulariser_alone(data: Path, tmp_path: Path) -> None:
    """With a weight of zero, gan and gan-plain are bitwise the same."""
    schedule = "--models gan gan-plain --seeds 2 --epochs 1 --regulariser 0 --no-batch-norm".split()
    assert train_generative.main(arguments(data, tmp_path, *schedule)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 4
    for seed in (1, 2):
        a, b = (contents(tmp_path / f"{name}-{seed}" / "last.safetensors")[0] for name in ("gan", "gan-plain"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert results[f"gan-{seed}"]["history"] == results[f"gan-plain-{seed}"]["history"]
    assert results["gan-1"]["frechet"] != results["gan-2"]["frechet"]


def test_mistakes_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str, status: int = 2) -> str:
        try:
            assert train_generative.main(argv) == status
        except SystemExit as end:
            assert end.code == status
        return capsys.readouterr().err

    assert "data: expected --data with the folder of MNIST" in refused()
    assert "beta1: expected 0 <= beta1 < 1, got 1.0" in refused("--data", "x", "--beta1", "1")
    assert "batch_size: expected 2 or more, got 1" in refused("--data", "x", "--batch-size", "1")
    message = refused("--data", str(tmp_path), "--out", str(tmp_path / "run"))
    assert "expected mnist.npz, or train-images-idx3-ubyte[.gz] and the three like it" in message
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((2, 28, 28)), y_train=np.zeros(2), x_test=np.zeros((1, 28, 28)))
    assert "mnist.npz: it lacks y_test" in refused("--data", str(tmp_path), "--out", str(tmp_path / "run"))
    three = {"y_train": np.zeros(3), "x_test": np.zeros((1, 28, 28)), "y_test": np.zeros(1)}
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((2, 28, 28)), **three)
    message = refused("--data", str(tmp_path), "--out", str(tmp_path / "run"))
    assert "x_train: expected [3, 28, 28], got [2, 28, 28]" in message
    few = "--models vae gan --limit 39 --critic-batches 2".split()
    message = refused(*arguments(data, tmp_path / "run", *few))
    assert "expected 40 images or more, as a step of gan takes, got 39: see --limit" in message
    diverging = arguments(data, tmp_path / "run", "--models", "vae", "--vae-lr", "1e30")
    assert "a lower --vae-lr may help" in refused(*diverging, status=3)


def test_the_schedule_of_steps() -> None:
    config = TrainConfig(data="x", batch_size=50, critic_batches=5, limit=1000)
    assert config.schedule("gan-plain", 60_000) == (5, 4) and config.schedule("vae", 60_000) == (1, 20)
    assert config.of_model("gan-plain").regulariser == 0 and config.of_model("gan").regulariser == 5

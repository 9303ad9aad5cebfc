"""Runs of examples/finetune.py on a small encoder, for its tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune
import pytest
from finetune import FinetuneConfig, Runs
from sentence_classifier import Fit
from torch import nn

from kit.processes import Processes
from kit.progress import Progress
from kit.stop import Stop


def arguments(task: Path, bert: Path, out: Path, *more: str) -> list[str]:
    known = ["--data", str(task), "--encoder", str(bert), "--out", str(out), "--max-length", "24", "--threads", "1"]
    return [*known, "--quiet", "--quick", *more]


def runs_of(task: Path, bert: Path, **options: Any) -> Runs:
    given = {"data": str(task), "encoder": str(bert), "max_length": 24, "steps": 6, "batch_size": 16, "limit": 64}
    config = FinetuneConfig(**{**given, "fisher_batches": 2, "mask_steps": 2, **options})
    return Runs(config, Processes(), {})


@contextlib.contextmanager
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[nn.Module, Fit]]]:
    """The model and the fit of each run."""
    made: list[tuple[nn.Module, Fit]] = []
    train = finetune.train_run

    def spied(options: Any, way: str, kind: str, fit: Fit, model: nn.Module, *more: Any) -> dict[str, Any]:
        made.append((model, fit))
        return train(options, way, kind, fit, model, *more)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_run", spied)
        yield made


def made(runs: Runs, way: str, kind: str) -> dict[str, Any]:
    with Progress(1, quiet=True) as progress:
        return runs.made(way, kind, 1, progress, Stop(), f"{way}, {kind}")

"""Comparing the folders of training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kit import log


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and progress of a checkpoint, without how long the epoch has taken."""
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        progress.pop("epoch_seconds")
        return {name: file.get_tensor(name) for name in file.keys()}, progress


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same checkpoint, and the same log but for the times."""
    (a, a_progress), (b, b_progress) = contents(one / "last.safetensors"), contents(other / "last.safetensors")
    assert a_progress == b_progress and a.keys() == b.keys()
    assert any(name.startswith("optimizer.") for name in a) and "module.ema.n_averaged" in a and "torch_rng" in a
    for name in a:
        assert torch.equal(a[name], b[name]), name
    rows = []
    for run in (one, other):
        rows.append([{k: v for k, v in row.items() if "seconds" not in k} for row in log.read(run / "log.csv")])
    assert rows[0] == rows[1]

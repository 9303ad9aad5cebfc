"""Recorded outputs of the original implementations, where PYKERNELS_DATA names the folder that holds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def recorded(*parts: str) -> Path:
    """The path of a recorded file; skips the test where there is none."""
    folder = os.environ.get("PYKERNELS_DATA")
    if not folder:
        pytest.skip("PYKERNELS_DATA is not set: no recorded data to compare with")
    path = Path(folder, *parts)
    if not path.exists():
        pytest.skip(f"PYKERNELS_DATA has no {Path(*parts)}")
    return path

"""What is measured for one tier does not change what is measured for another."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from bench.__main__ import settings

# Rows of 12: vectors of 8 lanes leave another tail than vectors of 16.
SCRIPT = """
import torch

def f(table, rows, y):
    return table[rows] + y

table, rows, y = torch.randn(30, 12), torch.arange(21), torch.randn(21, 12)
assert torch.equal(torch.compile(f)(table, rows, y), f(table, rows, y))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512")
def test_compiled_code_of_another_tier_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for AVX2 and built again for AVX-512 writes past its tensors."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for tier in ("avx2", "avx512"):
        subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | settings(tier), check=True, timeout=600)

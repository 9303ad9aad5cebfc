"""ThreadSanitizer on the operators' CUDA kernels, executed by tests/ptx_on_cpu: no access of a thread to shared or
global memory may be unordered with another's, inside a block or between the blocks of a launch.

cp.async counts as a copy at the moment of its wait; what the sanitizer does not see is in ptx_on_cpu/README.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ptx_on_cpu
from tests.cuda_races import DTYPES, RUNS
from tests.emulated_cuda import ROOT, compile_operator, kernel_files
from tests.ptx_on_cpu.test_sanitizers import library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx_on_cpu.unavailable() is not None, reason=f"{ptx_on_cpu.unavailable()}"),
]


def run(operator: str, kernels: list[Path] | None = None) -> subprocess.CompletedProcess:
    """All dtypes of tests/cuda_races.py. kernels: files in place of the operator's own."""
    preload = library("libtsan.so")
    files = compile_operator(operator, "thread", kernels)
    environment = os.environ | {
        "LD_PRELOAD": preload,
        # Only what is instrumented is looked at: kernels and glue, not Python and PyTorch.
        "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1:report_signal_unsafe=0",
    }
    command = [sys.executable, "-m", "tests.cuda_races", operator, *map(str, files)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("operator", RUNS)
def test_the_kernels_have_no_races(operator: str) -> None:
    done = run(operator)
    assert done.returncode == 0, done.stderr
    assert "ThreadSanitizer" not in done.stderr
    assert done.stdout.splitlines() == [f"{operator} {name}: done" for name in DTYPES]


def test_a_missing_barrier_is_reported(tmp_path: Path) -> None:
    """The transposing pack of gated_conv.cu without the barrier between its writes to shared memory and its reads."""
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("cpu"))
    patched = folder / "cuda" / "gated_conv.cu"
    text = patched.read_text()
    begin = text.index("pack_transposed_kernel")
    assert "__syncthreads();" in text[begin:]
    patched.write_text(text[:begin] + text[begin:].replace("__syncthreads();", "", 1))
    # The other files stay where they are, so that they are not compiled again.
    done = run("gated_conv", [patched if path.name == patched.name else path for path in kernel_files("gated_conv")])
    assert done.returncode == 66, done.stderr
    assert "data race" in done.stderr and "gated_conv.cu:" in done.stderr

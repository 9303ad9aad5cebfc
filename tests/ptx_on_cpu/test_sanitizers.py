"""Races and overruns of arrays, found by ThreadSanitizer and AddressSanitizer in translated kernels.

Python is started again with the sanitizer's library, which must be there before everything else.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import unavailable
from .build import cxx

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")
ROOT = Path(__file__).parents[2]


def library(name: str) -> str:
    path = subprocess.run([*(cxx() or []), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return path


def run(sanitizer: str, program: str) -> subprocess.CompletedProcess:
    """Runs lines of Python with `library`, built for the sanitizer, and NumPy arrays x and y of 64 zeros."""
    preload = library({"thread": "libtsan.so", "address": "libasan.so"}[sanitizer])
    text = f"""
import numpy as np
from tests.ptx_on_cpu import build
from tests.ptx_on_cpu.samples import source
library = build(source("races"), sanitizer="{sanitizer}")
x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
{program}
"""
    environment = os.environ | {
        "LD_PRELOAD": preload,
        # Only what is instrumented is looked at: the kernels, not Python.
        "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1:report_signal_unsafe=0",
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=67",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, cwd=ROOT)


def built(sanitizer: str) -> None:
    """Compilers are slow under a sanitizer, so the libraries are built before."""
    from .build import build_cuda
    from .samples import source

    build_cuda((source("races"),), sanitizer=sanitizer)


@pytest.mark.parametrize("kernel", ["reversed", "warp_sum", "exchange", "last_block", "asynchronous"])
def test_thread_sanitizer_finds_nothing_in_right_kernels(kernel):
    built("thread")
    done = run("thread", f'library.call("{kernel}", x, y, 1)\nlibrary.call("{kernel}", x, y, 1)')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel", ["reversed", "warp_sum", "exchange", "asynchronous"])
def test_thread_sanitizer_finds_missing_barriers(kernel):
    built("thread")
    done = run("thread", f'library.call("{kernel}", x, y, 0)')
    assert done.returncode == 66, done.stderr
    assert "data race" in done.stderr and "races.cu:" in done.stderr


def test_thread_sanitizer_finds_races_between_blocks():
    built("thread")
    program = 'with library.runtime.options(order_blocks={}):\n    library.call("{}", x, y, 1)'
    assert "data race" in run("thread", program.format(0, "blocks_overlap")).stderr
    assert run("thread", program.format(1, "blocks_overlap")).returncode == 0
    for kernel in ("reversed", "last_block"):
        done = run("thread", program.format(0, kernel))
        assert done.returncode == 0, done.stderr


def test_address_sanitizer_finds_overruns():
    built("address")
    done = run("address", 'library.call("local_array", x, y, 8)')
    assert done.returncode == 0, done.stderr
    done = run("address", 'library.call("local_array", x, y, 9)')
    assert done.returncode == 67
    assert "stack-buffer-overflow" in done.stderr and "races.cu:" in done.stderr

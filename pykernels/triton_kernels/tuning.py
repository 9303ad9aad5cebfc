"""How kernels are launched, and those with matrix products tuned.

Configurations of one kernel give the same bits: they sum over the inner dimension in the same order, and on Hopper each
has whole warpgroups and at least 64 rows, so that the same instructions multiply. Which one is the fastest may
differ between runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor


def configurations(*sizes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Of (BLOCK_M, BLOCK_N, BLOCK_BYTES of the inner dimension, warps, stages)."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_BYTES": b}, num_warps=warps, num_stages=stages)
        for m, n, b, warps, stages in sizes
    ]


def autotuned(*sizes: tuple[int, int, int, int, int]) -> Callable[[Any], Any]:
    """triton.autotune over configurations, anew for each `size_key`, precision and dtypes."""
    # The interpreter has no driver that could measure.
    tried = sizes[:1] if triton.knobs.runtime.interpret else sizes
    return triton.autotune(configurations(*tried), key=["size_key", "PRECISION"])


def size_key(*sizes: int) -> int:
    """One number for all sizes within the same powers of two."""
    key = 0
    for size in sizes:
        key = key << 6 | max(0, size - 1).bit_length()
    return key


def precision_of(dtype: torch.dtype) -> str:
    """The input_precision of tl.dot: float32 is rounded to tf32 where PyTorch's setting for CUDA products says so."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

"""How the kernels with matrix products are tuned.

Configurations of one kernel give the same bits: they sum over the inner dimension in the same order, and on Hopper each
has whole warpgroups and at least 64 rows, so that the same instructions multiply. Which one is the fastest may
differ between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

Fits = Callable[[triton.Config, Mapping[str, Any]], bool]
"""Whether registers suffice for a configuration, with the arguments of a kernel by name."""


def configurations(*sizes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Of (BLOCK_M, BLOCK_N, BLOCK_BYTES of the inner dimension, warps, stages)."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_BYTES": b}, num_warps=warps, num_stages=stages)
        for m, n, b, warps, stages in sizes
    ]


def _those_that(fits: Fits) -> Callable[..., list[triton.Config]]:
    def chosen(configs: list[triton.Config], arguments: Mapping[str, Any], **more: Any) -> list[triton.Config]:
        return [c for c in configs if fits(c, {**arguments, **more})]

    return chosen


def autotuned(*sizes: tuple[int, int, int, int, int], fits: Fits | None = None) -> Callable[[Any], Any]:
    """triton.autotune over configurations, anew for each `size_key`, precision and dtypes.

    fits: None where registers suffice for all of them.
    """
    # The interpreter has no driver that could measure.
    tried = sizes[:1] if triton.knobs.runtime.interpret else sizes
    prune = None if fits is None else {"early_config_prune": _those_that(fits)}
    return triton.autotune(configurations(*tried), key=["size_key", "PRECISION"], prune_configs_by=prune)


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

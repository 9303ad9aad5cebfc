"""Runs an operator's CUDA kernels, built for ThreadSanitizer by tests/emulated_cuda, on tensors of a few rows.

python -m tests.cuda_races OPERATOR LAUNCHERS GLUE, started with the sanitizer's library by test_cuda_races.py, which
builds both files: compilers are slow under a sanitizer.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import pykernels
from tests import ptx_on_cpu
from tests.emulated_cuda import namespace_of

DTYPES = ("float32", "tf32", "bfloat16", "float16")


def gated_conv(operators: Any, x: torch.Tensor, normal: Callable[..., torch.Tensor]) -> None:
    """Forward and backward with a mask, a row of cond for each sequence and random bits; more columns than a tile."""
    batch, length, channels = x.shape
    weight, bias, cond = normal(2 * channels, channels, 2), normal(2 * channels), normal(batch, 1, 2 * channels)
    leaves = [t.requires_grad_() for t in (x, weight, bias, cond)]
    mask = torch.arange(length) < torch.tensor([[length], [length // 2]])
    module = importlib.import_module("pykernels.gated_conv")
    with mock.patch.multiple(
        module, _fwd=operators._gated_conv_fwd.default, _bwd=operators._gated_conv_bwd.default
    ):
        y = pykernels.gated_conv1d(
            *leaves[:3], cond=cond, mask=mask, gate_dropout=0.2, training=True, seed=1, backend="cpu"
        )
        torch.autograd.grad(y, leaves, torch.ones_like(y))


# Each takes the emulated operators, x [2, 20, 40] and a maker of random tensors.
RUNS = {"gated_conv": gated_conv}


def main(operator: str, launchers: str, glue: str) -> None:
    library = ptx_on_cpu.Library(Path(launchers), ptx_on_cpu.runtime("thread"))
    ctypes.CDLL(glue)
    operators = getattr(torch.ops, namespace_of(operator, "80"))
    torch.set_num_threads(1)
    for name in DTYPES:
        generator = torch.Generator().manual_seed(7)
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)

        def normal(*sizes: int, generator: torch.Generator = generator, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator).to(dtype)

        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        # Few processors get the large tiles, many the small ones. Blocks of a launch are not ordered either.
        for processors in (1, 1000):
            with library.runtime.options(processors=processors, order_blocks=0):
                RUNS[operator](operators, normal(2, 20, 40), normal)
        print(f"{operator} {name}: done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

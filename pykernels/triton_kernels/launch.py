"""What the launches of all operators need."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def seed_words(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits, as numbers that Triton passes as int32, whichever they are."""
    return _signed(seed), _signed(seed >> 32)


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word

"""Which rows of a batch exist, for the operators on sequences: padded batches with a mask or lengths, and packed rows.

Lengths and boundaries stay on the device, so that no call waits for it; what lies outside of the tensors is cut off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# How a kernel finds out which rows of a sequence exist.
ALL, MASK, LENGTHS, PACKED = (tl.constexpr(i) for i in range(4))


class Batch(NamedTuple):
    kind: int
    bounds: Tensor | None  # lengths [B]; cu_seqlens [B + 1] of packed rows
    mask: Tensor | None  # [B, L] uint8
    sequence_of_row: Tensor | None  # [T] int32, packed rows only
    sequences: int
    rows: int  # x rows in all
    length: int  # x rows of each sequence of a padded batch; 0 for packed rows

    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int]:
        """What kernels take: bounds, mask, sequence_of_row, x_rows, x_length."""
        return self.bounds, self.mask, self.sequence_of_row, self.rows, self.length


def batch_of(x: Tensor, mask: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Batch:
    """x [B, L, ...], or [T, ...] with cu_seqlens. ValueError for 2**30 rows or more, and rows without a sequence."""
    rows = x.shape[0] if cu_seqlens is not None else x.shape[0] * x.shape[1]
    if rows >= 2**30:
        raise ValueError(f"x: expected fewer than 2**30 rows on the Triton backend, got {rows}")
    if cu_seqlens is None:
        bounds = None if lengths is None else lengths.to(x.device).contiguous()
        live = None if mask is None else mask.to(x.device, torch.bool).contiguous().view(torch.uint8)
        kind = MASK if live is not None else ALL if bounds is None else LENGTHS
        return Batch(kind.value, bounds, live, None, x.shape[0], rows, x.shape[1])
    sequences = cu_seqlens.shape[0] - 1
    if sequences < 0 or (sequences == 0 and rows > 0):
        wanted = f"non-decreasing row numbers from 0 to T = {rows}"
        raise ValueError(f"cu_seqlens: expected {wanted}, got {sequences + 1} of them")
    bounds = cu_seqlens.to(x.device).contiguous()
    sequence_of_row = x.new_empty(rows, dtype=torch.int32)
    if rows:
        block = 256
        steps = sequences.bit_length()
        _find_sequences[(triton.cdiv(rows, block),)](bounds, sequence_of_row, rows, sequences, steps, BLOCK=block)
    return Batch(PACKED.value, bounds, None, sequence_of_row, sequences, rows, 0)


def checkable(*given: Tensor | None) -> list[Tensor | None]:
    """A mask, lengths and boundaries as checks may look at them: values on a GPU would have to be waited for, and the
    meta device has none."""
    return [t.to("meta") if isinstance(t, Tensor) and t.is_cuda else t for t in given]


@triton.jit(do_not_specialize=["rows", "sequences", "steps"])
def _find_sequences(bounds, sequence_of_row, rows, sequences, steps, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros_like(row)
    high = tl.zeros_like(row) + sequences  # the first boundary behind the row is in [low + 1, high]
    for _ in range(steps):
        middle = (low + high) // 2
        apart = high - low > 1
        begun = tl.load(bounds + middle, mask=apart, other=0) <= row
        low, high = tl.where(apart & begun, middle, low), tl.where(apart & (begun == 0), middle, high)
    tl.store(sequence_of_row + row, low, mask=row < rows)


@triton.jit
def cut(value, low, high):
    return tl.minimum(tl.maximum(value, low), high).to(tl.int32)


@triton.jit
def place_of(row, inside, length, bounds, sequence_of_row, x_rows, x_length, ROWS: tl.constexpr):
    """For rows of tensors whose sequences have `length` rows: their sequence, their number t in it, the sequence's
    first row among packed rows (else 0), and how many x rows it has that are no padding. All int32.
    """
    if ROWS == PACKED:
        sequence = tl.load(sequence_of_row + row, mask=inside, other=0)
        first = cut(tl.load(bounds + sequence, mask=inside, other=0), 0, x_rows)
        live = cut(tl.load(bounds + sequence + 1, mask=inside, other=0), first, x_rows) - first
        t = row - first
    else:
        sequence = row // length
        t = row - sequence * length
        first = tl.zeros_like(row)
        if ROWS == LENGTHS:
            live = cut(tl.load(bounds + sequence, mask=inside, other=0), 0, x_length)
        else:
            live = first + x_length
    return sequence, t, first, live


@triton.jit
def exists(t, inside, sequence, live, mask, x_length, ROWS: tl.constexpr):
    """Whether x row t of the sequence is there and not masked; t may be negative or too large."""
    there = inside & (t >= 0) & (t < live)
    if ROWS == MASK:
        there = there & (tl.load(mask + sequence.to(tl.int64) * x_length + t, mask=there, other=0) != 0)
    return there


@triton.jit
def tap_offset(tap, dilation, left, x_rows):
    """By how many rows a tap reads away from its output's row; cut off where no row could be, so that 32 bits do."""
    return cut(tap.to(tl.int64) * dilation - left, -x_rows, x_rows)

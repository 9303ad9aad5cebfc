"""lora_linear forward of few rows, whose time is that of reading the weight.

The weight is read once, in parts along K so that the programs occupy the device; a second kernel adds the parts in
their order, and the low-rank term and the bias to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .lora_rows import SPLIT, adapters_of, cut
from .tuning import autotuned, size_key

if TYPE_CHECKING:
    from .lora_linear import Call

FEW_ROWS = 8
_OUTPUTS, _RANKS = 32, 16  # of a program of the second kernel at a time


@autotuned((64, 8, 128, 4, 4), (64, 8, 256, 4, 4), (128, 8, 256, 8, 3))
@triton.jit(do_not_specialize=["rows", "split_steps", "size_key"])
def lora_few_product(
    x, x_row, x_column, weight, weight_column, weight_depth, parts, rows, depth, columns, split_steps, size_key,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """One part of the sums over `depth`, of up to BLOCK_N rows: parts [program_id(1), rows, columns].

    The weight is the left operand, of which matrix instructions take more rows.
    """
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.arange(0, BLOCK_N)
    there, inside = column < columns, row < rows
    begin = tl.program_id(1) * split_steps * SPLIT
    end = tl.minimum(begin + split_steps * SPLIT, depth)
    from_weight = weight + column.to(tl.int64) * weight_column
    from_x = x + row.to(tl.int64) * x_row
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for inner0 in range(begin, end, BLOCK_K):
        inner = inner0 + tl.arange(0, BLOCK_K)
        wide_inner = inner.to(tl.int64)
        weight_tile = tl.load(
            from_weight[:, None] + (wide_inner * weight_depth)[None, :],
            mask=there[:, None] & (inner < depth)[None, :],
            other=0.0,
        )
        x_tile = tl.load(
            from_x[None, :] + (wide_inner * x_column)[:, None],
            mask=(inner < depth)[:, None] & inside[None, :],
            other=0.0,
        )
        sums = tl.dot(weight_tile, x_tile, sums, input_precision=PRECISION)
    to = parts + ((tl.program_id(1) * rows + row).to(tl.int64) * columns)[None, :] + column[:, None]
    tl.store(to, sums, mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=[
    "splits", "low_splits", "rows_per_index", "adapters", "rows",
])  # fmt: skip
def lora_few_sums(
    parts, splits, low_parts, low_splits, factor, factor_adapter, factor_column, factor_rank,
    index, rows_per_index, adapters, scale, scales, bias, s, y, rows, columns, rank, multiplier,
    SPLITS: tl.constexpr, LOW_SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s [rows, rank] = multiplier * the sum of low_parts; y [rows, columns] = the sum of parts + bias + low-rank term.

    SPLITS, LOW_SPLITS, ROWS: at least as many as there are.
    """
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, there = row < rows, column < columns
    split = tl.arange(0, SPLITS)
    at = (split[:, None] * rows + row[None, :]).to(tl.int64)[:, :, None] * columns + column[None, None, :]
    given = ((split < splits)[:, None] & inside[None, :])[:, :, None] & there[None, None, :]
    sums = tl.sum(tl.load(parts + at, mask=given, other=0.0), 0)
    if low_parts is not None:
        adapter = adapters_of(index, row, inside, rows_per_index, adapters)
        if scales is None:
            scale_of_row = tl.zeros((ROWS,), tl.float32) + scale
        else:
            scale_of_row = tl.load(scales + adapter, mask=adapter >= 0, other=0.0)
        from_factor = factor + (adapter.to(tl.int64) * factor_adapter)[:, None, None]
        from_factor += (column.to(tl.int64) * factor_column)[None, :, None]
        low_split = tl.arange(0, LOW_SPLITS)
        for slot0 in range(0, rank, BLOCK_R):
            slot = slot0 + tl.arange(0, BLOCK_R)
            slots = slot < rank
            low_at = (low_split[:, None] * rows + row[None, :])[:, :, None] * rank + slot[None, None, :]
            low_given = ((low_split < low_splits)[:, None] & inside[None, :])[:, :, None] & slots[None, None, :]
            v = tl.sum(tl.load(low_parts + low_at, mask=low_given, other=0.0), 0) * multiplier
            first = tl.program_id(0) == 0
            tl.store(s + row[:, None] * rank + slot[None, :], v, mask=inside[:, None] & slots[None, :] & first)
            f = tl.load(
                from_factor + (slot.to(tl.int64) * factor_rank)[None, None, :],
                mask=((adapter >= 0)[:, None] & there[None, :])[:, :, None] & slots[None, None, :],
                other=0.0,
            )
            sums += tl.sum((v * scale_of_row[:, None])[:, None, :] * f.to(tl.float32), 2)
    if bias is not None:
        sums += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    to = y + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=inside[:, None] & there[None, :])


def launch_few(call: Call, low_parts: Tensor | None, bias: Tensor | None, s: Tensor, y: Tensor) -> None:
    """y and, where there is a low-rank term, s; low_parts are those of the shrink."""
    tiles = triton.cdiv(call.outputs, 64)
    split_steps, splits = cut(call.inputs, min(512 // tiles, 16))
    parts = call.floats(splits, call.rows, call.outputs)
    lora_few_product[lambda config: (triton.cdiv(call.outputs, config["BLOCK_M"]), splits)](
        call.x, *call.x.stride(), call.weight, *call.weight.stride(), parts, call.rows, call.inputs, call.outputs,
        split_steps, size_key(call.inputs, call.outputs), PRECISION=call.precision,
    )  # fmt: skip
    low_splits = 1 if low_parts is None else low_parts.shape[0]
    lora_few_sums[(triton.cdiv(call.outputs, _OUTPUTS),)](
        parts, splits, low_parts, low_splits, call.lora_b, *call.lora_b.stride(), *call.of_rows(), call.scale,
        call.scales, bias, s, y, call.rows, call.outputs, call.rank, call.keep_scale,
        SPLITS=triton.next_power_of_2(splits), LOW_SPLITS=triton.next_power_of_2(low_splits), ROWS=FEW_ROWS,
        BLOCK_N=_OUTPUTS, BLOCK_R=_RANKS,
    )  # fmt: skip

"""lora_linear forward: a shrink, S = drop(x) A^T, and the product with the frozen weight, which begins with the
low-rank term, so that no tensor of the output's size exists besides the output.

The shrink is cut into parts along K, which depend on sizes alone and are added in their order. Few rows are in
lora_linear_few.py, backward in lora_linear_bwd.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import random_bits
from .._checks import check_lora_linear
from .launch import on_device, seed_words
from .lora_linear_few import FEW_ROWS, launch_few
from .lora_rows import SPLIT, adapters_of, add_low_rank, add_product, cut, keeps, merged, next_adapter, scale_of
from .tuning import autotuned, precision_of, size_key

# --- the shrink ---


@triton.jit
def _shrink(
    x, x_row, x_column, factor, factor_adapter, factor_rank, factor_depth, row, of_adapter, e, slot, rank, begin, end,
    depth, seed_low, seed_high, stream, threshold, DROP: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over columns begin ... end - 1 of the rows in `of_adapter` times the factor of adapter e."""
    from_x = x + row.to(tl.int64) * x_row
    from_factor = factor + (tl.cast(e, tl.int64) * factor_adapter + slot.to(tl.int64) * factor_rank)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    third = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for column0 in range(begin, end, BLOCK_K):
        column = column0 + tl.arange(0, BLOCK_K)
        inside, wide_column = column < depth, column.to(tl.int64)
        x_tile = tl.load(
            from_x[:, None] + (wide_column * x_column)[None, :], mask=of_adapter[:, None] & inside[None, :], other=0.0
        )
        if DROP:
            kept = keeps(seed_low, seed_high, stream, threshold, row, column0, depth, BLOCK_M, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        factor_tile = tl.load(
            from_factor[None, :] + (wide_column * factor_depth)[:, None],
            mask=inside[:, None] & (slot < rank)[None, :],
            other=0.0,
        )
        first, second, third = add_product(x_tile, factor_tile, first, second, third, TERMS, PRECISION)
    return merged(first, second, third, TERMS, x.dtype.element_ty)


def _shrink_fits(config: triton.Config, arguments: Mapping[str, Any]) -> bool:
    """Each term has sums of its own, and those of one adapter lie beside those of all."""
    return config.kwargs["BLOCK_N"] < 64 or (arguments["index"] is None and arguments["TERMS"] == 1)


@autotuned(
    (64, 16, 64, 4, 5), (128, 16, 64, 8, 5), (64, 32, 64, 8, 5), (64, 64, 64, 8, 4), fits=_shrink_fits
)  # fmt: skip
@triton.jit(do_not_specialize=[
    "rows_per_index", "adapters", "rows", "split_steps", "seed_low", "seed_high", "stream", "threshold", "size_key",
])  # fmt: skip
def lora_shrink(
    x, x_row, x_column, factor, factor_adapter, factor_rank, factor_depth, index, rows_per_index, adapters,
    parts, rows, depth, rank, split_steps, seed_low, seed_high, stream, threshold, size_key,
    DROP: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """One part of the sums over `depth` columns, of split_steps * SPLIT of them: parts [program_id(1), rows, rank]."""
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    rank_tiles = tl.cdiv(rank, BLOCK_N)
    tile = tl.program_id(0)
    row = tile // rank_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tile % rank_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    begin = tl.program_id(1) * split_steps * SPLIT
    end = tl.minimum(begin + split_steps * SPLIT, depth)
    if index is None:
        sums = _shrink(
            x, x_row, x_column, factor, factor_adapter, factor_rank, factor_depth, row, inside, 0, slot, rank, begin,
            end, depth, seed_low, seed_high, stream, threshold, DROP, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        adapter = adapters_of(index, row, inside, rows_per_index, adapters)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        e = next_adapter(adapter, -1, adapters)
        while e < adapters:
            of_e = _shrink(
                x, x_row, x_column, factor, factor_adapter, factor_rank, factor_depth, row, adapter == e, e, slot,
                rank, begin, end, depth, seed_low, seed_high, stream, threshold, DROP, TERMS, PRECISION, BLOCK_M,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            # Selected, since what is not finite in one adapter is no matter of the other rows.
            sums = tl.where((adapter == e)[:, None], of_e, sums)
            e = next_adapter(adapter, e, adapters)
    to = parts + ((tl.program_id(1).to(tl.int64) * rows + row) * rank)[:, None] + slot[None, :]
    tl.store(to, sums, mask=inside[:, None] & (slot < rank)[None, :])


@triton.jit(do_not_specialize=["elements", "splits"])
def lora_combine(parts, to, elements, splits, multiplier, BLOCK: tl.constexpr):
    """to [elements] = multiplier * the sum of parts [splits, elements], in their order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + elements.to(tl.int64) * split + index, mask=inside, other=0.0)
    tl.store(to + index, (total * multiplier).to(to.dtype.element_ty), mask=inside)


# --- the product ---


@triton.jit
def _low_rank(
    low, scale, factor, factor_adapter, factor_column, factor_rank, row, of_adapter, column, columns, e, rank,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """scale * low times the factor of adapter e."""
    from_low = low + row.to(tl.int64) * rank
    from_factor = factor + (tl.cast(e, tl.int64) * factor_adapter + column.to(tl.int64) * factor_column)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for slot0 in range(0, rank, BLOCK_R):
        slot = slot0 + tl.arange(0, BLOCK_R)
        there = slot < rank
        v = tl.load(from_low[:, None] + slot[None, :], mask=of_adapter[:, None] & there[None, :], other=0.0) * scale
        f = tl.load(
            from_factor[None, :] + (slot.to(tl.int64) * factor_rank)[:, None],
            mask=there[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        sums = add_low_rank(v, f, sums, EXACT, PRECISION)
    return sums


def _product_fits(config: triton.Config, arguments: Mapping[str, Any]) -> bool:
    """The sums of one adapter lie beside those of all."""
    return arguments["index"] is None or config.kwargs["BLOCK_M"] == 64


@autotuned(
    (128, 128, 128, 8, 3), (128, 64, 128, 8, 3), (64, 128, 128, 8, 4), (64, 64, 128, 8, 4), fits=_product_fits
)  # fmt: skip
@triton.jit(do_not_specialize=[
    "rows_per_index", "adapters", "rows", "seed_low", "seed_high", "stream", "threshold", "size_key",
])  # fmt: skip
def lora_product(
    x, x_row, x_column, weight, weight_column, weight_depth, low, factor, factor_adapter, factor_column, factor_rank,
    index, rows_per_index, adapters, scale, scales, bias, before, out, rows, depth, columns, rank,
    seed_low, seed_high, stream, threshold, size_key,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = before + bias + x weight^T + drop(scale * low factor^T); each but the product may be None.

    low: float32 [rows, rank].
    """
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    # Eight rows of tiles go together, so that programs that run at the same time share operands.
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group, place = tl.program_id(0) // (8 * across), tl.program_id(0) % (8 * across)
    high = tl.minimum(down - group * 8, 8)
    row = (group * 8 + place % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    column0 = place // high * BLOCK_N
    column = column0 + tl.arange(0, BLOCK_N)
    inside, there = row < rows, column < columns

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if low is not None:
        if index is None:
            sums = _low_rank(
                low, scale_of(scale, scales, 0), factor, factor_adapter, factor_column, factor_rank, row, inside,
                column, columns, 0, rank, EXACT, PRECISION, BLOCK_R, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            adapter = adapters_of(index, row, inside, rows_per_index, adapters)
            e = next_adapter(adapter, -1, adapters)
            while e < adapters:
                of_e = _low_rank(
                    low, scale_of(scale, scales, e), factor, factor_adapter, factor_column, factor_rank, row,
                    adapter == e, column, columns, e, rank, EXACT, PRECISION, BLOCK_R, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                sums = tl.where((adapter == e)[:, None], of_e, sums)
                e = next_adapter(adapter, e, adapters)
        if DROP:
            kept = keeps(seed_low, seed_high, stream, threshold, row, column0, columns, BLOCK_M, BLOCK_N)
            sums = tl.where(kept, sums, 0.0)

    from_x = x + row.to(tl.int64) * x_row
    from_weight = weight + column.to(tl.int64) * weight_column
    for inner0 in range(0, depth, BLOCK_K):
        inner = inner0 + tl.arange(0, BLOCK_K)
        wide_inner = inner.to(tl.int64)
        x_tile = tl.load(
            from_x[:, None] + (wide_inner * x_column)[None, :],
            mask=inside[:, None] & (inner < depth)[None, :],
            other=0.0,
        )
        weight_tile = tl.load(
            from_weight[None, :] + (wide_inner * weight_depth)[:, None],
            mask=(inner < depth)[:, None] & there[None, :],
            other=0.0,
        )
        sums = tl.dot(x_tile, weight_tile, sums, input_precision=PRECISION)

    stored = inside[:, None] & there[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    if bias is not None:
        sums += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    if before is not None:
        sums += tl.load(before + at, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=stored)


# --- launches ---


class Call(NamedTuple):
    """One call of lora_linear as the kernels see it."""

    x: Tensor  # [rows, inputs]
    weight: Tensor  # [outputs, inputs]
    lora_a: Tensor  # [E, R, inputs]
    lora_b: Tensor  # [E, outputs, R]
    adapter_index: Tensor | None
    rows_per_index: int
    scale: float
    scales: Tensor | None  # float32
    out_shape: tuple[int, ...]
    seed_low: int
    seed_high: int
    stream: int
    threshold: int  # 0: no dropout
    keep_scale: float
    precision: str

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def inputs(self) -> int:
        return self.x.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]

    @property
    def has_rank(self) -> bool:
        return self.lora_a.numel() > 0

    @property
    def float_adapters(self) -> bool:
        """float32 ones of a layer of 16 bits."""
        return self.lora_a.dtype != self.x.dtype

    def of_rows(self) -> tuple[Tensor | None, int, int]:
        """What kernels take: index, rows_per_index, adapters."""
        return self.adapter_index, self.rows_per_index, self.lora_a.shape[0]

    def bits(self) -> tuple[int, int, int, int]:
        """What kernels take: seed_low, seed_high, stream, threshold."""
        return self.seed_low, self.seed_high, self.stream, self.threshold

    def floats(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


def call_of(x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout, stream: int = 0) -> Call:
    """Checks the arguments of the raw operators, which are those of pykernels._checks.check_lora_linear."""
    shape = check_lora_linear(
        x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout, look=not x.is_cuda
    )
    rows = x.shape[:-1].numel()
    if rows >= 2**30:
        raise ValueError(f"x: expected fewer than 2**30 rows on the Triton backend, got {rows}")
    index, rows_per_index = None, 1
    if adapter_index is not None:
        index = adapter_index.contiguous()
        rows_per_index = rows // max(1, index.numel())
    else:
        lora_a, lora_b = lora_a.unsqueeze(0), lora_b.unsqueeze(0)
    threshold = random_bits.keep_threshold(1.0 - dropout) if dropout else 0
    seed_low, seed_high = seed_words(seed.item() if dropout else 0)
    return Call(
        x=x.reshape(rows, x.shape[-1]),
        weight=weight,
        lora_a=lora_a,
        lora_b=lora_b,
        adapter_index=index,
        rows_per_index=rows_per_index,
        scale=float(scale),
        scales=None if scales is None else scales.to(torch.float32).contiguous(),
        out_shape=shape,
        seed_low=seed_low,
        seed_high=seed_high,
        stream=stream,
        threshold=threshold,
        keep_scale=65536 / threshold if threshold else 1.0,
        precision=precision_of(x.dtype),
    )


def launch_shrink(call: Call, rows: Tensor, factor: Tensor, drop: bool) -> Tensor:
    """rows [rows, depth], dropped out of if `drop`, times factor [E, R, depth]: parts [splits, rows, R] of the sums."""
    depth, rank = rows.shape[1], call.rank
    # As many programs as occupy a large device.
    tiles = triton.cdiv(call.rows, 64) * triton.cdiv(rank, 32)
    split_steps, splits = cut(depth, min(512 // tiles, 32))
    parts = call.floats(splits, call.rows, rank)

    def grid(config: dict) -> tuple[int, int]:
        return triton.cdiv(call.rows, config["BLOCK_M"]) * triton.cdiv(rank, config["BLOCK_N"]), splits

    lora_shrink[grid](
        rows, *rows.stride(), factor, *factor.stride(), *call.of_rows(), parts, call.rows, depth, rank, split_steps,
        *call.bits(), size_key(call.rows, depth, rank),
        DROP=drop, TERMS=3 if call.float_adapters else 1, PRECISION=call.precision,
    )  # fmt: skip
    return parts


def combine(parts: Tensor, to: Tensor, multiplier: float = 1.0) -> Tensor:
    """to = multiplier * the sum of parts [splits, ...]."""
    block = 512
    lora_combine[(triton.cdiv(to.numel(), block),)](
        parts, to, to.numel(), parts.shape[0], multiplier, BLOCK=block
    )  # fmt: skip
    return to


def launch_product(call: Call, rows: Tensor, weight: Tensor, low: Tensor | None, factor: Tensor, out: Tensor,
                   bias: Tensor | None = None, before: Tensor | None = None, drop: bool = False) -> None:  # fmt: skip
    """rows [rows, depth], weight [columns, depth], low [rows, R], factor [E, columns, R]."""
    columns, depth = weight.shape

    def grid(config: dict) -> tuple[int]:
        return (triton.cdiv(call.rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"]),)

    lora_product[grid](
        rows, *rows.stride(), weight, *weight.stride(), low, factor, *factor.stride(), *call.of_rows(),
        call.scale, call.scales, bias, before, out, call.rows, depth, columns, call.rank, *call.bits(),
        size_key(call.rows, depth, columns, call.rank),
        DROP=drop, PRECISION=call.precision, BLOCK_R=min(max(triton.next_power_of_2(call.rank), 16), 64),
    )  # fmt: skip


def launch_forward(call: Call, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, S, and in place of the bits of dropout nothing, since backward draws them again."""
    y, s = call.x.new_empty(call.out_shape), call.floats(call.rows, call.rank)
    keep = call.x.new_empty((0,), dtype=torch.uint8)
    if y.numel() == 0 or not call.has_rank:
        s.zero_()
    if y.numel() == 0:
        return y, s, keep
    bias = None if bias is None else bias.contiguous()
    parts = None
    if call.has_rank:
        parts = launch_shrink(call, call.x, call.lora_a, drop=call.threshold > 0)
    if call.rows <= FEW_ROWS and call.inputs > 0:
        launch_few(call, parts, bias, s, y)
    else:
        low = None if parts is None else combine(parts, s, call.keep_scale)
        launch_product(call, call.x, call.weight, low, call.lora_b, y, bias)
    return y, s, keep


def forward(x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout) -> tuple[Tensor, ...]:
    """_lora_linear_fwd_triton: y, S, and no bits of dropout."""
    with on_device(x):
        return launch_forward(
            call_of(x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout), bias
        )


def forward_stacked(x, weights, lora_a, lora_b, biases, seed, scales, dropout) -> list[Tensor]:
    """_lora_linear_stacked_fwd_triton: y, S and no bits of each projection; number i has stream i."""
    results: list[Tensor] = []
    with on_device(x):
        each = zip(weights, lora_a, lora_b, biases, scales, strict=True)
        for i, (weight, a, b, bias, scale) in enumerate(each):
            results += launch_forward(call_of(x, weight, a, b, bias, None, None, seed, scale, dropout, i), bias)
    return results

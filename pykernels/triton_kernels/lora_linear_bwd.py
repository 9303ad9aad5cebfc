"""lora_linear backward, by the formulas in pykernels/lora_linear.py.

dS is a shrink of dy, and dx a product like that of forward. dA, dB, dW and dbias are sums over rows, cut into parts
that depend on sizes alone and are added in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_like, check_shape
from .launch import on_device
from .lora_linear import Call, call_of, combine, launch_product, launch_shrink
from .lora_rows import adapters_of, add_product, keeps, merged, scale_of
from .tuning import autotuned, size_key

# --- sums over rows ---


@triton.jit
def _add_rows(
    a, a_row, a_column, b, b_row, b_column, scale, row, inside, column0, a_columns, slot, b_columns,
    seed_low, seed_high, stream, threshold, first, second, third, DROP: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column = column0 + tl.arange(0, BLOCK_M)
    wide_row = row.to(tl.int64)
    a_tile = tl.load(
        a + (wide_row * a_row)[None, :] + (column.to(tl.int64) * a_column)[:, None],
        mask=inside[None, :] & (column < a_columns)[:, None],
        other=0.0,
    )
    if DROP:
        kept = keeps(seed_low, seed_high, stream, threshold, row, column0, a_columns, BLOCK_K, BLOCK_M)
        a_tile = tl.where(tl.trans(kept), a_tile, 0.0)
    b_tile = tl.load(
        b + (wide_row * b_row)[:, None] + (slot.to(tl.int64) * b_column)[None, :],
        mask=inside[:, None] & (slot < b_columns)[None, :],
        other=0.0,
    )
    if scale is not None:
        b_tile *= scale
    return add_product(a_tile, b_tile, first, second, third, TERMS, PRECISION)


@triton.jit
def _row_sums(
    a, a_row, a_column, b, b_row, b_column, scale, scales, index, rows_per_index, adapters,
    parts, to_a, to_b, elements, rows, a_columns, b_columns, split_rows, seed_low, seed_high, stream, threshold,
    DROP: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // a.dtype.element_ty.primitive_bitwidth
    down, across = tl.cdiv(a_columns, BLOCK_M), tl.cdiv(b_columns, BLOCK_N)
    tile = tl.program_id(0)
    column0 = tile % down * BLOCK_M
    column = column0 + tl.arange(0, BLOCK_M)
    slot = tile // down % across * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tile // down // across
    if scale is None:
        factor = None
    else:
        factor = scale_of(scale, scales, e)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    third = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = tl.program_id(1) * split_rows
    for row0 in range(begin, tl.minimum(begin + split_rows, rows), BLOCK_K):
        row = row0 + tl.arange(0, BLOCK_K)
        inside = row < rows
        if index is None:
            first, second, third = _add_rows(
                a, a_row, a_column, b, b_row, b_column, factor, row, inside, column0, a_columns, slot, b_columns,
                seed_low, seed_high, stream, threshold, first, second, third, DROP, TERMS, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            inside = adapters_of(index, row, inside, rows_per_index, adapters) == e
            if tl.max(inside.to(tl.int32), 0) > 0:
                first, second, third = _add_rows(
                    a, a_row, a_column, b, b_row, b_column, factor, row, inside, column0, a_columns, slot, b_columns,
                    seed_low, seed_high, stream, threshold, first, second, third, DROP, TERMS, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    to = parts + tl.program_id(1) * elements.to(tl.int64) + e.to(tl.int64) * a_columns * b_columns
    to += (column.to(tl.int64) * to_a)[:, None] + (slot.to(tl.int64) * to_b)[None, :]
    sums = merged(first, second, third, TERMS, a.dtype.element_ty)
    tl.store(to, sums, mask=(column < a_columns)[:, None] & (slot < b_columns)[None, :])


_UNSPECIALIZED = [
    "rows_per_index", "adapters", "elements", "rows", "split_rows", "seed_low", "seed_high", "stream", "threshold",
    "size_key",
]  # fmt: skip


@autotuned((64, 16, 128, 8, 4), (128, 16, 128, 8, 3), (64, 32, 128, 8, 3), (64, 64, 64, 8, 3))
@triton.jit(do_not_specialize=_UNSPECIALIZED)
def lora_adapter_sums(
    a, a_row, a_column, b, b_row, b_column, scale, scales, index, rows_per_index, adapters,
    parts, to_a, to_b, elements, rows, a_columns, b_columns, split_rows, seed_low, seed_high, stream, threshold,
    size_key, DROP: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """One part of scale * sum over the rows of adapter e of a[row, i] b[row, j], b of few columns and float32:
    parts [program_id(1), e, ...] at i * to_a + j * to_b. a is dropped out of if DROP."""
    _row_sums(
        a, a_row, a_column, b, b_row, b_column, scale, scales, index, rows_per_index, adapters,
        parts, to_a, to_b, elements, rows, a_columns, b_columns, split_rows, seed_low, seed_high, stream, threshold,
        DROP, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_BYTES,
    )  # fmt: skip


@autotuned((64, 64, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (64, 64, 128, 4, 3))
@triton.jit(do_not_specialize=["elements", "rows", "split_rows", "size_key"])
def lora_weight_sums(
    a, a_row, a_column, b, b_row, b_column, parts, to_a, to_b, elements, rows, a_columns, b_columns, split_rows,
    size_key, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """The same over all rows, b being like a."""
    _row_sums(
        a, a_row, a_column, b, b_row, b_column, None, None, None, 1, 1,
        parts, to_a, to_b, elements, rows, a_columns, b_columns, split_rows, 0, 0, 0, 0,
        False, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_BYTES,
    )  # fmt: skip


# --- launches ---


def _parts(call: Call, adapters: int, a_columns: int, b_columns: int) -> tuple[int, int, Tensor]:
    """Rows of a part, how many there are, and room for them: enough to occupy a large device, of at least 256 rows."""
    tiles = adapters * triton.cdiv(a_columns, 128) * triton.cdiv(b_columns, 64)
    split_rows = max(256, triton.cdiv(triton.cdiv(call.rows, min(max(256 // tiles, 1), 128)), 64) * 64)
    splits = triton.cdiv(call.rows, split_rows)
    return split_rows, splits, call.floats(splits, adapters, a_columns, b_columns)


def launch_adapter_sums(call: Call, a: Tensor, b: Tensor, to: Tensor, strides: tuple[int, int], scaled: bool,
                        drop: bool = False) -> None:  # fmt: skip
    """to[e], at i and j times `strides`: the sums of a [rows, i] and b [rows, j], float32, over the rows of adapter e.

    Not scaled: over all rows, without the adapters' scale.
    """
    index, rows_per_index, adapters = call.of_rows() if scaled else (None, 1, 1)
    split_rows, splits, parts = _parts(call, adapters, a.shape[1], b.shape[1])
    terms = 1 if call.x.dtype == torch.float32 else 3 if call.float_adapters else 2

    def grid(config: dict) -> tuple[int, int]:
        tiles = triton.cdiv(a.shape[1], config["BLOCK_M"]) * triton.cdiv(b.shape[1], config["BLOCK_N"])
        return tiles * adapters, splits

    lora_adapter_sums[grid](
        a, *a.stride(), b, *b.stride(), call.scale if scaled else 1.0, call.scales if scaled else None,
        index, rows_per_index, adapters, parts, *strides, to.numel(), call.rows, a.shape[1], b.shape[1], split_rows,
        *call.bits(), size_key(call.rows, a.shape[1], b.shape[1]),
        DROP=drop, TERMS=terms, PRECISION=call.precision,
    )  # fmt: skip
    combine(parts, to)


def launch_weight_sums(call: Call, dy: Tensor, to: Tensor) -> None:
    """The gradient of the weight, [outputs, inputs]."""
    split_rows, splits, parts = _parts(call, 1, call.outputs, call.inputs)

    def grid(config: dict) -> tuple[int, int]:
        return triton.cdiv(call.outputs, config["BLOCK_M"]) * triton.cdiv(call.inputs, config["BLOCK_N"]), splits

    lora_weight_sums[grid](
        dy, *dy.stride(), call.x, *call.x.stride(), parts, call.inputs, 1, to.numel(), call.rows, call.outputs,
        call.inputs, split_rows, size_key(call.rows, call.outputs, call.inputs), PRECISION=call.precision,
    )  # fmt: skip
    combine(parts, to)


def launch_backward(call: Call, dy: Tensor, s: Tensor, bias: Tensor | None, needs: Sequence[bool],
                    before: Tensor | None = None) -> list[Tensor]:  # fmt: skip
    """dx, to which `before` is added, dweight, dlora_a, dlora_b and dbias; those not needed are empty.

    dlora_a and dlora_b have a dimension of adapters.
    """
    check_shape("dy", dy, call.out_shape)
    check_like("dy", dy, call.x)
    check_shape("s", s, (call.rows, call.rank))
    inputs = (call.x, call.weight, call.lora_a, call.lora_b, bias)
    gradients = [
        (call.x if t is None else t).new_empty(t.shape if needed and t is not None else (0,))
        for t, needed in zip(inputs, needs, strict=True)
    ]
    dx, dweight, da, db, dbias = gradients
    if call.rows == 0 or call.outputs == 0:
        for g in gradients:
            g.zero_()
        if before is not None:
            gradients[0] = before
        return gradients
    dy = dy.reshape(call.rows, call.outputs)
    drop, ds = call.threshold > 0, None
    if call.has_rank and (dx.numel() or da.numel()):
        parts = launch_shrink(call, dy, call.lora_b.transpose(1, 2), drop=False)
        ds = combine(parts, call.floats(call.rows, call.rank), call.keep_scale)
    if ds is not None and da.numel():
        launch_adapter_sums(call, call.x, ds, da, (1, call.inputs), scaled=True, drop=drop)
    if call.has_rank and db.numel():
        launch_adapter_sums(call, dy, s.contiguous(), db, (call.rank, 1), scaled=True)
    else:
        db.zero_()
    if dweight.numel():
        launch_weight_sums(call, dy, dweight)
    if dbias.numel():
        ones = torch.ones(1, 1, dtype=torch.float32, device=dy.device).expand(call.rows, 1)
        launch_adapter_sums(call, dy, ones, dbias, (1, 1), scaled=False)
    if dx.numel():
        factor = call.lora_a.transpose(1, 2)
        launch_product(call, dy, call.weight.t(), ds, factor, dx, before=before, drop=drop and ds is not None)
    return gradients


def backward(dy, x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, s, keep, scale, dropout,
             needs) -> tuple[Tensor, ...]:  # fmt: skip
    """_lora_linear_bwd_triton: dx, dweight, dlora_a, dlora_b, dbias; those not needed are empty."""
    with on_device(x):
        call = call_of(x, weight, lora_a, lora_b, bias, scales, adapter_index, seed, scale, dropout)
        gradients = launch_backward(call, dy, s, bias, needs)
    like = (x, weight, lora_a, lora_b)
    shaped = [g.view(t.shape) if needed else g for g, t, needed in zip(gradients, like, needs, strict=False)]
    return *shaped, gradients[4]


def backward_stacked(dys, x, weights, lora_a, lora_b, biases, seed, saved, scales, dropout, needs) -> list[Tensor]:
    """_lora_linear_stacked_bwd_triton: dx, then dweight, dlora_a, dlora_b, dbias of each projection."""
    dx = x.new_empty(x.shape if needs[0] else (0,))
    gradients, before = [dx], None
    with on_device(x):
        each = zip(dys, weights, lora_a, lora_b, biases, scales, strict=True)
        for i, (dy, weight, a, b, bias, scale) in enumerate(each):
            if dy is None:
                gradients += [(x if t is None else t).new_empty(0) for t in (weight, a, b, bias)]
                continue
            call = call_of(x, weight, a, b, bias, None, None, seed, scale, dropout, i)
            own = launch_backward(call, dy, saved[2 * i], bias, [needs[0], *needs[1 + 4 * i : 5 + 4 * i]], before)
            if needs[0]:
                before = own[0]
            gradients += [g.squeeze(0) if g.dim() == 3 else g for g in own[1:]]
    if needs[0]:
        gradients[0] = dx.zero_() if before is None else before.view(x.shape)
    return gradients

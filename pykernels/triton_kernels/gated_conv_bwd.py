"""gated_conv1d backward, by the formulas in pykernels/gated_conv.py.

Saved by forward: v and g. dh, the gradient of value and gate logit, exists once in memory, in x's dtype; the products
for dx and dweight read it. Sums over rows are sums of parts that depend on sizes alone, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_like, check_shape
from . import rows
from .gated_conv import HIGHWAY, NONE, PLAIN, Call, call_of, launch_forward, pack, random_factors
from .launch import on_device
from .tuning import autotuned, precision_of, size_key

# --- dh, dcond, sums of dh ---


@triton.jit(do_not_specialize=[
    "x_rows", "x_length", "out_rows", "out_length", "shift", "sum_rows", "seed_low", "seed_high", "threshold",
    "random_scale", "value_column", "gate_column",
])  # fmt: skip
def gate_backward(
    dy, dy_sequence, dy_row, dy_column, saved, x, x_sequence, x_row, x_column,
    bounds, mask, sequence_of_row, x_rows, x_length, dh, width, dcond, value_column, gate_column, sums, sum_rows,
    out_rows, out_length, c_out, shift, seed_low, seed_high, threshold, random_scale,
    ROWS: tl.constexpr, RESIDUAL: tl.constexpr, TANH: tl.constexpr, RANDOM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh [out_rows, 2, width], dcond where it has a row for each output row, sums [program_id(0), 2, width]."""
    column0 = tl.program_id(1) * BLOCK_N
    column = column0 + tl.arange(0, BLOCK_N)
    columns, padded = column < c_out, column < width
    begin = tl.program_id(0) * sum_rows
    value_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row0 in range(begin, tl.minimum(begin + sum_rows, out_rows), BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        inside = row < out_rows
        sequence, t, first, live = rows.place_of(
            row, inside, out_length, bounds, sequence_of_row, x_rows, x_length, ROWS
        )
        present = rows.exists(t + shift, inside, sequence, live, mask, x_length, ROWS)
        keep = present[:, None] & columns[None, :]
        wide_row, wide_sequence, line = row.to(tl.int64), sequence.to(tl.int64), (first + t).to(tl.int64)
        wide_column = column.to(tl.int64)[None, :]
        out = wide_row[:, None] * c_out + column[None, :]
        at = (wide_sequence * dy_sequence + line * dy_row)[:, None] + wide_column * dy_column
        grad = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
        v = tl.load(saved + out, mask=keep, other=0.0).to(tl.float32)
        g = tl.load(saved + out_rows.to(tl.int64) * c_out + out, mask=keep, other=0.0).to(tl.float32)
        dc = grad * g
        if TANH:
            dc *= 1.0 - v * v
        if RESIDUAL == HIGHWAY:
            at = (wide_sequence * x_sequence + (line + shift) * x_row)[:, None] + wide_column * x_column
            v -= tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
        dz = grad * v * (g * (1.0 - g))
        if RANDOM != NONE:
            dz *= random_factors(
                seed_low, seed_high, threshold, random_scale, row, column0, c_out, RANDOM, BLOCK_M, BLOCK_N
            )
        # Draws beyond the last column are no one's; 0 there keeps the padding of dh zero.
        dc, dz = tl.where(keep, dc, 0.0), tl.where(keep, dz, 0.0)
        value_sum += dc
        gate_sum += dz
        element = dh.dtype.element_ty
        dc, dz = dc.to(element), dz.to(element)
        to = dh + wide_row[:, None] * (2 * width) + column[None, :]
        tl.store(to, dc, mask=inside[:, None] & padded[None, :])
        tl.store(to + width, dz, mask=inside[:, None] & padded[None, :])
        if dcond is not None:
            to = dcond + wide_row[:, None] * (2 * c_out) + column[None, :]
            tl.store(to + value_column, dc, mask=inside[:, None] & columns[None, :])
            tl.store(to + gate_column, dz, mask=inside[:, None] & columns[None, :])
    to = sums + tl.program_id(0).to(tl.int64) * (2 * width) + column
    tl.store(to, tl.sum(value_sum, 0), mask=padded)
    tl.store(to + width, tl.sum(gate_sum, 0), mask=padded)


@triton.jit(do_not_specialize=["x_rows", "x_length", "length", "shift", "value_stride", "gate_stride"])
def column_sums(
    source, width, value_to, value_stride, gate_to, gate_stride, bounds, x_rows, x_length, length, shift, c_out,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of each sequence of source [rows, 2, width]: both halves to rows of c_out; dead rows hold 0.

    A padded sequence has `length` rows of source.
    """
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column < c_out
    if ROWS == rows.PACKED:
        first = tl.minimum(tl.maximum(tl.load(bounds + sequence), 0), x_rows).to(tl.int32)
        count = tl.minimum(tl.maximum(tl.load(bounds + sequence + 1), first), x_rows).to(tl.int32) - first
    else:
        first = sequence * length
        count = length
        if ROWS == rows.LENGTHS:
            live = tl.minimum(tl.maximum(tl.load(bounds + sequence), 0), x_length).to(tl.int32)
            count = tl.maximum(live - shift, 0)
    value_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row0 in range(0, count, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        at = source + (first + row).to(tl.int64)[:, None] * (2 * width) + column[None, :]
        inside = (row < count)[:, None] & columns[None, :]
        value_sum += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gate_sum += tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    wide_sequence = sequence.to(tl.int64)
    if value_to is not None:
        to = value_to + wide_sequence * value_stride + column
        tl.store(to, tl.sum(value_sum, 0).to(value_to.dtype.element_ty), mask=columns)
    if gate_to is not None:
        to = gate_to + wide_sequence * gate_stride + column
        tl.store(to, tl.sum(gate_sum, 0).to(gate_to.dtype.element_ty), mask=columns)


# --- dx ---


@autotuned(
    (128, 64, 64, 4, 4), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4), (64, 64, 128, 8, 3),
)  # fmt: skip
@triton.jit(do_not_specialize=[
    "x_rows", "x_length", "out_length", "taps", "dilation", "left", "shift", "size_key",
])  # fmt: skip
def input_backward(
    dh, width, packed, dy, dy_sequence, dy_row, dy_column, gates, bounds, mask, sequence_of_row, x_rows, x_length, dx,
    out_length, c_in, c_out, taps, dilation, left, shift, size_key,
    ROWS: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """dx: the transposed convolution of dh, and what the blend lets through."""
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // dh.dtype.element_ty.primitive_bitwidth
    column_tiles = tl.cdiv(c_in, BLOCK_N)
    tile = tl.program_id(0)
    row = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column < c_in
    inside = row < x_rows
    sequence, t, first, live = rows.place_of(row, inside, x_length, bounds, sequence_of_row, x_rows, x_length, ROWS)
    present = rows.exists(t, inside, sequence, live, mask, x_length, ROWS)
    # Rows of dh of this sequence: the first one, and how many; masked ones are zeros.
    if ROWS == rows.PACKED:
        first_out, outputs = first.to(tl.int64), live
    else:
        first_out, outputs = sequence.to(tl.int64) * out_length, tl.zeros_like(live) + out_length

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(2 * width, BLOCK_K)
    steps = tl.where(tl.max(present.to(tl.int32), 0) > 0, taps * blocks, 0)
    for step in range(0, steps):
        tap = step // blocks
        inner = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        out = t - rows.tap_offset(tap, dilation, left, x_rows)
        there = present & (out >= 0) & (out < outputs)
        dh_tile = tl.load(
            dh + ((first_out + out) * (2 * width))[:, None] + inner[None, :],
            mask=there[:, None] & (inner < 2 * width)[None, :],
            other=0.0,
        )
        from_packed = packed + (tap * c_in + column).to(tl.int64) * (2 * width)
        weights = tl.load(
            from_packed[None, :] + inner[:, None],
            mask=(inner < 2 * width)[:, None] & columns[None, :],
            other=0.0,
        )
        sums = tl.dot(dh_tile, weights, sums, input_precision=PRECISION)

    if RESIDUAL != PLAIN:
        out = t - shift
        blended = (present & (out >= 0) & (out < outputs))[:, None] & columns[None, :]
        at = sequence.to(tl.int64) * dy_sequence + (first + out).to(tl.int64) * dy_row
        at = at[:, None] + (column.to(tl.int64) * dy_column)[None, :]
        through = tl.load(dy + at, mask=blended, other=0.0).to(tl.float32)
        if RESIDUAL == HIGHWAY:
            at = ((first_out + out) * c_out)[:, None] + column[None, :]
            through *= 1.0 - tl.load(gates + at, mask=blended, other=0.0).to(tl.float32)
        sums += through
    to = dx + row.to(tl.int64)[:, None] * c_in + column[None, :]
    sums = tl.where(present[:, None], sums, 0.0)
    tl.store(to, sums.to(dx.dtype.element_ty), mask=inside[:, None] & columns[None, :])


# --- dweight ---


@autotuned(
    (64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 32, 64, 4, 3), (64, 32, 64, 4, 3),
    (64, 64, 128, 8, 2),
)  # fmt: skip
@triton.jit(do_not_specialize=[
    "x_rows", "x_length", "out_rows", "out_length", "taps", "dilation", "left", "shift", "split_rows",
    "size_key",
])  # fmt: skip
def weight_backward(
    dh, width, x, x_sequence, x_row, x_column, bounds, mask, sequence_of_row, x_rows, x_length, parts,
    out_rows, out_length, c_in, taps, dilation, left, shift, split_rows, size_key,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """One part of the sum over rows: parts [program_id(1), taps, 2 * width, c_in]. BLOCK_BYTES is that of rows."""
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // dh.dtype.element_ty.primitive_bitwidth
    output_tiles, input_tiles = tl.cdiv(2 * width, BLOCK_M), tl.cdiv(c_in, BLOCK_N)
    tile = tl.program_id(0)
    output = tile % output_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile // output_tiles % input_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tile // output_tiles // input_tiles
    outputs, columns = output < 2 * width, column < c_in
    offset = rows.tap_offset(tap, dilation, left, x_rows)
    wide_column = column.to(tl.int64)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = tl.program_id(1) * split_rows
    for row0 in range(begin, tl.minimum(begin + split_rows, out_rows), BLOCK_K):
        row = row0 + tl.arange(0, BLOCK_K)
        inside = row < out_rows
        sequence, t, first, live = rows.place_of(
            row, inside, out_length, bounds, sequence_of_row, x_rows, x_length, ROWS
        )
        # Rows of dh that do not exist hold zeros, but what they would be multiplied with may be NaN.
        read = t + offset
        there = rows.exists(t + shift, inside, sequence, live, mask, x_length, ROWS)
        there = rows.exists(read, there, sequence, live, mask, x_length, ROWS)
        from_dh = dh + row.to(tl.int64) * (2 * width)
        dh_tile = tl.load(from_dh[None, :] + output[:, None], mask=inside[None, :] & outputs[:, None], other=0.0)
        from_x = x + (sequence.to(tl.int64) * x_sequence + (first + read).to(tl.int64) * x_row)
        x_tile = tl.load(
            from_x[:, None] + (wide_column * x_column)[None, :], mask=there[:, None] & columns[None, :], other=0.0
        )
        sums = tl.dot(dh_tile, x_tile, sums, input_precision=PRECISION)
    line = (tl.program_id(1) * taps + tap).to(tl.int64) * (2 * width) + output
    to = parts + (line * c_in)[:, None] + column[None, :]
    tl.store(to, sums, mask=outputs[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["c_in", "c_out", "taps", "splits"])
def weight_sums(parts, value_to, gate_to, width, c_in, c_out, taps, splits, BLOCK: tl.constexpr):
    """dweight [c_out, c_in, taps] of both halves: the sum of the parts in their order. One output a program_id(0)."""
    output = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < c_in * taps
    column, tap = index // taps, index % taps
    to = output.to(tl.int64) * (c_in * taps) + index
    part = taps.to(tl.int64) * (2 * width) * c_in
    at = parts + (tap.to(tl.int64) * (2 * width) + output) * c_in + column
    if value_to is not None:
        total = tl.zeros((BLOCK,), tl.float32)
        for split in range(0, splits):
            total += tl.load(at + split * part, mask=inside, other=0.0)
        tl.store(value_to + to, total.to(value_to.dtype.element_ty), mask=inside)
    if gate_to is not None:
        total = tl.zeros((BLOCK,), tl.float32)
        for split in range(0, splits):
            total += tl.load(at + width.to(tl.int64) * c_in + split * part, mask=inside, other=0.0)
        tl.store(gate_to + to, total.to(gate_to.dtype.element_ty), mask=inside)


# --- launches ---


def rows_of_sums(out_rows: int) -> int:
    """Rows that one program of the elementwise pass takes: a function of sizes alone, as sums are cut at these."""
    return min(max(triton.cdiv(out_rows // 512, 32) * 32, 32), 1024)


def rows_of_splits(rows: int, elements: int) -> int:
    """Rows of one part of a weight's gradient of that size: enough parts to occupy a large device, of at least 256."""
    tiles = elements // (128 * 64) + 1
    parts = min(max(512 // tiles, 1), 128)
    return max(256, triton.cdiv(triton.cdiv(rows, parts), 64) * 64)


def launch_gate(call: Call, dy: Tensor, saved: Tensor, dcond: Tensor | None) -> tuple[Tensor, Tensor]:
    """dh [out_rows, 2, width] and the sums of its parts; dcond where it has a row for each output row."""
    dh = call.x.new_empty(call.out_rows, 2, call.width)
    sum_rows, block = rows_of_sums(call.out_rows), (32, 32)
    sums = call.x.new_empty(triton.cdiv(call.out_rows, sum_rows), 2, call.width, dtype=torch.float32)
    value_column, gate_column = (0, call.c_out) if call.split == "value_gate" else (call.c_out, 0)
    gate_backward[(sums.shape[0], triton.cdiv(call.width, block[1]))](
        dy, *call.lines(dy), saved, call.x, *call.lines(call.x), *call.batch.arguments(), dh, call.width,
        dcond, value_column, gate_column, sums, sum_rows, call.out_rows, call.out_length, call.c_out, call.shift,
        call.seed_low, call.seed_high, call.threshold, call.random_scale,
        ROWS=call.batch.kind, RESIDUAL=call.residual, TANH=call.tanh, RANDOM=call.random,
        BLOCK_M=block[0], BLOCK_N=block[1],
    )  # fmt: skip
    return dh, sums


def launch_sums(call: Call, source: Tensor, value_to: Tensor | None, gate_to: Tensor | None, sequences: int,
                kind: int, length: int) -> None:  # fmt: skip
    """Sums of the rows of `source` [rows, 2, width] over each sequence, to rows of value_to and gate_to."""
    block = (32, 32)
    strides = [0 if t is None or t.dim() == 1 else t.stride(0) for t in (value_to, gate_to)]
    column_sums[(sequences, triton.cdiv(call.c_out, block[1]))](
        source, call.width, value_to, strides[0], gate_to, strides[1], call.batch.bounds, call.batch.rows,
        call.batch.length, length, call.shift, call.c_out, ROWS=kind, BLOCK_M=block[0], BLOCK_N=block[1],
    )  # fmt: skip


def launch_input(call: Call, dh: Tensor, weight: Tensor, gate_weight: Tensor | None, dy: Tensor, saved: Tensor,
                 dx: Tensor) -> None:  # fmt: skip
    def grid(config: dict) -> tuple[int]:
        return (triton.cdiv(call.batch.rows, config["BLOCK_M"]) * triton.cdiv(call.c_in, config["BLOCK_N"]),)

    input_backward[grid](
        dh, call.width, pack(weight, gate_weight, call.split).view(weight.dtype), dy, *call.lines(dy), saved[1],
        *call.batch.arguments(), dx, call.out_length, call.c_in, call.c_out, call.taps, call.dilation, call.left,
        call.shift, size_key(call.batch.rows, call.c_in, call.c_out),
        ROWS=call.batch.kind, RESIDUAL=call.residual, PRECISION=precision_of(call.x.dtype),
    )  # fmt: skip


def launch_weight(call: Call, dh: Tensor, value_to: Tensor | None, gate_to: Tensor | None) -> None:
    split_rows = rows_of_splits(call.out_rows, call.taps * 2 * call.width * call.c_in)
    splits = triton.cdiv(call.out_rows, split_rows)
    parts = call.x.new_empty(splits, call.taps, 2 * call.width, call.c_in, dtype=torch.float32)

    def grid(config: dict) -> tuple[int, int]:
        tiles = triton.cdiv(2 * call.width, config["BLOCK_M"]) * triton.cdiv(call.c_in, config["BLOCK_N"])
        return tiles * call.taps, splits

    weight_backward[grid](
        dh, call.width, call.x, *call.lines(call.x), *call.batch.arguments(), parts, call.out_rows, call.out_length,
        call.c_in, call.taps, call.dilation, call.left, call.shift, split_rows,
        size_key(call.out_rows, call.c_in, call.c_out, call.taps),
        ROWS=call.batch.kind, PRECISION=precision_of(call.x.dtype),
    )  # fmt: skip
    block = 256
    weight_sums[(call.c_out, triton.cdiv(call.c_in * call.taps, block))](
        parts, value_to, gate_to, call.width, call.c_in, call.c_out, call.taps, splits, BLOCK=block
    )


def backward(dy, x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed, saved, dilation,
             padding, residual, value_act, split, gate_dropout, gate_noise, needs) -> tuple[Tensor, ...]:  # fmt: skip
    """_gated_conv_bwd_triton: dx, dweight, dbias, dgate_weight, dgate_bias, dcond; those not needed are empty.

    Without `saved` the forward is computed again.
    """
    with on_device(x):
        call = call_of(
            x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed, dilation, padding,
            residual, value_act, split, gate_dropout, gate_noise,
        )  # fmt: skip
        check_shape("dy", dy, call.out_shape)
        check_like("dy", dy, x)
        inputs = (x, weight, bias, gate_weight, gate_bias, cond)
        gradients = tuple(
            x.new_empty(t.shape if needed and t is not None else (0,)) for t, needed in zip(inputs, needs, strict=True)
        )
        dx, dweight, dbias, dgate_weight, dgate_bias, dcond = gradients
        if call.out_rows == 0 or call.c_out == 0:
            for g in gradients:
                g.zero_()
            return gradients
        if saved is None:
            saved = x.new_empty(2, *call.out_shape)
            launch_forward(call, weight, bias, gate_weight, gate_bias, cond, None, saved)
        check_shape("saved", saved, (2, *call.out_shape))
        saved = saved.contiguous()

        def both(d: Tensor, dgate: Tensor) -> tuple[Tensor | None, Tensor | None]:
            """Where the gradients of value and gate outputs go, along dimension 0; None where nobody needs them."""
            if gate_weight is not None:
                return d if d.numel() else None, dgate if dgate.numel() else None
            if not d.numel():
                return None, None
            a, b = d[: call.c_out], d[call.c_out :]
            return (a, b) if split == "value_gate" else (b, a)

        # cond has a row for each output row, or one for each sequence.
        cond_per_row = cond is not None and (cond.dim() == 2 or (cu_seqlens is None and cond.shape[1] != 1))
        dh, sums = launch_gate(call, dy, saved, dcond if cond_per_row and dcond.numel() else None)
        value_dbias, gate_dbias = both(dbias, dgate_bias)
        if value_dbias is not None or gate_dbias is not None:
            launch_sums(call, sums, value_dbias, gate_dbias, 1, rows.ALL.value, sums.shape[0])
        if dcond.numel() and not cond_per_row:
            value_dcond, gate_dcond = call.halves(dcond)
            launch_sums(call, dh, value_dcond, gate_dcond, call.batch.sequences, call.batch.kind, call.out_length)
        if dx.numel():
            launch_input(call, dh, weight, gate_weight, dy, saved, dx)
        value_dweight, gate_dweight = both(dweight, dgate_weight)
        if value_dweight is not None or gate_dweight is not None:
            launch_weight(call, dh, value_dweight, gate_dweight)
        return gradients

"""attention_pool backward, by the formulas in pykernels/attention_pool.py.

Saved by forward: scores with their largest and the sum of e^(s - largest), and the output before it is rounded. What
passes through the softmax, a and ds, is float32 for all rows; dh, the gradient of what the activations are taken of,
exists once in memory, in x's dtype. Sums over rows are sums of chunks, or of parts of dweight, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_like, check_shape
from . import rows
from .activation import activated, sigmoid
from .attention_pool import COMBINED, Call, call_of
from .attention_pool_chunks import chunk_rows, exact_dot, hidden_products, rows_of_x, x_block
from .attention_pool_scores_bwd import RETURNED, launch_scores
from .gated_conv_bwd import rows_of_splits, weight_backward, weight_sums
from .launch import on_device
from .tuning import autotuned, precision_of, size_key

# --- dh, and sums of it ---


@autotuned((64, 32, 64, 8, 4), (64, 32, 64, 8, 3))
@triton.jit(do_not_specialize=["x_rows", "x_length", "sequences", "steps", "heads", "size_key"])
def hidden_backward(
    x, x_sequence, x_row, x_column, weight, gate_weight, bias, gate_bias, query,
    bounds, mask, x_rows, x_length, sequences, steps, row_gradients, kept, dh, sums, width, hidden, padded, heads,
    size_key,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HEADS: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """dh [x_rows, halves, padded]; sums [chunks, halves + heads, padded] over a chunk's rows: of dh, then of ds u for
    each head. Where `kept` is given nothing is computed again."""
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    HALVES: tl.constexpr = 1 if gate_weight is None else 2
    chunk = tl.program_id(0)
    sequence, t, inside, present, row = chunk_rows(
        chunk, bounds, mask, x_rows, x_length, sequences, steps, ROWS, BLOCK_M
    )
    from_x = rows_of_x(x, x_sequence, x_row, sequence, t, row, ROWS)
    any_row = tl.max(present.to(tl.int32), 0) > 0
    resident = 0
    if RESIDENT and kept is None:
        resident = x_block(from_x, x_column, present, tl.arange(0, RESIDENT), width)
    element = dh.dtype.element_ty
    wide_row = row.to(tl.int64)
    to_sums = sums + chunk.to(tl.int64) * (HALVES + heads) * padded
    for unit0 in range(0, padded, BLOCK_N):
        unit = unit0 + tl.arange(0, BLOCK_N)
        real = present[:, None] & (unit < hidden)[None, :]
        if kept is None:
            value, gate = hidden_products(
                resident, from_x, x_column, present, weight, gate_weight, bias, gate_bias, unit,
                tl.where(any_row, width, 0), hidden, RESIDENT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            at = kept + (wide_row * (HALVES * hidden))[:, None] + unit[None, :]
            value = tl.load(at, mask=real, other=0.0).to(tl.float32)
            gate = value
            if gate_weight is not None:
                gate = tl.load(at + hidden, mask=real, other=0.0).to(tl.float32)
        u, slope = activated(value, ACTIVATION)
        if gate_weight is not None:
            g = sigmoid(gate)
            u *= g
            slope *= g
        u = tl.where(real, u, 0.0)
        du = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for head0 in range(0, heads, HEADS):
            head = head0 + tl.arange(0, HEADS)
            ds = tl.load(
                row_gradients + head.to(tl.int64)[None, :] * x_rows + row[:, None],
                mask=present[:, None] & (head < heads)[None, :],
                other=0.0,
            )
            exists = (head < heads)[:, None] & (unit < hidden)[None, :]
            queries = tl.load(query + head.to(tl.int64)[:, None] * hidden + unit[None, :], mask=exists, other=0.0)
            du = exact_dot(ds, queries, du, PRECISION)
            dquery = exact_dot(
                tl.trans(ds), u.to(element), tl.zeros((HEADS, BLOCK_N), tl.float32), PRECISION
            )
            to = to_sums + ((HALVES + head).to(tl.int64) * padded)[:, None] + unit[None, :]
            tl.store(to, dquery, mask=(head < heads)[:, None] & (unit < padded)[None, :])
        # By selection: what is not there may be infinite, or be multiplied by it.
        dc = tl.where(real, du * slope, 0.0)
        to = dh + (wide_row * (HALVES * padded))[:, None] + unit[None, :]
        stored = inside[:, None] & (unit < padded)[None, :]
        tl.store(to, dc.to(element), mask=stored)
        tl.store(to_sums + unit, tl.sum(dc, 0), mask=unit < padded)
        if gate_weight is not None:
            dz = tl.where(real, du * u * (1.0 - g), 0.0)
            tl.store(to + padded, dz.to(element), mask=stored)
            tl.store(to_sums + padded + unit, tl.sum(dz, 0), mask=unit < padded)


@triton.jit(do_not_specialize=["chunks", "quantities", "quantity0"])
def sum_chunks(sums, chunks, quantities, quantity0, padded, to, hidden, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """to [program_id(0), hidden]: the sums over chunks of the quantities from quantity0 on, in the order of chunks."""
    unit = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = quantity0 + tl.program_id(0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk0 in range(0, chunks, BLOCK_M):
        chunk = chunk0 + tl.arange(0, BLOCK_M)
        at = sums + ((chunk.to(tl.int64) * quantities + line) * padded)[:, None] + unit[None, :]
        total += tl.load(at, mask=(chunk < chunks)[:, None] & (unit < hidden)[None, :], other=0.0)
    at = to + tl.program_id(0).to(tl.int64) * hidden + unit
    tl.store(at, tl.sum(total, 0).to(to.dtype.element_ty), mask=unit < hidden)


# --- dx ---


@triton.jit
def add_products(sums, dh, offset, row, present, weight, column, width, hidden, line, PRECISION: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """sums + (columns of dh from `offset` on) weight; rows of dh have `line` elements."""
    for unit0 in range(0, hidden, BLOCK_K):
        unit = unit0 + tl.arange(0, BLOCK_K)
        dh_tile = tl.load(
            dh + (row.to(tl.int64) * line)[:, None] + (offset + unit)[None, :],
            mask=present[:, None] & (unit < hidden)[None, :],
            other=0.0,
        )
        weights = tl.load(
            weight + (unit.to(tl.int64) * width)[:, None] + column[None, :],
            mask=(unit < hidden)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        sums = tl.dot(dh_tile, weights, sums, input_precision=PRECISION)
    return sums


@autotuned((64, 64, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 128, 8, 3), (64, 32, 64, 8, 4))
@triton.jit(do_not_specialize=["x_rows", "x_length", "sequences", "steps", "heads", "size_key"])
def pool_input_backward(
    dh, padded, weight, gate_weight, dout, row_weights, bounds, mask, x_rows, x_length, sequences, steps, dx,
    width, hidden, heads, size_key,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """dx: dh with the weights, and the sum over heads of a dout."""
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // dh.dtype.element_ty.primitive_bitwidth
    HALVES: tl.constexpr = 1 if gate_weight is None else 2
    column_tiles = tl.cdiv(width, BLOCK_N)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sequence, t, inside, present, row = chunk_rows(
        tl.program_id(0) // column_tiles, bounds, mask, x_rows, x_length, sequences, steps, ROWS, BLOCK_M
    )
    any_row = tl.max(present.to(tl.int32), 0) > 0
    units, line = tl.where(any_row, hidden, 0), HALVES * padded
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = add_products(sums, dh, 0, row, present, weight, column, width, units, line, PRECISION, BLOCK_K)
    if gate_weight is not None:
        sums = add_products(
            sums, dh, padded, row, present, gate_weight, column, width, units, line, PRECISION, BLOCK_K
        )
    if dout is not None:
        for head0 in range(0, tl.where(any_row, heads, 0), HEADS):
            head = head0 + tl.arange(0, HEADS)
            a = tl.load(
                row_weights + head.to(tl.int64)[None, :] * x_rows + row[:, None],
                mask=present[:, None] & (head < heads)[None, :],
                other=0.0,
            )
            at = dout + ((sequence.to(tl.int64) * heads + head) * width)[:, None] + column[None, :]
            grad = tl.load(at, mask=(head < heads)[:, None] & (column < width)[None, :], other=0.0)
            sums = exact_dot(a, grad, sums, PRECISION)
    to = dx + row.to(tl.int64)[:, None] * width + column[None, :]
    sums = tl.where(present[:, None], sums, 0.0)
    tl.store(to, sums.to(dx.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


# --- launches ---


def launch_hidden(call: Call, ds: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """dh [x rows, halves, padded], and sums over chunks [chunks, halves + heads, padded]."""
    padded = triton.cdiv(call.hidden, 16) * 16
    dh = call.rows_of((call.batch.rows, call.halves, padded), call.x.dtype)
    sums = call.x.new_empty(call.chunks, call.halves + call.heads, padded, dtype=torch.float32)
    hidden_backward[(call.chunks,)](
        *call.x_arguments(), *call.layer_arguments(), *call.chunk_arguments(), ds, kept, dh, sums, call.width,
        call.hidden, padded, call.heads, size_key(call.batch.rows, call.width, call.hidden),
        ROWS=call.batch.kind, ACTIVATION=call.activation, HEADS=call.heads_together(), RESIDENT=call.resident(),
        PRECISION=precision_of(call.x.dtype),
    )  # fmt: skip
    return dh, sums


def launch_sum(call: Call, sums: Tensor, quantity: int, to: Tensor) -> None:
    """Sums over chunks to rows of `to`, [hidden] or [heads, hidden]; empty where nobody needs them."""
    if to.numel() == 0:
        return
    block = 64
    sum_chunks[(to.numel() // call.hidden, triton.cdiv(call.hidden, block))](
        sums, call.chunks, sums.shape[1], quantity, sums.shape[2], to, call.hidden, BLOCK_M=COMBINED, BLOCK_N=block
    )


def launch_input(call: Call, dh: Tensor, dout: Tensor | None, a: Tensor, dx: Tensor) -> None:
    def grid(config: dict) -> tuple[int]:
        return (call.chunks * triton.cdiv(call.width, config["BLOCK_N"]),)

    pool_input_backward[grid](
        dh, dh.shape[2], call.weight, call.gate_weight, dout, a, *call.chunk_arguments(), dx, call.width, call.hidden,
        call.heads, size_key(call.batch.rows, call.width, call.hidden),
        ROWS=call.batch.kind, HEADS=call.heads_together(), PRECISION=precision_of(call.x.dtype),
    )  # fmt: skip


def launch_weight(call: Call, dh: Tensor, dweight: Tensor | None, dgate_weight: Tensor | None) -> None:
    """By the kernels of gated_conv1d, to which this is one tap of a convolution."""
    count = call.batch.rows
    outputs = call.halves * dh.shape[2]
    split_rows = rows_of_splits(count, outputs * call.width)
    splits = triton.cdiv(count, split_rows)
    parts = call.x.new_empty(splits, outputs, call.width, dtype=torch.float32)

    def grid(config: dict) -> tuple[int, int]:
        return triton.cdiv(outputs, config["BLOCK_M"]) * triton.cdiv(call.width, config["BLOCK_N"]), splits

    weight_backward[grid](
        dh, outputs // 2, *call.x_arguments(), *call.batch.arguments(), parts, count, call.batch.length, call.width,
        1, 1, 0, 0, split_rows, size_key(count, call.width, outputs, 1),
        ROWS=call.batch.kind, PRECISION=precision_of(call.x.dtype),
    )  # fmt: skip
    block = 256
    weight_sums[(call.hidden, triton.cdiv(call.width, block))](
        parts, dweight, dgate_weight, outputs // 2, call.width, call.hidden, 1, splits, BLOCK=block
    )


def backward(dout, dscores, x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, scores, max_sum,
             pooled, kept, activation, return_scores, needs) -> tuple[Tensor, ...]:  # fmt: skip
    """_attention_pool_bwd_triton: dx, dweight, dquery, dbias, dgate_weight, dgate_bias; those not needed are empty.

    Without `kept` what the activations are taken of is computed again.
    """
    with on_device(x):
        call = call_of(
            x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation, return_scores
        )
        check_shape("dout", dout, call.out_shape)
        check_like("dout", dout, x)
        if dscores is not None and return_scores == "none":
            raise ValueError("dscores: expected None where no scores are returned, got a tensor")
        check_shape("dscores", dscores, call.score_shape)
        check_shape("scores", scores, call.score_shape)
        check_shape("max_sum", max_sum, (call.out_shape[0], call.heads, 2))
        check_shape("pooled", pooled, call.out_shape)
        check_shape("kept", kept, (call.batch.rows, call.halves * call.hidden))
        for name, t in (("dscores", dscores), ("scores", scores), ("max_sum", max_sum), ("pooled", pooled)):
            if t is not None and t.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {t.dtype}")
        inputs = (x, weight, query, bias, gate_weight, gate_bias)
        gradients = tuple(
            x.new_empty(t.shape if needed and t is not None else (0,)) for t, needed in zip(inputs, needs, strict=True)
        )
        if call.batch.rows == 0 or call.batch.sequences == 0 or call.heads == 0:
            for g in gradients:
                g.zero_()
            return gradients
        dx, dweight, dquery, dbias, dgate_weight, dgate_bias = gradients
        dout, dscores, kept = (None if t is None else t.contiguous() for t in (dout, dscores, kept))
        a, ds = launch_scores(
            call, dout, dscores, scores.contiguous(), max_sum.contiguous(), pooled.contiguous(), RETURNED[return_scores]
        )
        dh, sums = launch_hidden(call, ds, kept)
        launch_sum(call, sums, 0, dbias)
        launch_sum(call, sums, 1, dgate_bias)
        launch_sum(call, sums, call.halves, dquery)
        if dx.numel():
            if call.batch.kind == rows.PACKED.value:
                dx.zero_()  # rows that are in no sequence
            launch_input(call, dh, dout, a, dx)
        if dweight.numel() or dgate_weight.numel():
            launch_weight(
                call, dh, dweight if dweight.numel() else None, dgate_weight if dgate_weight.numel() else None
            )
        return gradients

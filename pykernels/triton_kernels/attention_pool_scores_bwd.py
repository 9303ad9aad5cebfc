"""attention_pool backward up to the scores: a and ds of all rows, float32, from what forward saved of the softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows
from .attention_pool import Call
from .attention_pool_chunks import CHUNK, chunk_rows, rows_of_x, weights_of_rows, x_block
from .tuning import precision_of

NOT_RETURNED, RAW, SOFTMAX = (tl.constexpr(i) for i in range(3))
RETURNED = {"none": NOT_RETURNED.value, "raw": RAW.value, "softmax": SOFTMAX.value}

# --- kernels ---


@triton.jit(do_not_specialize=["x_rows", "x_length", "heads"])
def weight_gradient_means(
    dout, dscores, scores, pooled, max_sum, bounds, mask, x_rows, x_length, delta, width, heads,
    ROWS: tl.constexpr, RETURNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [sequences, heads]: the sum of a da over the rows of a sequence, dout . pooled and what dscores adds."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sums = tl.zeros((BLOCK,), tl.float32)
    if dout is not None:
        at = tl.program_id(0).to(tl.int64) * width
        for column0 in range(0, width, BLOCK):
            column = column0 + tl.arange(0, BLOCK)
            grad = tl.load(dout + at + column, mask=column < width, other=0.0).to(tl.float32)
            sums += grad * tl.load(pooled + at + column, mask=column < width, other=0.0).to(tl.float32)
    if RETURNED == SOFTMAX and dscores is not None:
        first, live = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + x_length
        if ROWS == rows.PACKED:
            first = rows.cut(tl.load(bounds + sequence), 0, x_rows)
            live = rows.cut(tl.load(bounds + sequence + 1), first, x_rows) - first
            base = head.to(tl.int64) * x_rows + first
        else:
            base = tl.program_id(0).to(tl.int64) * x_length
            if ROWS == rows.LENGTHS:
                live = rows.cut(tl.load(bounds + sequence), 0, x_length)
        largest = tl.load(max_sum + 2 * tl.program_id(0).to(tl.int64))
        total = tl.load(max_sum + 2 * tl.program_id(0).to(tl.int64) + 1)
        for t0 in range(0, live, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            present = rows.exists(t, t < live, sequence, live, mask, x_length, ROWS)
            a = tl.exp(tl.load(scores + base + t, mask=present, other=0.0) - largest) / total
            grad = tl.load(dscores + base + t, mask=present, other=0.0)
            sums += tl.where(present, a * grad, 0.0)
    tl.store(delta + tl.program_id(0), tl.sum(sums, 0))


@triton.jit(do_not_specialize=["x_rows", "x_length", "sequences", "steps", "heads"])
def score_gradients(
    x, x_sequence, x_row, x_column, dout, dscores, scores, max_sum, delta,
    bounds, mask, x_rows, x_length, sequences, steps, row_weights, row_gradients, width, heads,
    ROWS: tl.constexpr, RETURNED: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """a and ds of all rows, [heads, x_rows]; 0 where they do not live."""
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists = head < heads
    sequence, t, inside, present, row = chunk_rows(
        tl.program_id(0), bounds, mask, x_rows, x_length, sequences, steps, ROWS, BLOCK_M
    )
    of_head = sequence.to(tl.int64) * heads + head
    live = present[:, None] & exists[None, :]
    if ROWS == rows.PACKED:
        at = head.to(tl.int64)[None, :] * x_rows + row[:, None]
    else:
        at = of_head[None, :] * x_length + t[:, None]
    da = tl.zeros((BLOCK_M, HEADS), tl.float32)
    if dout is not None:
        from_x = rows_of_x(x, x_sequence, x_row, sequence, t, row, ROWS)
        columns = tl.where(tl.max(present.to(tl.int32), 0) > 0, width, 0)
        for column0 in range(0, columns, BLOCK_K):
            column = column0 + tl.arange(0, BLOCK_K)
            x_tile = x_block(from_x, x_column, present, column, width)
            grad = tl.load(
                dout + (of_head * width)[None, :] + column[:, None],
                mask=(column < width)[:, None] & exists[None, :],
                other=0.0,
            )
            da = tl.dot(x_tile, grad, da, input_precision=PRECISION)
    if dscores is not None:
        dscore = tl.load(dscores + at, mask=live, other=0.0)
        if RETURNED == SOFTMAX:
            da += dscore
    a = weights_of_rows(scores, max_sum, at, sequence, head, live, heads)
    ds = a * (da - tl.load(delta + of_head, mask=exists, other=0.0)[None, :])
    if dscores is not None and RETURNED == RAW:
        ds += dscore
    to = head.to(tl.int64)[None, :] * x_rows + row[:, None]
    stored = inside[:, None] & exists[None, :]
    tl.store(row_weights + to, a, mask=stored)
    tl.store(row_gradients + to, tl.where(live, ds, 0.0), mask=stored)


# --- launch ---


def launch_scores(call: Call, dout: Tensor | None, dscores: Tensor | None, scores: Tensor, max_sum: Tensor,
                  pooled: Tensor, returned: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """a and ds, [heads, x rows]."""
    b = call.batch
    delta, a, ds = (
        call.x.new_empty(shape, dtype=torch.float32)
        for shape in ((b.sequences, call.heads), (call.heads, b.rows), (call.heads, b.rows))
    )
    weight_gradient_means[(b.sequences * call.heads,)](
        dout, dscores, scores, pooled, max_sum, b.bounds, b.mask, b.rows, b.length, delta, call.width, call.heads,
        ROWS=b.kind, RETURNED=returned, BLOCK=512,
    )  # fmt: skip
    score_gradients[(call.chunks, call.head_groups())](
        *call.x_arguments(), dout, dscores, scores, max_sum, delta, *call.chunk_arguments(), a, ds, call.width,
        call.heads, ROWS=b.kind, RETURNED=returned, HEADS=call.heads_together(), PRECISION=precision_of(call.x.dtype),
        BLOCK_M=CHUNK, BLOCK_BYTES=128,
    )  # fmt: skip
    return a, ds

"""attention_pool forward: one program scores 64 rows of a sequence, a chunk, and sums them with their weights.

Each chunk counts against its own largest score; another kernel puts the chunks of a sequence together in their order.
What a sequence gives depends neither on its neighbours nor on padding behind it, nor on which configuration is the
fastest: products with queries and with weights of rows are matrix products too, whose sums have one order. Backward is
in attention_pool_bwd.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_attention_pool
from . import rows
from .activation import GELU, RELU, SWISH, TANH, activated, sigmoid
from .attention_pool_chunks import (
    CHUNK,
    chunk_rows,
    exact_dot,
    hidden_products,
    rows_of_x,
    sequence_chunks,
    weights_of_rows,
    x_block,
)
from .launch import on_device
from .tuning import autotuned, precision_of, size_key

ACTIVATIONS = {"tanh": TANH.value, "swish": SWISH.value, "relu": RELU.value, "gelu": GELU.value}
MOST_HEADS = 64  # that a program takes
RESIDENT_BYTES = 512  # of rows that a program keeps while it goes through the hidden units
COMBINED = 32  # chunks that are added up beside each other

# --- kernels ---


# One width of tiles: a score is a sum over the units of a tile, then over tiles.
@autotuned((64, 64, 64, 8, 3), (64, 64, 64, 8, 4), (64, 64, 64, 8, 5))
@triton.jit(do_not_specialize=["x_rows", "x_length", "sequences", "steps", "heads", "keep", "size_key"])
def attention_pool_forward(
    x, x_sequence, x_row, x_column, weight, gate_weight, bias, gate_bias, query,
    bounds, mask, x_rows, x_length, sequences, steps, scores, kept, parts, ends, width, hidden, heads, keep, size_key,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HEADS: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """scores, kept; parts [chunks, heads, width] and ends [chunks, heads, 2]: sums of e^(s - largest) x, the largest,
    and the sum of e^(s - largest), 0 where no row lives."""
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    chunk = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists = head < heads
    sequence, t, inside, present, row = chunk_rows(
        chunk, bounds, mask, x_rows, x_length, sequences, steps, ROWS, BLOCK_M
    )
    from_x = rows_of_x(x, x_sequence, x_row, sequence, t, row, ROWS)
    resident = 0
    if RESIDENT:
        resident = x_block(from_x, x_column, present, tl.arange(0, RESIDENT), width)

    s = tl.zeros((BLOCK_M, HEADS), tl.float32)
    units = tl.where(tl.max(present.to(tl.int32), 0) > 0, hidden, 0)
    for unit0 in range(0, units, BLOCK_N):
        unit = unit0 + tl.arange(0, BLOCK_N)
        value, gate = hidden_products(
            resident, from_x, x_column, present, weight, gate_weight, bias, gate_bias, unit, width, hidden,
            RESIDENT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if keep:
            GATES: tl.constexpr = 1 if gate_weight is None else 2
            to = kept + row.to(tl.int64)[:, None] * (GATES * hidden) + unit[None, :]
            stored = present[:, None] & (unit < hidden)[None, :]
            tl.store(to, value.to(kept.dtype.element_ty), mask=stored)
            if gate_weight is not None:
                tl.store(to + hidden, gate.to(kept.dtype.element_ty), mask=stored)
        u, _ = activated(value, ACTIVATION)
        if gate_weight is not None:
            u *= sigmoid(gate)
        at = query + head.to(tl.int64)[None, :] * hidden + unit[:, None]
        queries = tl.load(at, mask=exists[None, :] & (unit < hidden)[:, None], other=0.0)
        # Units that do not exist have zeros in the queries, but may be infinite where activations are.
        s = exact_dot(tl.where((unit < hidden)[None, :], u, 0.0), queries, s, PRECISION)

    live = present[:, None] & exists[None, :]
    s = tl.where(live, s, 0.0)
    if scores is not None:
        if ROWS == rows.PACKED:
            at = head.to(tl.int64)[None, :] * x_rows + row[:, None]
        else:
            at = (sequence.to(tl.int64) * heads + head)[None, :] * x_length + t[:, None]
        tl.store(scores + at, s, mask=inside[:, None] & exists[None, :])
    largest = tl.max(tl.where(live, s, float("-inf")), 0)
    some = tl.max(live.to(tl.int32), 0) > 0
    largest = tl.where(some, largest, 0.0)
    e = tl.where(live, tl.exp(s - largest[None, :]), 0.0)
    of_head = chunk.to(tl.int64) * heads + head
    tl.store(ends + 2 * of_head, largest, mask=exists)
    tl.store(ends + 2 * of_head + 1, tl.sum(e, 0), mask=exists)
    e = tl.trans(e)
    to = parts + (of_head * width)[:, None]
    if RESIDENT:
        column = tl.arange(0, RESIDENT)
        part = exact_dot(e, resident, tl.zeros((HEADS, RESIDENT), tl.float32), PRECISION)
        tl.store(to + column[None, :], part, mask=exists[:, None] & (column < width)[None, :])
    else:
        # These rows are in a cache since the products.
        for column0 in range(0, width, BLOCK_K):
            column = column0 + tl.arange(0, BLOCK_K)
            x_tile = x_block(from_x, x_column, present, column, width)
            part = exact_dot(e, x_tile, tl.zeros((HEADS, BLOCK_K), tl.float32), PRECISION)
            tl.store(to + column[None, :], part, mask=exists[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["x_rows", "x_length", "heads"])
def combine_chunks(
    parts, ends, bounds, x_rows, x_length, out, pooled, max_sum, width, heads,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out, pooled, max_sum of one sequence and head (program_id(0)), from its chunks in their order."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk0, chunks = sequence_chunks(sequence, bounds, x_rows, x_length, ROWS, CHUNK)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for number0 in range(0, chunks, BLOCK_M):
        number = number0 + tl.arange(0, BLOCK_M)
        at = ends + 2 * ((chunk0 + number).to(tl.int64) * heads + head)
        here = tl.load(at + 1, mask=number < chunks, other=0.0) != 0.0  # NaN counts
        largest = tl.where(here, tl.maximum(largest, tl.load(at, mask=number < chunks, other=0.0)), largest)
    top = tl.max(largest, 0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number0 in range(0, chunks, BLOCK_M):
        number = number0 + tl.arange(0, BLOCK_M)
        of_head = (chunk0 + number).to(tl.int64) * heads + head
        own = tl.load(ends + 2 * of_head, mask=number < chunks, other=0.0)
        own_sum = tl.load(ends + 2 * of_head + 1, mask=number < chunks, other=0.0)
        scale = tl.where(own_sum != 0.0, tl.exp(own - top), 0.0)
        total += scale * own_sum
        inside = (number < chunks)[:, None] & (column < width)[None, :]
        sums += scale[:, None] * tl.load(parts + (of_head * width)[:, None] + column[None, :], mask=inside, other=0.0)
    all_sum = tl.sum(total, 0)
    result = tl.where(all_sum != 0.0, tl.sum(sums, 0) / all_sum, 0.0)
    to = tl.program_id(0).to(tl.int64) * width + column
    tl.store(out + to, result.to(out.dtype.element_ty), mask=column < width)
    if pooled is not None:
        tl.store(pooled + to, result, mask=column < width)
    first = tl.program_id(1) == 0
    tl.store(max_sum + 2 * tl.program_id(0).to(tl.int64), tl.where(all_sum != 0.0, top, 0.0), mask=first)
    tl.store(max_sum + 2 * tl.program_id(0).to(tl.int64) + 1, all_sum, mask=first)


@triton.jit(do_not_specialize=["x_rows", "x_length", "sequences", "steps", "heads"])
def normalize_scores(
    scores, max_sum, weights, bounds, mask, x_rows, x_length, sequences, steps, heads,
    ROWS: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    sequence, t, inside, present, row = chunk_rows(
        tl.program_id(0), bounds, mask, x_rows, x_length, sequences, steps, ROWS, CHUNK
    )
    if ROWS == rows.PACKED:
        at = head.to(tl.int64)[None, :] * x_rows + row[:, None]
    else:
        at = (sequence.to(tl.int64) * heads + head)[None, :] * x_length + t[:, None]
    exists = (head < heads)[None, :]
    a = weights_of_rows(scores, max_sum, at, sequence, head, present[:, None] & exists, heads)
    tl.store(weights + at, a, mask=inside[:, None] & exists)


# --- launches ---


class Call(NamedTuple):
    """One call of attention_pool as the kernels see it."""

    x: Tensor
    batch: rows.Batch
    weight: Tensor
    gate_weight: Tensor | None
    bias: Tensor | None
    gate_bias: Tensor | None
    query: Tensor  # [heads, hidden]
    width: int
    hidden: int
    heads: int
    halves: int  # 2 with a gate, else 1
    activation: int
    chunks: int
    out_shape: tuple[int, ...]
    score_shape: tuple[int, ...]

    def x_arguments(self) -> tuple[Tensor, int, int, int]:
        """x with its strides from sequence to sequence, row to row and column to column."""
        return self.x, *self.lines()

    def lines(self) -> tuple[int, int, int]:
        return (0 if self.x.dim() == 2 else self.x.stride(0)), self.x.stride(-2), self.x.stride(-1)

    def layer_arguments(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.gate_weight, self.bias, self.gate_bias, self.query

    def chunk_arguments(self) -> tuple[Tensor | int | None, ...]:
        """What chunk_rows takes: bounds, mask, x_rows, x_length, sequences, steps."""
        b = self.batch
        return b.bounds, b.mask, b.rows, b.length, b.sequences, max(0, b.sequences).bit_length()

    def heads_together(self) -> int:
        return min(MOST_HEADS, max(16, triton.next_power_of_2(self.heads)))

    def head_groups(self) -> int:
        return triton.cdiv(self.heads, self.heads_together())

    def resident(self) -> int:
        """Columns of rows that are kept; 0 where they are too wide, and in float32, whose products without tensor
        cores are written out in full for so many columns."""
        columns = max(16, triton.next_power_of_2(self.width))
        kept = self.x.dtype != torch.float32 and columns * self.x.element_size() <= RESIDENT_BYTES
        return columns if kept else 0

    def rows_of(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """For values of rows. Of packed ones no chunk has those that are in no sequence, as cu_seqlens may wrongly
        leave some."""
        make = self.x.new_zeros if self.batch.kind == rows.PACKED.value else self.x.new_empty
        return make(shape, dtype=dtype)


def call_of(x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation,
            return_scores) -> Call:  # fmt: skip
    """Checks the arguments of the raw operators, which are those of pykernels._checks.check_attention_pool."""
    told = rows.checkable(mask, lengths, cu_seqlens)
    out_shape, score_shape = check_attention_pool(
        x, weight, query, bias, gate_weight, gate_bias, told[0], told[1], told[2], activation, return_scores
    )
    batch = rows.batch_of(x, mask, lengths, cu_seqlens)
    if cu_seqlens is None:
        chunks = batch.sequences * triton.cdiv(batch.length, CHUNK)
    else:
        chunks = batch.rows // CHUNK + batch.sequences
    query = query if query.dim() == 2 else query.unsqueeze(0)
    return Call(
        x=x,
        batch=batch,
        weight=weight.contiguous(),
        gate_weight=None if gate_weight is None else gate_weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        gate_bias=None if gate_bias is None else gate_bias.contiguous(),
        query=query.contiguous(),
        width=x.shape[-1],
        hidden=weight.shape[0],
        heads=query.shape[0],
        halves=1 if gate_weight is None else 2,
        activation=ACTIVATIONS[activation],
        chunks=chunks,
        out_shape=out_shape,
        score_shape=score_shape,
    )


def launch_forward(call: Call, out: Tensor, scores: Tensor | None, weights: Tensor | None, max_sum: Tensor,
                   pooled: Tensor | None, kept: Tensor | None) -> None:  # fmt: skip
    parts = call.x.new_empty(max(1, call.chunks), call.heads, call.width, dtype=torch.float32)
    ends = call.x.new_empty(max(1, call.chunks), call.heads, 2, dtype=torch.float32)
    kind, heads = call.batch.kind, call.heads_together()
    if call.chunks:
        attention_pool_forward[(call.chunks, call.head_groups())](
            *call.x_arguments(), *call.layer_arguments(), *call.chunk_arguments(), scores,
            out if kept is None else kept, parts, ends, call.width, call.hidden, call.heads, int(kept is not None),
            size_key(call.batch.rows, call.width, call.hidden),
            ROWS=kind, ACTIVATION=call.activation, HEADS=heads, RESIDENT=call.resident(),
            PRECISION=precision_of(call.x.dtype),
        )  # fmt: skip
    block = 64
    combine_chunks[(call.batch.sequences * call.heads, max(1, triton.cdiv(call.width, block)))](
        parts, ends, call.batch.bounds, call.batch.rows, call.batch.length, out, pooled, max_sum, call.width,
        call.heads, ROWS=kind, CHUNK=CHUNK, BLOCK_M=COMBINED, BLOCK_N=block,
    )  # fmt: skip
    if weights is not None and call.chunks:
        normalize_scores[(call.chunks, call.head_groups())](
            scores, max_sum, weights, *call.chunk_arguments(), call.heads, ROWS=kind, HEADS=heads, CHUNK=CHUNK
        )


def forward(x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation, return_scores, save,
            keep) -> tuple[Tensor, ...]:  # fmt: skip
    """_attention_pool_fwd_triton: out, scores, weights, max_sum, pooled, kept; those that nobody needs are empty."""
    with on_device(x):
        call = call_of(
            x, weight, query, bias, gate_weight, gate_bias, mask, lengths, cu_seqlens, activation, return_scores
        )
        scored, returned = save or return_scores != "none", return_scores == "softmax"
        unrounded = save and x.dtype != torch.float32
        out = x.new_empty(call.out_shape)
        scores = call.rows_of(call.score_shape if scored else (0,), torch.float32)
        weights = call.rows_of(call.score_shape if returned else (0,), torch.float32)
        max_sum = x.new_empty((call.out_shape[0], call.heads, 2), dtype=torch.float32)
        pooled = x.new_empty(call.out_shape if unrounded else (0,), dtype=torch.float32)
        # What the activations are taken of is made for rows that live.
        kept = x.new_zeros((math.prod(x.shape[:-1]), call.halves * call.hidden) if keep else (0,))
        if call.batch.sequences and call.heads:
            launch_forward(
                call, out, scores if scored else None, weights if returned else None, max_sum,
                pooled if unrounded else None, kept if keep else None,
            )  # fmt: skip
        return out, scores, weights, max_sum, pooled, kept

"""What attention_pool's kernels share: chunks of a sequence's rows, products with them, and weights of scored rows."""

import triton
import triton.language as tl

from . import rows

CHUNK = 64  # rows; what a warpgroup multiplies with

# --- chunks ---


@triton.jit
def chunk_place(chunk, bounds, x_rows, x_length, sequences, steps, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk's sequence, the sequence's first row among packed rows (else 0), how many rows it has that are no
    padding, and the chunk's number in it. Of packed rows sequence b has chunks from (its first row) // CHUNK + b on.
    """
    if ROWS == rows.PACKED:
        low, high = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + sequences
        for _ in range(steps):
            middle = (low + high) // 2
            begun = rows.cut(tl.load(bounds + middle), 0, x_rows) // CHUNK + middle <= chunk
            apart = high - low > 1
            low, high = tl.where(apart & begun, middle, low), tl.where(apart & (begun == 0), middle, high)
        sequence = low
        first = rows.cut(tl.load(bounds + sequence), 0, x_rows)
        live = rows.cut(tl.load(bounds + sequence + 1), first, x_rows) - first
        number = chunk - (first // CHUNK + sequence)
    else:
        chunks = tl.cdiv(x_length, CHUNK)
        sequence, first = chunk // chunks, tl.zeros((), tl.int32)
        number = chunk - sequence * chunks
        live = first + x_length
        if ROWS == rows.LENGTHS:
            live = rows.cut(tl.load(bounds + sequence), 0, x_length)
    return sequence, first, live, number


@triton.jit
def chunk_rows(chunk, bounds, mask, x_rows, x_length, sequences, steps, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The chunk's sequence, the numbers t of its rows in it, which of them are there at all, which of them live, and
    their numbers among all rows of x."""
    sequence, first, live, number = chunk_place(chunk, bounds, x_rows, x_length, sequences, steps, ROWS, CHUNK)
    t = number * CHUNK + tl.arange(0, CHUNK)
    if ROWS == rows.PACKED:
        inside = (t >= 0) & (t < live)
        row = first + t
    else:
        inside = t < x_length
        row = sequence * x_length + t
    present = rows.exists(t, inside, sequence, live, mask, x_length, ROWS)
    return sequence, t, inside, present, row


@triton.jit
def rows_of_x(x, x_sequence, x_row, sequence, t, row, ROWS: tl.constexpr):
    """Where rows of x begin."""
    if ROWS == rows.PACKED:
        return x + row.to(tl.int64) * x_row
    return x + (sequence.to(tl.int64) * x_sequence + t.to(tl.int64) * x_row)


@triton.jit
def sequence_chunks(sequence, bounds, x_rows, x_length, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The number of a sequence's first chunk, and how many have rows that are no padding."""
    if ROWS == rows.PACKED:
        first = rows.cut(tl.load(bounds + sequence), 0, x_rows)
        live = rows.cut(tl.load(bounds + sequence + 1), first, x_rows) - first
        return first // CHUNK + sequence, tl.cdiv(live, CHUNK)
    live = tl.zeros((), tl.int32) + x_length
    if ROWS == rows.LENGTHS:
        live = rows.cut(tl.load(bounds + sequence), 0, x_length)
    return sequence * tl.cdiv(x_length, CHUNK), tl.cdiv(live, CHUNK)


# --- products and weights ---


@triton.jit
def x_block(from_x, x_column, present, column, width):
    at = from_x[:, None] + (column.to(tl.int64) * x_column)[None, :]
    return tl.load(at, mask=present[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def exact_dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b, with a in float32; it keeps most of its digits as two numbers of b's type."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, sums, input_precision=PRECISION)
    high = a.to(b.dtype)
    low = (a - high.to(tl.float32)).to(b.dtype)
    return tl.dot(low, b, tl.dot(high, b, sums))


@triton.jit
def transposed_weights(weight, unit, inner, width, hidden):
    """weight [hidden, width] as [inner, unit]."""
    at = weight + unit.to(tl.int64)[None, :] * width + inner[:, None]
    return tl.load(at, mask=(inner < width)[:, None] & (unit < hidden)[None, :], other=0.0)


@triton.jit
def hidden_products(
    resident, from_x, x_column, present, weight, gate_weight, bias, gate_bias, unit, width, hidden,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the activations are taken of, for these units, and the gates' logits where there is a gate_weight.

    RESIDENT: columns of `resident`, the rows themselves; 0 where they are read for each tile of units.
    """
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if RESIDENT:
        inner = tl.arange(0, RESIDENT)
        weights = transposed_weights(weight, unit, inner, width, hidden)
        value = tl.dot(resident, weights, value, input_precision=PRECISION)
        if gate_weight is not None:
            weights = transposed_weights(gate_weight, unit, inner, width, hidden)
            gate = tl.dot(resident, weights, gate, input_precision=PRECISION)
    else:
        for inner0 in range(0, width, BLOCK_K):
            inner = inner0 + tl.arange(0, BLOCK_K)
            x_tile = x_block(from_x, x_column, present, inner, width)
            weights = transposed_weights(weight, unit, inner, width, hidden)
            value = tl.dot(x_tile, weights, value, input_precision=PRECISION)
            if gate_weight is not None:
                weights = transposed_weights(gate_weight, unit, inner, width, hidden)
                gate = tl.dot(x_tile, weights, gate, input_precision=PRECISION)
    if bias is not None:
        value += tl.load(bias + unit, mask=unit < hidden, other=0.0).to(tl.float32)[None, :]
    if gate_bias is not None:
        gate += tl.load(gate_bias + unit, mask=unit < hidden, other=0.0).to(tl.float32)[None, :]
    return value, gate


@triton.jit
def weights_of_rows(scores, max_sum, at, sequence, head, live, heads):
    """a of rows with these scores [rows, HEADS]; 0 where they do not live."""
    of_head = max_sum + 2 * (sequence.to(tl.int64) * heads + head)
    s = tl.load(scores + at, mask=live, other=0.0)
    largest = tl.load(of_head, mask=head < heads, other=0.0)
    total = tl.load(of_head + 1, mask=head < heads, other=1.0)
    return tl.where(live, tl.exp(s - largest[None, :]) / total[None, :], 0.0)

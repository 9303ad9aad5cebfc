"""The random bits of pykernels.random_bits inside a kernel."""

import triton
import triton.language as tl


@triton.jit
def words_of_calls(seed_low, seed_high, call, stream, step):
    """The four words of calls of Philox. seed_low, seed_high: int32; call: int64 of any shape; stream, step: uint32."""
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    key_low, key_high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    return tl.philox_impl(low, high, zero + stream, zero + step, key_low, key_high)


@triton.jit
def draws_of_calls(seed_low, seed_high, call, stream, step):
    """The eight 16-bit draws of calls of Philox, uint32 of the shape of `call` with (2, 2, 2) behind it."""
    w0, w1, w2, w3 = words_of_calls(seed_low, seed_high, call, stream, step)
    # Each join adds the next lower bit of the draw's number, 2 w + half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def draws_at(seed_low, seed_high, element, stream, step):
    """The draws of any elements, int64 -> uint32 of the same shape."""
    w0, w1, w2, w3 = words_of_calls(seed_low, seed_high, element // 8, stream, step)
    word = tl.where(element & 4 == 0, tl.where(element & 2 == 0, w0, w1), tl.where(element & 2 == 0, w2, w3))
    return tl.where(element & 1 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def activation_draws(seed_low, seed_high, row, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, stream=0):
    """The 16-bit draws of ROWS rows and COLUMNS columns from `column` on, a multiple of 8 like COLUMNS, of activations
    [..., columns]. seed_low, seed_high: int32. row: [ROWS] -> [ROWS, COLUMNS] uint32. One call of Philox makes eight.
    """
    call = row.to(tl.int64)[:, None] * tl.cdiv(columns, 8) + (column // 8 + tl.arange(0, COLUMNS // 8))[None, :]
    return tl.reshape(draws_of_calls(seed_low, seed_high, call, stream, 0), (ROWS, COLUMNS))


@triton.jit
def dropout_factors(draws, threshold, scale):
    """What dropout multiplies with. threshold: draws below it are kept; scale: 65536 / threshold."""
    return tl.where(draws < threshold.to(tl.uint32), scale, 0.0)


@triton.jit
def noise_factors(draws, amplitude):
    """1 + uniform noise in (-amplitude, amplitude)."""
    unit = (2 * draws + 1).to(tl.float32) * (1.0 / 65536.0) - 1.0
    # Exact in float64, then rounded: in float32 a compiler would fuse product and sum and leave out a rounding.
    return 1.0 + (unit.to(tl.float64) * amplitude).to(tl.float32)

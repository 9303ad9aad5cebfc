"""What lora_linear's kernels share: which adapter a row has, what dropout keeps, and products with what float32 holds.

Factors of float32 go into products of 16 bits as sums of 16-bit terms, so that tensor cores multiply them: what the
first term leaves of a value is the second, and what that leaves is the third.
"""

import triton
import triton.language as tl

from . import philox

# Terms of the low-rank term. The interpreter multiplies the bits of bfloat16 as integers; there one term holds all.
TERM = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)

# Columns in units of which the inner dimension is cut: a multiple of every BLOCK_K, and of what loads are aligned to.
SPLIT = tl.constexpr(128)


def cut(depth: int, most: int) -> tuple[int, int]:
    """How many times SPLIT columns a part of `depth` has, and how many parts there are; about `most`, at least one."""
    steps = triton.cdiv(triton.cdiv(depth, max(most, 1)), SPLIT.value)
    return steps, triton.cdiv(depth, steps * SPLIT.value)


@triton.jit
def adapters_of(index, row, inside, rows_per_index, adapters):
    """The adapter of each row, -1 for none: of those that are not there, and those with a number out of range."""
    if index is None:
        return tl.where(inside, 0, -1)
    else:
        e = tl.load(index + row // rows_per_index, mask=inside, other=-1)
        return tl.where((e >= 0) & (e < adapters), e, -1).to(tl.int32)


@triton.jit
def next_adapter(adapter, e, adapters):
    """The lowest adapter of these rows above e; `adapters` if there is none."""
    return tl.min(tl.where(adapter > e, adapter, adapters), 0)


@triton.jit
def scale_of(scale, scales, e):
    if scales is None:
        return scale
    else:
        return tl.load(scales + e)


@triton.jit
def keeps(seed_low, seed_high, stream, threshold, row, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile of x dropout keeps, [ROWS, COLUMNS]."""
    draws = philox.activation_draws(seed_low, seed_high, row, column, columns, ROWS, COLUMNS, stream)
    return draws < threshold.to(tl.uint32)


@triton.jit
def rest_of(v, term, lift):
    """What `term`, v rounded, leaves of v, times lift; nothing where it is not finite."""
    held = term.to(tl.float32)
    return tl.where(tl.abs(held) < float("inf"), (v - held) * lift, 0.0)


@triton.jit
def lift_of(dtype: tl.constexpr):
    """float16 loses what lies below 2^-24: its later terms are kept that many times as large, each than the one before,
    and their products are summed apart."""
    return tl.constexpr(2048.0 if dtype == tl.float16 else 1.0)


@triton.jit
def add_product(a, v, first, second, third, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Adds a v to the sums, by TERMS terms of v in a's dtype; all three are one sum for `merged`."""
    if TERMS == 1:
        first = tl.dot(a, v, first, input_precision=PRECISION)
    else:
        LIFT: tl.constexpr = lift_of(a.dtype)
        term = v.to(a.dtype)
        first = tl.dot(a, term, first)
        rest = rest_of(v, term, LIFT)
        term = rest.to(a.dtype)
        second = tl.dot(a, term, second)
        if TERMS == 3:
            third = tl.dot(a, rest_of(rest, term, LIFT).to(a.dtype), third)
    return first, second, third


@triton.jit
def merged(first, second, third, TERMS: tl.constexpr, dtype: tl.constexpr):
    if TERMS == 1:
        return first
    else:
        UNLIFT: tl.constexpr = 1.0 / lift_of(dtype)
        return first + (second + third * UNLIFT) * UNLIFT


@triton.jit
def add_low_rank(v, f, sums, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """sums + v f. v: float32. Terms of bfloat16 have the range of float32, so that nothing of float16 gets lost."""
    if EXACT:
        return tl.dot(v, f, sums, input_precision=PRECISION)
    else:
        v0 = v.to(TERM)
        v1 = rest_of(v, v0, 1.0).to(TERM)
        f0 = f.to(TERM)
        sums = tl.dot(v1, f0, sums)
        if f.dtype != TERM:
            wide = f.to(tl.float32)
            sums = tl.dot(v0, rest_of(wide, f0, 1.0).to(TERM), sums)
        return tl.dot(v0, f0, sums)

"""The kernels of test_triton.py."""

import triton
import triton.language as tl


@triton.autotune(configs=[triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 256}, num_warps=8)], key=["n"])
@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * n
    v = tl.load(x + row + i, mask=i < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def product(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    sums = tl.zeros((M, N), dtype=tl.float32)
    for k0 in range(0, k, K):
        inner = k0 + tl.arange(0, K)
        in_a = (rows[:, None] < m) & (inner[None, :] < k)
        in_b = (inner[:, None] < k) & (columns[None, :] < n)
        tile_a = tl.load(a + rows[:, None] * k + inner[None, :], mask=in_a, other=0.0)
        tile_b = tl.load(b + inner[:, None] * n + columns[None, :], mask=in_b, other=0.0)
        sums = tl.dot(tile_a, tile_b, sums)
    tl.store(c + rows[:, None] * n + columns[None, :], sums, mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def attention(q, k, v, out, length, scale, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    base = tl.program_id(1) * length * WIDTH
    rows, width = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = base + rows[:, None] * WIDTH + width[None, :]
    tile_q = tl.load(q + at, mask=rows[:, None] < length, other=0.0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, tl.minimum(length, (tl.program_id(0) + 1) * ROWS), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < length
        tile_k = tl.load(k + base + columns[None, :] * WIDTH + width[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(tile_q, tile_k) * scale * 1.44269504
        scores = tl.where(inside[None, :] & (columns[None, :] <= rows[:, None]), scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        tile_v = tl.load(v + base + columns[:, None] * WIDTH + width[None, :], mask=inside[:, None], other=0.0)
        sums = tl.dot(p.to(tile_v.dtype), tile_v, sums * shrink[:, None])
        top = new_top
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def random_bits(out, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.randint(seed, i))


@triton.jit
def scan(x, sums, ordered, total, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(sums + i, tl.cumsum(v, 0))
    tl.store(ordered + i, tl.sort(v))
    tl.atomic_add(total + i % 8, v)


@triton.jit
def unmasked_copy(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))

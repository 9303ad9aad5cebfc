"""Tile code compiled from C++: values against a bitwise model and against fp64, memory, threads, counts."""

import threading

import numpy as np
import pytest

from . import enable, needed, unavailable
from .programs import PAGE, Pages, call, config, tiles

pytestmark = pytest.mark.skipif(needed() and unavailable() is not None, reason=f"AMX emulator: {unavailable()}")

TINY = np.float32(2.0**-126)


@pytest.fixture(scope="module")
def amx():
    """The emulator; None on a CPU with AMX, where all but the tests of the emulator's own functions run natively."""
    return enable() if needed() else None


@pytest.fixture(scope="module")
def lib(amx):
    return tiles()


def bf16(values) -> np.ndarray:
    """fp32 to bf16 bits by truncation: the tests need any bf16 values, not the nearest."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fma(a, b, c) -> np.ndarray:
    """fp32 a * b + c with one rounding to nearest even; denormal operands and results are zeros.

    The product is exact in fp64. The sum is rounded there to odd (Boldo and Melquiond 2008), after which the rounding
    to fp32 is that of the exact sum. A result is denormal when it is below 2^-126 after rounding, as x86 decides.
    """
    with np.errstate(all="ignore"):
        operands = np.broadcast_arrays(a, b, c)
        a, b, c = (np.where(np.abs(v) < TINY, np.copysign(0, v), v).astype(np.float64) for v in operands)
        p = a * b
        s = p + c
        rest = (p - (s - (s - p))) + (c - (s - p))
        bits = s.view(np.int64)
        step = np.where((rest > 0) == (s > 0), 1, -1)
        s = np.where(np.isfinite(s) & (rest != 0) & (bits % 2 == 0), bits + step, bits).view(np.float64)
        denormal = np.abs((s * 2.0**64).astype(np.float32)) < 2.0**-62
        return np.where(denormal, np.copysign(np.float32(0), s.astype(np.float32)), s.astype(np.float32))


def tdpbf16ps(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c [M, N] fp32 + a [M, 2K] times b [K, N, 2], bf16 bits, in the order of Intel's pseudo-code."""
    a, b, zero = fp32(a), fp32(b), np.zeros_like(c)
    even, odd = zero, zero
    for k in range(b.shape[0]):
        even = fma(a[:, 2 * k, None], b[None, k, :, 0], even)
        odd = fma(a[:, 2 * k + 1, None], b[None, k, :, 1], odd)
    return fma(c, np.float32(1), fma(even, np.float32(1), odd))


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal bits, signs of zeros included; which NaN it is remains open."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    nan = np.isnan(want)
    return bool((np.isnan(got) == nan).all() and (got.view(np.uint32) == want.view(np.uint32))[~nan].all())


def accumulate(lib, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """tdpbf16ps by the instruction."""
    (m, n), k = c.shape, b.shape[0]
    cfg = np.frombuffer(config((3, m, 4 * n), (4, m, 4 * k), (5, k, 4 * n)), np.uint8)
    a, b, c = np.ascontiguousarray(a), np.ascontiguousarray(b), c.copy()
    call(lib.accumulate, cfg, a, 4 * k, b, 4 * n, c, 4 * n)
    return c


def gemm(lib, a: np.ndarray, b: np.ndarray, mxcsr: int | None = None) -> np.ndarray:
    """a [M, K] times b [K/2, N, 2]; with mxcsr also checks that the register is unchanged."""
    (m, k), n = a.shape, b.shape[1]
    c = np.full((m, n), np.nan, np.float32)
    arguments = a, 2 * k, b, 4 * n, c, 4 * n, m, n, k
    if mxcsr is None:
        call(lib.gemm, *arguments)
    else:
        assert call(lib.gemm_under, mxcsr, *arguments) == mxcsr
    return c


def gemm_model(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    c = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(0, a.shape[1], 32):
        c = tdpbf16ps(c, a[:, k : k + 32], b[k // 2 : k // 2 + 16])
    return c


def random_operands(m: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return bf16(rng.standard_normal((m, k))), bf16(rng.standard_normal((k // 2, n, 2)))


def test_model_of_fma_rounds_once():
    # fp64 arithmetic alone rounds twice here: 1 + 2^-24 + 2^-60 is above the tie, 1 + 2^-24 is the tie.
    assert fma(np.float32(2.0**-30), np.float32(2.0**-30), np.float32(1)) == 1
    up = fma(np.float32(1 + 2.0**-23), np.float32(2.0**-24), np.float32(1))
    assert up == np.float32(1 + 2.0**-23)
    # 24 + 24 bits whose fp64 sum falls on the tie although the exact sum is below it.
    assert fma(np.float32(2.0**-24 - 2.0**-48), np.float32(1 - 2.0**-24), np.float32(1)) == 1
    assert fma(TINY, np.float32(0.5), np.float32(0)) == 0
    assert fma(TINY, np.float32(1 - 2.0**-24), np.float32(0)) == 0
    assert np.signbit(fma(-TINY, np.float32(0.5), np.float32(0)))


ONE = [(1, 1, 1), (2, 3, 5), (7, 16, 16), (16, 5, 3), (16, 16, 1), (13, 11, 15), (16, 16, 16)]
MANY = [(1, 1, 2), (3, 7, 6), (17, 33, 34), (16, 16, 32), (31, 15, 62), (33, 17, 130), (64, 48, 256)]


@pytest.mark.parametrize("m, n, k", ONE)
def test_one_product(lib, m, n, k):
    rng = np.random.default_rng(m * 1000 + n * 10 + k)
    a, b = random_operands(m, n, 2 * k, seed=k)
    c = rng.standard_normal((m, n)).astype(np.float32)
    assert same_bits(accumulate(lib, c, a, b), tdpbf16ps(c, a, b))


@pytest.mark.parametrize("m, n, k", MANY)
def test_product_of_matrices(lib, m, n, k):
    a, b = random_operands(m, n, k)
    c = gemm(lib, a, b)
    assert same_bits(c, gemm_model(a, b))

    af, bf = fp32(a).astype(np.float64), fp32(b).astype(np.float64).transpose(0, 2, 1).reshape(k, n)
    # A product passes 16 roundings in its instruction, one where even and odd meet, one in each later instruction.
    roundings = 17 + -(-k // 32)
    bound = 1.01 * roundings * 2.0**-24 * (np.abs(af) @ np.abs(bf))
    assert (np.abs(c - af @ bf) <= bound).all()


@pytest.mark.parametrize("seed", range(4))
def test_any_bits(lib, seed):
    """All of bf16 and fp32: denormals, infinities, NaN, both zeros, overflow and underflow in every step."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2**16, (16, 32), np.uint16), rng.integers(0, 2**16, (16, 16, 2), np.uint16)
    c = rng.integers(0, 2**32, (16, 16), np.uint32).view(np.float32)
    assert same_bits(accumulate(lib, c, a, b), tdpbf16ps(c, a, b))


def test_results_around_the_smallest_normal(lib):
    rng = np.random.default_rng(0)

    def operand(low, high, shape):
        sign = rng.integers(0, 2, shape, np.uint16) << 15
        return rng.integers(low, high, shape, np.uint16) | sign

    # Exponents of a about 1, those of b and c from denormal to 2^-124.
    a, b = operand(0x3F00, 0x4000, (16, 4)), operand(0, 0x0180, (2, 16, 2))
    c = operand(0, 0x0180, (16, 16)).astype(np.uint32) << 16
    c = (c | rng.integers(0, 2**16, c.shape, np.uint32)).view(np.float32)
    want = tdpbf16ps(c, a, b)
    gradual = c.astype(np.float64) + np.einsum("mkp,knp->mn", fp32(a).reshape(16, 2, 2).astype(np.float64), fp32(b))
    flushed = (want == 0) & (gradual != 0)
    assert 16 < flushed.sum() < 240
    assert same_bits(accumulate(lib, c, a, b), want)


def one(lib, c: float, pairs: list[tuple[float, float]]) -> np.float32:
    """c + the products with ones, one row and one column."""
    a = bf16([value for pair in pairs for value in pair])[None]
    ones = bf16(np.ones((len(pairs), 1, 2)))
    return accumulate(lib, np.full((1, 1), c, np.float32), a, ones)[0, 0]


def test_order_of_roundings(lib):
    big = 2.0**24
    # Even and odd have sums of their own, and these meet before c: 2^24 + 1 rounds to 2^24.
    assert one(lib, -big, [(big, 1)]) == 0
    # The sums of one instruction start at zero, not at c: the even one rounds to 2^24 before c is added.
    assert one(lib, -big, [(big, 0), (1, 0)]) == 0
    # In the order of k: 1 is lost beside 2^24, then 2^24 leaves.
    assert one(lib, 0, [(big, 0), (1, 0), (-big, 0)]) == 0
    assert one(lib, 0, [(big, 0), (-big, 0), (1, 0)]) == 1
    # Ties to even.
    assert one(lib, big, [(1, 0)]) == big and one(lib, big + 2, [(1, 0)]) == big + 4


def test_denormals_are_zeros(lib):
    tiny = float(TINY)
    assert one(lib, tiny / 2, [(0, 0)]) == 0
    assert one(lib, tiny, [(0, 0)]) == TINY
    assert one(lib, 0, [(tiny / 2, 0)]) == 0
    assert one(lib, tiny * 1.5, [(-tiny, 0)]) == 0
    assert np.signbit(one(lib, -tiny * 1.5, [(tiny, 0)]))


@pytest.mark.parametrize("mxcsr", [0x1F80, 0x3F80, 0x5F80, 0x7F80, 0x9FC0])
def test_mxcsr_is_neither_used_nor_changed(lib, mxcsr):
    a, b = random_operands(20, 20, 64, seed=3)
    b[0, :, 0] = 1  # denormal
    assert same_bits(gemm(lib, a, b, mxcsr), gemm_model(a, b))


@pytest.mark.parametrize("hint", [0, 1])
@pytest.mark.parametrize("rows, row_bytes", [(1, 4), (3, 12), (5, 64), (15, 60), (16, 4), (16, 64)])
def test_touches_no_byte_beside_the_tile(lib, hint, rows, row_bytes):
    cfg, source, target = Pages(64), Pages(PAGE), Pages(PAGE)
    stride = row_bytes + 20
    size = stride * (rows - 1) + row_bytes
    data = np.random.default_rng(rows).integers(0, 256, size, np.uint8).tobytes()
    rows_of = [slice(i * stride, i * stride + row_bytes) for i in range(rows)]
    # At the end of readable memory, then at its start with the rows backwards.
    for at, first, step in ((source.end - size, 0, stride), (source.start, size - row_bytes, -stride)):
        source.put(data, at)
        to = target.end - size if step > 0 else target.start
        target.put(b"\xa5" * size, to)
        call(lib.copy, cfg.put(config((5, rows, row_bytes))), hint, at + first, step, to + first, step)
        want = bytearray(b"\xa5" * size)
        for row in rows_of:
            want[row] = data[row]
        assert target.get(to, size) == bytes(want)
    for pages in (cfg, source, target):
        pages.close()


def test_load_clears_the_rest_of_the_tile(amx, lib):
    if amx is None:
        pytest.skip("reads the emulator's registers, and this CPU has AMX")
    data = np.arange(1, 1025, dtype=np.uint32).view(np.uint8)[:1024].reshape(16, 64) | 1
    amx.poison(True)
    try:
        call(lib.load_config, np.frombuffer(config((5, 3, 20)), np.uint8))
        assert amx.tile(5) == b"\xff" * 1024
        call(lib.load_tile, data, 64)
        want = np.zeros((16, 64), np.uint8)
        want[:3, :20] = data[:3, :20]
        assert amx.tile(5) == want.tobytes()
        lib.zero_tile()
        assert amx.tile(5) == bytes(1024)
    finally:
        amx.poison(False)
        lib.release()
    with pytest.raises(RuntimeError, match="no tile configuration"):
        amx.tile(5)


def test_configuration_clears_all_tiles_and_can_be_stored(lib):
    stored, tile = np.ones(64, np.uint8), np.ones((2, 8), np.uint8)
    call(lib.store_config, stored)
    assert not stored.any()
    cfg = np.frombuffer(config((5, 2, 8), (7, 16, 64)), np.uint8)
    call(lib.load_config, cfg)
    call(lib.load_tile, tile, 8)
    call(lib.load_config, cfg)
    call(lib.store_config, stored)
    call(lib.store_tile, tile, 8)
    lib.release()
    assert (stored == cfg).all() and not tile.any()


def test_threads_have_tiles_of_their_own(lib):
    shapes = [(16, 16, 64), (7, 9, 34), (33, 5, 96)]
    failures = []

    def work(shape, seed):
        a, b = random_operands(*shape, seed=seed)
        want = gemm_model(a, b)
        failures.extend(i for i in range(100) if not same_bits(gemm(lib, a, b), want))

    threads = [threading.Thread(target=work, args=(shape, seed)) for seed, shape in enumerate(shapes)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_counts(amx, lib):
    if amx is None:
        pytest.skip("counts are the emulator's, and this CPU has AMX")
    before = amx.counts()
    gemm(lib, *random_operands(17, 40, 70))
    after = amx.counts()
    blocks, full, steps = 2 * 3, 2, 3
    products = blocks * steps
    want = dict.fromkeys(("LDTILECFG", "TILERELEASE", "TILEZERO", "TILESTORED"), blocks)
    want |= dict(TDPBF16PS=products, TILELOADDT1=blocks * full, TILELOADD=2 * products - blocks * full, STTILECFG=0)
    traps = after.pop("traps") - before.pop("traps")
    assert {name: after[name] - before[name] for name in after} == want
    assert blocks <= traps < sum(want.values())

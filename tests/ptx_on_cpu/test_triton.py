"""Triton's real PTX, for sm_80 and sm_90 (wgmma), on CPU tensors."""

import pytest
import torch

from . import REVERSE, KernelError, unavailable

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(unavailable(cuda=False)), reason=unavailable(cuda=False) or "")

from . import triton_kernels as kernels  # noqa: E402
from .triton_driver import active  # noqa: E402


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autotuned_add(dtype):
    x, y, out = normal(1007, dtype=dtype), normal(1007, seed=1, dtype=dtype), torch.zeros(1007, dtype=dtype)
    with active(80):
        kernels.add[lambda meta: (triton.cdiv(1007, meta["BLOCK"]),)](x, y, out, 1007)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("schedule", [0, REVERSE, 2])
def test_softmax(schedule):
    x, out = normal(5, 300), torch.full((5, 300), float("nan"))
    with active(80, schedule=schedule):
        kernels.softmax[(5,)](x, out, 300, BLOCK=512)
    torch.testing.assert_close(out, x.softmax(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_product(capability, dtype):
    m, n, k = 100, 72, 136
    a, b = normal(m, k, dtype=dtype), normal(k, n, seed=1, dtype=dtype)
    c = torch.full((m, n), float("nan"))
    with active(capability):
        kernels.product[triton.cdiv(m, 64), triton.cdiv(n, 64)](a, b, c, m, n, k, M=64, N=64, K=32, num_warps=4)
    # tf32 keeps 10 bits of fp32's mantissa.
    unit = 2.0**-10 if dtype == torch.float32 else (k + 1) * 2.0**-24
    assert ((c - a.double() @ b.double()).abs() <= unit * (a.double().abs() @ b.double().abs())).all()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention(capability, dtype):
    """On 9.0 the second product takes its left operand from registers."""
    heads, length, width = 2, 100, 64
    q, k, v = (normal(heads, length, width, seed=s, dtype=dtype) for s in range(3))
    out = torch.zeros_like(q)
    with active(capability):
        grid = (triton.cdiv(length, 64), heads)
        kernels.attention[grid](q, k, v, out, length, width**-0.5, WIDTH=width, ROWS=64, COLUMNS=64, num_warps=4)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    # float32 is multiplied as tf32, of 10 bits where bfloat16 has 7.
    allowed = 2 if dtype == torch.bfloat16 else 1 / 4
    assert (out - exact).abs().max() <= allowed * (plain - exact).abs().max()


def test_philox_bits():
    out = torch.zeros(256, dtype=torch.int32)
    with active(80):
        kernels.random_bits[(1,)](out, 12345, BLOCK=256)
    low = 0xFFFFFFFF
    for i in (0, 5, 255):
        c, k = [i, 0, 0, 0], [12345, 0]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        assert out[i].item() & low == c[0]


def test_scan_sort_and_atomics():
    x, total = normal(256).abs(), torch.zeros(8)
    sums, ordered = torch.zeros(256), torch.zeros(256)
    with active(80):
        kernels.scan[(1,)](x, sums, ordered, total, BLOCK=256)
    torch.testing.assert_close(sums, x.cumsum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(ordered, x.sort().values)
    torch.testing.assert_close(total, x.view(-1, 8).sum(0), rtol=1e-5, atol=1e-5)


def test_out_of_bounds_is_caught():
    x, out = normal(100), torch.zeros(128)
    with active(80), pytest.raises(KernelError, match="outside of the allowed memory"):
        kernels.unmasked_copy[(2,)](x, out, BLOCK=64)


def test_the_driver_before_comes_back():
    before = triton.runtime.driver._active
    with active(90):
        assert triton.runtime.driver.active.get_current_target().arch == 90
    assert triton.runtime.driver._active is before

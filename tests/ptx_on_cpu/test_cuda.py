"""nvcc's code for plain kernels, tensor cores and the toolkit's libraries, compared with NumPy and PyTorch."""

import ctypes
import math

import numpy as np
import pytest
import torch

from . import REVERSE, KernelError, build, unavailable
from .samples import source

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")
SCHEDULES = (0, REVERSE, 2, 3)


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"schedule{s}")
def schedule(request):
    return request.param


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_grid_stride_loop():
    library = build(source("basics"))
    x, y = normal(10007), normal(10007, seed=1)
    expected = torch.addcmul(y.double(), x.double(), torch.tensor(3.0).double()).float()  # fused: one rounding
    with library.runtime.bounds(y, read_only=[x]):
        library.call("axpy", x, y, 3.0, x.numel(), None)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shuffles_and_shared_memory(dtype, schedule):
    library = build(source("basics"))
    x = normal(5, 700).to(dtype)
    y = torch.full_like(x, float("nan"))
    name = "rms_norm_f32" if dtype == torch.float32 else "rms_norm_bf16"
    with library.runtime.options(schedule=schedule), library.runtime.bounds(y, read_only=[x]):
        library.call(name, x, y, 5, 700, 1e-6, None)
    expected = x.double() * (x.double().pow(2).mean(1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=1e-7)


def test_shared_atomics(schedule):
    library = build(source("basics"))
    x = torch.randint(0, 10**6, (5000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    out = torch.full((64,), -1, dtype=torch.int32)
    with library.runtime.options(schedule=schedule):
        library.call("histogram", x, 5000, out, None)
    assert torch.equal(out, torch.bincount(x % 64, minlength=64).int())


def test_calls_local_arrays_constants_and_fp64():
    library = build(source("basics"))
    n = 300
    x, y, z = normal(n), torch.zeros(n), torch.zeros(n, dtype=torch.float64)
    totals = torch.zeros(3, dtype=torch.int64)
    library.call("mixed", x, y, z, totals, n, 1, None)
    d = x.double().numpy()
    expected_z = np.exp(d) / (1 + d * d) + np.array([math.erf(v) for v in d])
    np.testing.assert_allclose(z.numpy(), expected_z, rtol=4e-15, atol=1e-15)
    expected = []
    for i in range(n):
        r = d[i] * ((i * 5 + 1) & 15) + sum(2.0**k * (d[i] * 0.1) ** k for k in range(8)) + [0, 1, 1, 2, 3, 5, 8][i % 7]
        k = 1 + i % 6
        forms = {1: r * 2, 2: abs(r) ** 0.5, 3: np.exp(-abs(r) * 0.01), 4: np.tanh(r), 5: (abs(r) + 1) ** 0.3}
        expected.append(forms.get(k, -r))
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=3e-5, atol=3e-6)
    assert totals[0] == n * (n - 1) // 2
    assert totals[1].view(torch.float64) == z.abs().max()
    assert totals[2] == 11  # cudaMemcpyToSymbol


def test_packed_halves():
    library = build(source("basics"))
    a, b = normal(64).half(), normal(64, seed=1).bfloat16()
    c, d = torch.zeros_like(a), torch.zeros_like(b)
    library.call("pairs", a, b, c, d, 32, None)
    e = (-a.abs()).float().exp()
    torch.testing.assert_close(c.float(), a.float() ** 2 + e, rtol=2e-3, atol=0)
    twice = (b + b).double()
    assert torch.equal(d, (twice * b.double() + b.double()).bfloat16())  # one rounding


def test_philox_bits():
    library = build(source("basics"))
    n, seed = 100, 0x123456789ABCDEF
    out = np.zeros((n, 4), np.uint32)
    library.call("philox", out, seed, n, None)
    m = 0xFFFFFFFF
    for i in (0, 1, 99):
        c, k = [i, 0, 0, 0], [seed & m, seed >> 32]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & m, (p0 >> 32) ^ c[3] ^ k[1], p0 & m]
            k = [(k[0] + 0x9E3779B9) & m, (k[1] + 0xBB67AE85) & m]
        assert out[i].tolist() == c


def test_votes_and_matches(schedule):
    library = build(source("basics"))
    x = (np.arange(32, dtype=np.int32) * 7) % 5
    out = np.zeros((32, 8), np.uint32)
    with library.runtime.options(schedule=schedule):
        library.call("votes", x, out, None)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    greater = int((bits * (x > 2)).sum())
    for lane in range(32):
        up = x[lane - 3] if lane >= 3 else x[lane]
        down = x[lane + 2] if lane % 8 < 6 else x[lane]
        same = int((bits * (x == x[lane])).sum())
        assert out[lane].tolist() == [greater, 2, same, 0, x.sum(), x.max(), (x > 2).sum(), up * 1000 + down]


def test_bf16_product_with_double_buffer(schedule):
    library = build(source("gemm"))
    m, n, k = 100, 72, 136
    a, b, c = normal(m, k).bfloat16(), normal(k, n, seed=1).bfloat16(), torch.full((m, n), float("nan"))
    with library.runtime.options(schedule=schedule), library.runtime.bounds(c, read_only=[a, b]):
        library.call("gemm_bf16", a, b, c, m, n, k, None)
    exact = a.double() @ b.double()
    # k + 1 additions in fp32.
    bound = (k + 1) * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert ((c - exact).abs() <= bound).all()


@pytest.mark.parametrize("step", [4, 8])
def test_tf32_product(step):
    library = build(source("gemm"))
    m, n, k = 33, 17, 20
    a, b, c = normal(m, k), normal(k, n, seed=1), torch.full((m, n), float("nan"))
    library.call("gemm_tf32", a, b, c, m, n, k, step, None)

    def tf32(x):
        bits = x.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()

    exact = tf32(a) @ tf32(b)
    assert ((c - exact).abs() <= (k + 1) * 2.0**-24 * (tf32(a).abs() @ tf32(b).abs())).all()
    assert (c - a.double() @ b.double()).abs().max() > 1e-4  # the operands were rounded


@pytest.mark.parametrize("name", ["wgmma_k_rows", "wgmma_n_rows"])
def test_wgmma(name):
    library = build(source("wgmma"), arch="90")
    a, b, c = normal(64, 64).bfloat16(), normal(64, 64, seed=1).bfloat16(), torch.full((64, 64), float("nan"))
    with library.runtime.options(capability=90):
        library.call(name, a, b, c, None)
    right = b.double().T if name == "wgmma_k_rows" else b.double()
    assert ((c - a.double() @ right).abs() <= 65 * 2.0**-24 * (a.double().abs() @ right.abs())).all()


def test_cub(schedule):
    library = build(source("libraries"))
    x = torch.randint(0, 1000, (256,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    scan, ordered = torch.zeros(128, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    with library.runtime.options(schedule=schedule):
        library.call("cub_scan_sort", x, scan, ordered, None)
    assert torch.equal(scan, (x[:128].cumsum(0) - x[:128]).int())
    assert torch.equal(ordered, x.sort().values)


def test_cooperative_groups():
    library = build(source("libraries"))
    x, total, swapped = normal(500), torch.zeros(1), torch.zeros(128)
    library.call("groups", x, total, swapped, 500, None)
    torch.testing.assert_close(total[0], x.sum(), rtol=1e-5, atol=1e-5)
    assert torch.equal(swapped, x[:128].view(-1, 2).flip(1).reshape(-1))


@pytest.mark.parametrize("name", ["wmma_f32", "wmma_f16"])
def test_wmma(name):
    library = build(source("libraries"))
    dtype = torch.float32 if name == "wmma_f32" else torch.float16
    a, b, c = normal(16, 16).half(), normal(16, 16, seed=1).half(), torch.zeros(16, 16, dtype=dtype)
    library.call(name, a, b, c, None)
    exact = 1 + a.double() @ b.double().T
    assert ((c - exact).abs() <= torch.finfo(dtype).eps * (1 + a.double().abs() @ b.double().abs().T)).all()


def test_pipeline_copies():
    library = build(source("libraries"))
    x, y = normal(64, 4), torch.zeros(64, 4)
    library.call("pipeline", x, y, None)
    assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize(
    "launch",
    [
        dict(bx=1025),
        dict(bx=32, bz=65),
        dict(bx=0),
        dict(gx=0),
        dict(gy=65536),
    ],
    ids=str,
)
def test_bad_configurations(launch):
    arguments = dict(gx=1, gy=1, bx=32, bz=1, shared=128, opt_in=0) | launch
    with pytest.raises(KernelError, match="error 9"):
        build(source("bugs")).call("launch_any", torch.zeros(2048), *arguments.values())


def test_shared_memory_limits():
    library = build(source("bugs"))
    x = torch.zeros(32)

    def launch(shared, opt_in):
        library.call("launch_any", x, 1, 1, 32, 1, shared, opt_in)

    launch(48 * 1024, 0)
    assert torch.equal(x, torch.arange(32.0).view(-1, 2).flip(1).reshape(-1))
    with pytest.raises(KernelError, match="error 1: .*dynamic shared memory exceed 49152"):
        launch(48 * 1024 + 1, 0)
    launch(100 * 1024, 100 * 1024)
    with pytest.raises(KernelError, match="error 1: .*more shared memory than a block may have"):
        launch(100, 164 * 1024)
    with library.runtime.options(capability=90):
        launch(227 * 1024, 227 * 1024)


def test_launch_bounds():
    library = build(source("bugs"))
    x = torch.zeros(96)
    library.call("launch_bounded", x, 64)
    assert x.sum() == 64
    with pytest.raises(KernelError, match="__launch_bounds__ of 64"):
        library.call("launch_bounded", x, 96)


def test_errors_do_not_stay():
    library = build(source("bugs"))
    x = torch.zeros(96)
    with pytest.raises(KernelError):
        library.call("launch_bounded", x, ctypes.c_int(96))
    library.call("launch_bounded", x, 32)
    assert library.runtime.message() == ""

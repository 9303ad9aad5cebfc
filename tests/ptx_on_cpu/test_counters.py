"""The counting build, on kernels whose traffic can be worked out by hand."""

import pytest
import torch

from . import build, unavailable
from .samples import source

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")


def aligned(n: int, dtype=torch.float32) -> torch.Tensor:
    """Zeros that start at a sector of 32 bytes."""
    raw = torch.zeros(n + 32, dtype=dtype)
    skip = -raw.data_ptr() % 128 // raw.element_size()
    return raw[skip : skip + n]


def count(sample: str, name: str, *arguments) -> dict[str, int]:
    library = build(source(sample), count=True)
    library.runtime.reset_counters()
    library.call(name, *arguments)
    return library.runtime.counters()


def test_coalesced_copy():
    c = count("counted", "copy", aligned(256), aligned(256), 4, 1)
    assert (c["launches"], c["blocks"]) == (1, 4)
    assert c["global_read_bytes"] == c["global_write_bytes"] == 1024
    assert c["global_read_sectors"] == c["unique_read_sectors"] == c["unique_write_sectors"] == 1024 // 32
    assert (c["global_requests"], c["uncoalesced_requests"]) == (16, 0)


def test_strided_copy_is_uncoalesced():
    c = count("counted", "copy", aligned(64 * 8), aligned(64), 1, 8)
    assert c["global_read_bytes"] == 256
    assert c["global_read_sectors"] == 64  # one for each element
    assert (c["global_requests"], c["uncoalesced_requests"]) == (4, 2)


def test_wide_copy():
    c = count("counted", "copy16", aligned(128), aligned(128))
    assert (c["global_read_bytes"], c["global_read_sectors"], c["global_requests"]) == (512, 16, 2)
    assert c["uncoalesced_requests"] == 0


def test_bytes_read_again_are_unique_once():
    c = count("counted", "reread", aligned(32), aligned(32))
    assert (c["global_read_bytes"], c["global_read_sectors"], c["unique_read_sectors"]) == (256, 5, 4)


@pytest.mark.parametrize("stride, conflicts", [(1, 0), (2, 1), (32, 31), (33, 0)])
def test_bank_conflicts(stride, conflicts):
    c = count("counted", "shared", aligned(32), stride)
    assert (c["shared_requests"], c["bank_conflicts"]) == (2, conflicts)
    assert c["shared_read_bytes"] == c["shared_write_bytes"] == 128


def test_operations():
    c = count("counted", "arithmetic", aligned(32), aligned(32, torch.float64))
    assert (c["fp32_flops"], c["fp64_flops"]) == (3 * 32, 32)


def test_lanes_that_leave_a_loop_early():
    c = count("counted", "divergent", aligned(128), aligned(32))
    assert c["global_read_bytes"] == 4 * 8 * (1 + 2 + 3 + 4)
    # Four turns, each a request for fewer lanes of a line of 128 bytes.
    assert c["global_requests"] == 5


def test_tensor_core_operations_and_copies():
    m = n = k = 64
    a, b, c_ = (torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(3))
    c = count("gemm", "gemm_bf16", a, b, c_.float(), m, n, k, None)
    assert c["tensor_flops"] == 2 * m * n * k
    assert c["global_read_bytes"] == 2 * 64 * 64 * 2  # cp.async, each tile once
    assert c["global_write_bytes"] == 64 * 64 * 4
    # Rows are padded by 16 bytes, which serves ldmatrix. A pass of cp.async writes two rows of a: 64 bytes at a
    # distance of 80, which meet in four banks; 64 x 64 elements take 64 passes.
    assert c["bank_conflicts"] == 64


def test_plain_builds_count_nothing():
    library = build(source("bugs"))
    library.runtime.reset_counters()
    library.call("launch_with_barrier", torch.zeros(64))
    assert not any(library.runtime.counters().values())

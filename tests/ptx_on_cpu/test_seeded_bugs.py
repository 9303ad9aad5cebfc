"""Kernels with a bug each: every one must be reported, or give NaN where the right kernel gives none."""

import pytest
import torch

from . import REVERSE, KernelError, PtxError, build, unavailable
from .ptx_parser import parse
from .samples import source
from .translate import translate

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")


def failure(kernel: str, *arguments) -> KernelError:
    with pytest.raises(KernelError) as caught:
        build(source("bugs")).call(f"launch_{kernel}", *arguments)
    return caught.value


@pytest.mark.parametrize("schedule", [0, REVERSE, 2, 3])
def test_missing_barrier_reads_poison(schedule):
    library = build(source("bugs"))
    wrong, right = torch.zeros(64), torch.zeros(64)
    with library.runtime.options(schedule=schedule):
        library.call("launch_missing_barrier", wrong)
        library.call("launch_with_barrier", right)
    assert wrong.isnan().any()
    assert torch.equal(right, torch.arange(63.0, -1, -1))


def product(*defines: str, schedule: int = 0) -> torch.Tensor:
    """gemm_bf16 of samples/gemm.cu with bugs switched on; its error against fp64."""
    library = build(source("gemm"), flags=tuple(f"-D{d}" for d in defines))
    # k and n of several steps; m short of a whole tile.
    m, n, k = 40, 64, 128
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=g).bfloat16(), torch.randn(k, n, generator=g).bfloat16()
    c = torch.zeros(m, n)
    with library.runtime.options(schedule=schedule), library.runtime.bounds(c, read_only=[a, b]):
        library.call("gemm_bf16", a, b, c, m, n, k, None)
    return (c - a.double() @ b.double()).abs()


def test_wait_off_by_one_gives_nan():
    assert product("BUG_WAIT").isnan().any()


def test_missing_barrier_in_the_loop_gives_nan():
    errors = [product("BUG_LOOP_BARRIER", schedule=s) for s in (0, REVERSE, 2, 3)]
    assert any(e.isnan().any() for e in errors)


def test_out_of_bounds_copy():
    with pytest.raises(KernelError, match="error 700: .*read of 16 bytes at .* outside of the allowed memory"):
        product("BUG_OUT_OF_BOUNDS")


def test_misaligned_ldmatrix():
    with pytest.raises(KernelError, match="error 716: .*gemm.cu:.*not aligned to 16 bytes"):
        product("BUG_MISALIGNED")


def test_the_product_without_bugs():
    assert product().max() < 1e-4


def test_out_of_bounds_read_and_write():
    library = build(source("bugs"))
    x, y = torch.zeros(40), torch.zeros(64)
    with library.runtime.bounds(y, read_only=[x]):
        library.call("launch_read_outside", x, y, 39)
        error = failure("read_outside", x, y, 40)
        assert error.code == 700 and "thread (40,0,0)" in str(error) and "bugs.cu:" in str(error)
        assert failure("write_input", x).code == 700  # read only
        library.call("launch_write_input", y)


def test_views_may_not_reach_outside_of_their_storage_only():
    library = build(source("bugs"))
    x, y = torch.zeros(80), torch.zeros(64)
    with library.runtime.bounds(y, read_only=[x[:40]]):
        library.call("launch_read_outside", x[:40], y, 40)


def test_outside_shared_memory():
    x = torch.zeros(32)
    build(source("bugs")).call("launch_shared_outside", x, 0)
    assert "4 bytes at offset 128 of the block's 128 bytes" in str(failure("shared_outside", x, 1))


def test_misaligned_vector():
    assert failure("misaligned_vector", torch.zeros(8), torch.zeros(8)).code == 716


def test_null_pointer():
    assert failure("null_pointer", None).code == 700


def test_shuffle_with_absent_lanes():
    assert "exit" in str(failure("absent_lanes", torch.zeros(32)))


def test_lanes_that_exit_early_when_allowed():
    library = build(source("bugs"))
    x = torch.arange(32.0)
    with library.runtime.options(early_exits=1):
        library.call("launch_absent_lanes", x)
    assert torch.equal(x[:16], torch.arange(16.0).view(-1, 2).flip(1).reshape(-1))


def test_lane_outside_of_its_own_mask():
    assert "not in the mask" in str(failure("not_in_mask", torch.zeros(32)))


def test_divergent_barriers():
    assert "exit" in str(failure("divergent_exit", torch.zeros(64)))
    assert "divergent barrier" in str(failure("divergent_barriers", torch.zeros(64), 32))
    build(source("bugs")).call("launch_divergent_barriers", torch.zeros(64), 64)


def test_deadlock():
    error = failure("deadlock", torch.zeros(64))
    assert error.code == 702 and "thread (0,0,0) waits at" in str(error)


def test_different_instructions_meet():
    assert "meet at different instructions" in str(failure("mixed_collectives", torch.zeros(32, dtype=torch.int32)))


def test_failed_assertion():
    assert failure("failed_assert", torch.ones(32, dtype=torch.int32)).code == 710
    build(source("bugs")).call("launch_failed_assert", torch.zeros(32, dtype=torch.int32))


PTX = """.version 8.0
.target sm_80
.address_size 64
.visible .entry f(.param .u64 p) {{
  .reg .b32 %r<4>;
  .reg .b64 %d<4>;
  .reg .pred %p<4>;
  {}
  ret;
}}
"""


@pytest.mark.parametrize(
    "statement, reason",
    [
        ("frobnicate.b32 %r1, %r2;", "PTX line 8: unknown instruction"),
        ("add.strange.u32 %r1, %r2, %r3;", "unknown modifier .strange"),
        ("add.u32 %r1, %r2, %r9;", "unknown name %r9"),
        ("add.u32 %q, %r2, %r3;", "%q is no register"),
        ("mov.b64 %r1, %d1;", "too small"),
        ("add.u32 %p1, %r1, %r2;", "pred"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r1}, {%r1}, {%r1};", "types not supported"),
        ("cp.async.bulk.commit_group;", "unknown modifier .bulk"),
        ("cvt.rz.f16.f32.strange %r1, %r2;", "unknown modifier .strange"),
        (
            "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%r1}, %d1, %d2, 1;",
            "unknown modifier .sp|not supported",
        ),
    ],
)
def test_unknown_ptx_fails_at_translation(statement, reason):
    with pytest.raises(PtxError, match=reason):
        translate(parse(PTX.format(statement)))

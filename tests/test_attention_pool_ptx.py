"""attention_pool's CUDA kernels without a GPU: nvcc's PTX, its launchers and the glue to PyTorch, executed on CPU
tensors by tests/ptx_on_cpu. Only csrc/cuda/device.h is another one. Accesses are held to the exact bytes of every
tensor."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from pykernels import attention_pool
from tests import ptx_on_cpu
from tests import test_attention_pool_layouts as layouts
from tests import test_attention_pool_masks as masks
from tests.attention_pool_cases import PoolCase, check_case, evaluate, problem
from tests.emulated_cuda import SCHEDULES, build_operator, emulating
from tests.helpers import FLOATS, LAYOUTS, assert_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx_on_cpu.unavailable() is not None, reason=f"{ptx_on_cpu.unavailable()}"),
]
DTYPES = ["fp32", "bf16", "fp16"]


@pytest.fixture(scope="module", params=["80", "90"])
def library(request: pytest.FixtureRequest) -> ptx_on_cpu.Library:
    return build_operator("attention_pool", request.param)


@pytest.fixture(params=SCHEDULES)
def emulated(request: pytest.FixtureRequest, library: ptx_on_cpu.Library) -> Iterator[str]:
    """attention_pool(backend="cpu") calls the emulated CUDA kernels."""
    names = {"_fwd": "_attention_pool_fwd", "_bwd": "_attention_pool_bwd"}
    with emulating(library, request.param, "pykernels.attention_pool", **names) as backend:
        yield backend


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str, emulated: str) -> None:
    """A sample of all combinations of options."""
    axes = {
        "activation": ("tanh", "swish", "relu", "gelu"), "gated": (False, True), "J": (0, 1, 3), "bias": (True, False),
        "rows": ("all", "mask", "lengths", "packed"), "returned": (None, "raw", "softmax"),
    }  # fmt: skip
    forms = [PoolCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    for case in random.Random(1).sample(forms, 10):
        check_case(case, FLOATS[dtype], emulated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str, emulated: str) -> None:
    """Odd sizes, rows that are read as they are and that are copied first, empties, more heads than a block scores."""
    for case in (
        PoolCase(B=2, L=33, D=1, H=1), PoolCase(B=2, L=17, D=33, H=33, rows="lengths"), PoolCase(B=5, L=1, D=8, H=8),
        PoolCase(B=2, L=40, D=40, H=70, gated=True, returned="raw"), PoolCase(B=0), PoolCase(L=0), PoolCase(D=0),
        PoolCase(H=0), PoolCase(L=0, rows="packed"), PoolCase(B=2, L=9, J=35), PoolCase(J=2, L=0, rows="lengths"),
        PoolCase(B=1, L=13, D=2100, H=16, returned="softmax"),
    ):  # fmt: skip
        check_case(case, FLOATS[dtype], emulated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_and_tiles(dtype: str, emulated: str) -> None:
    """Sequences that are put together from parts, large tiles, several tiles of columns."""
    for case in (
        PoolCase(B=2, L=300, D=24, H=24, J=2, rows="mask", returned="softmax"),
        PoolCase(B=3, L=140, D=72, H=136, rows="packed", activation="gelu"),
        PoolCase(B=9, L=100, D=16, H=40, gated=True, rows="lengths"),
    ):
        check_case(case, FLOATS[dtype], emulated)


def test_padding_content_changes_nothing(emulated: str) -> None:
    for rows in ("mask", "lengths"):
        masks.test_padding_content_changes_nothing(rows, "bf16", emulated)


def test_rows_that_are_all_masked(emulated: str) -> None:
    masks.test_rows_that_are_all_masked(emulated)


def test_lengths_equal_mask_and_packed_rows(emulated: str) -> None:
    """Bit for bit, whatever the neighbours and the padding, and with chunks of all sizes."""
    for length, dtype in ((15, torch.float32), (30, torch.bfloat16), (150, torch.float16)):
        case = PoolCase(B=4, L=length, D=9, J=2, rows="lengths", returned="raw")
        p = problem(case, dtype)
        x, lengths, live = p.inputs["x"], p.options["lengths"], case.live()
        rest = {n: t for n, t in p.inputs.items() if n != "x"}
        run = partial(attention_pool, **rest, return_scores="raw", backend=emulated)
        out, s = run(x, lengths=lengths)
        of_live = s.transpose(1, 2)[live].T
        for mask in (live, live.int()):
            assert all(torch.equal(a, b) for a, b in zip(run(x, mask=mask), (out, s), strict=True))
        bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).long()
        packed, scores = run(x[live], cu_seqlens=bounds)
        assert torch.equal(packed, out) and torch.equal(scores, of_live)
        longer = torch.nn.functional.pad(x, (0, 0, 0, 50), value=torch.nan)
        assert torch.equal(run(longer, lengths=lengths)[0], out)
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(run(x[b : b + 1, :n])[0][0], out[b])


def test_boundaries_that_lie_outside_are_cut_off(emulated: str) -> None:
    """Values on the device are not waited for; wrong ones must not reach beyond the tensors."""
    p = problem(PoolCase(B=2, L=90, D=8, returned="softmax"), torch.float32)
    run = partial(evaluate, incoming=p.case.gradients, backend=emulated, **p.options)
    assert_equal(run(p.inputs, lengths=torch.tensor([199, -3])), run(p.inputs, lengths=torch.tensor([90, 0])))
    rows = {**p.inputs, "x": p.inputs["x"][0]}
    for wild in ([-5, 130, 7, 2**40], [80, 90, 0, 30], [30, 10, 5, 2]):
        run(rows, cu_seqlens=torch.tensor(wild))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, emulated: str) -> None:
    for case, dtype in ((layouts.CASE, torch.bfloat16), (PoolCase(L=13, D=16, H=16, rows="packed"), torch.float32)):
        p = problem(case, dtype)
        incoming = case.gradients(evaluate(p.inputs, None, **p.options, backend=emulated))
        inputs = {n: LAYOUTS[layout](t) for n, t in p.inputs.items()}
        grads = {n: LAYOUTS[layout](t) for n, t in incoming.items()}
        plain = [{n: t.contiguous().clone() for n, t in tensors.items()} for tensors in (inputs, grads)]
        got = evaluate(inputs, lambda _, g=grads: g, **p.options, backend=emulated)
        assert_equal(got, evaluate(plain[0], lambda _, g=plain[1]: g, **p.options, backend=emulated), layout)


def test_infinity_in_a_row_keeps_its_score(emulated: str) -> None:
    layouts.test_infinity_in_a_row_keeps_its_score(emulated)


def test_tf32_where_the_setting_allows_it(emulated: str) -> None:
    """PyTorch's setting for CUDA's matrix products; tf32 keeps ten bits of mantissa."""
    p = problem(PoolCase(B=2, L=70, D=40, H=40, gated=True, returned="raw"), torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        got = evaluate(p.inputs, p.case.gradients, backend=emulated, **p.options)
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
    assert all(1e-5 < errors[name] < 2**-9 for name in ("scores", "dx", "dweight")), errors


def test_errors_name_the_argument(emulated: str) -> None:
    x, weight, query = torch.zeros(2, 9, 4), torch.zeros(8, 4), torch.zeros(8)
    for error, message, options in [
        (ValueError, "^weight: expected a tensor on cpu like x, got meta", {"weight": weight.to("meta")}),
        (TypeError, "^query: expected .*like x", {"query": query.half()}),
        (ValueError, r"^weight: expected \[H, D\] with D = 4", {"weight": torch.zeros(8, 5)}),
        (ValueError, r"^mask: expected shape \[2, 9\], got \[2, 8\]", {"mask": torch.ones(2, 8, dtype=torch.bool)}),
        (TypeError, "^mask: expected bool", {"mask": torch.ones(2, 9)}),
        (TypeError, "^lengths: expected int32 or int64", {"lengths": torch.ones(2)}),
        (
            TypeError, "^x: expected float32, bfloat16 or float16",
            {"x": x.double(), "weight": weight.double(), "query": query.double()},
        ),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            attention_pool(**{"x": x, "weight": weight, "query": query, **options}, backend="cpu")

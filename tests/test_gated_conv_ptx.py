"""gated_conv1d's CUDA kernels without a GPU: nvcc's PTX, its launchers and the glue to PyTorch, executed on CPU tensors
by tests/ptx_on_cpu. Only csrc/cuda/device.h is another one. Accesses are held to the exact bytes of every tensor."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pykernels import GatedConv1d, gated_conv1d
from tests import ptx_on_cpu
from tests.emulated_cuda import SCHEDULES, build_operator, emulating
from tests.gated_conv_cases import Case, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, assert_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx_on_cpu.unavailable() is not None, reason=f"{ptx_on_cpu.unavailable()}"),
]
DTYPES = ["fp32", "bf16", "fp16"]


@pytest.fixture(scope="module", params=["80", "90"])
def library(request: pytest.FixtureRequest) -> ptx_on_cpu.Library:
    return build_operator("gated_conv", request.param)


@pytest.fixture(params=SCHEDULES)
def emulated(request: pytest.FixtureRequest, library: ptx_on_cpu.Library) -> Iterator[str]:
    """gated_conv1d(backend="cpu") calls the emulated CUDA kernels."""
    names = {"_fwd": "_gated_conv_fwd", "_bwd": "_gated_conv_bwd", "_pack": "_gated_conv_pack"}
    with emulating(library, request.param, "pykernels.gated_conv", **names) as backend:
        yield backend


def check_case(case: Case, dtype: str) -> None:
    """Training by the error rule; inference and recomputation give the same bits."""
    p = problem(case, FLOATS[dtype])
    trained = evaluate(p.inputs, case.dy, backend="cpu", **p.options)
    p.check(trained)
    assert_equal(evaluate(p.inputs, None, backend="cpu", **p.options), {"y": trained["y"]}, case)
    assert_equal(evaluate(p.inputs, case.dy, backend="cpu", recompute=True, **p.options), trained, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str, emulated: str) -> None:
    """A sample of all combinations of options."""
    axes = {
        "residual": ("highway", "add", "none"), "value_act": ("identity", "tanh"),
        "padding": ("same", "causal", "valid"), "cond": ("none", "one", "all"),
        "rows": ("all", "mask", "lengths", "packed"), "split": ("value_gate", "gate_value"),
        "two_weights": (False, True),
    }  # fmt: skip
    forms = [Case(L=11, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    for case in random.Random(1).sample([form for form in forms if form.legal], 10):
        check_case(replace(case, C_out=7) if case.residual == "none" else case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str, emulated: str) -> None:
    """Odd channels, rows that are read as they are and that are copied first, empties, far dilations."""
    for case in (
        Case(B=2, L=33, C_in=1, C_out=1), Case(B=2, L=17, C_in=33, C_out=33, rows="lengths"),
        Case(B=3, L=50, C_in=40, C_out=130, K=2, residual="none", cond="one"),
        Case(B=2, L=65, C_in=64, C_out=64, rows="packed"), Case(B=0), Case(L=0), Case(B=3, L=0, rows="packed"),
        Case(L=4, padding="valid"), Case(dilation=1000), Case(K=41, L=23),
    ):  # fmt: skip
        check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gate_dropout", "gate_noise"])
def test_random_bits(kind: str, dtype: str, emulated: str) -> None:
    for channels, rows, padding in [(5, "all", "same"), (17, "lengths", "causal"), (8, "mask", "valid")]:
        case = Case(B=3, L=21, C_in=channels, C_out=channels, rows=rows, padding=padding, cond="one", **{kind: 0.4})
        check_case(case, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_large_tiles(dtype: str, emulated: str) -> None:
    """What a long input uses, on Hopper by warpgroup instructions."""
    check_case(Case(B=2, L=300, C_in=136, C_out=136, rows="lengths", residual="add"), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, emulated: str) -> None:
    case = Case(B=3, L=13, C_in=16, C_out=16, cond="all", rows="mask")
    p = problem(case, torch.bfloat16)
    x, dy = LAYOUTS[layout](p.inputs["x"]), LAYOUTS[layout](case.dy(p.same["y"]))
    got = evaluate(p.inputs | {"x": x}, dy, backend="cpu", **p.options)
    plain = evaluate(p.inputs | {"x": x.contiguous().clone()}, dy.contiguous().clone(), backend="cpu", **p.options)
    assert_equal(got, plain, layout)


def test_tf32_where_the_setting_allows_it(emulated: str) -> None:
    """PyTorch's setting for CUDA's matrix products; tf32 keeps ten bits of mantissa."""
    p = problem(Case(B=2, L=70, C_in=40, C_out=40), torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        got = evaluate(p.inputs, p.case.dy, backend="cpu", **p.options)
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
    assert all(1e-5 < errors[name] < 2**-10 for name in ("y", "dx", "dweight")), errors


def test_prepacked_weights(emulated: str) -> None:
    module = GatedConv1d(40, 40, 3, dilation=2, backend="cpu").eval()
    x = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(module.prepack()(x), expected)


def test_errors_name_the_argument(emulated: str) -> None:
    x, weight = torch.zeros(2, 9, 4), torch.zeros(8, 4, 3)
    for error, message, options in [
        (ValueError, "^weight: expected a tensor on cpu like x, got meta", {"weight": weight.to("meta")}),
        (TypeError, "^weight: expected .*like x", {"weight": weight.half()}),
        (ValueError, "^weight: expected C_in = 4 like x", {"weight": torch.zeros(8, 5, 3)}),
        (ValueError, r"^mask: expected shape \[2, 9\], got \[2, 8\]", {"mask": torch.ones(2, 8, dtype=torch.bool)}),
        (TypeError, "^mask: expected bool", {"mask": torch.ones(2, 9)}),
        (TypeError, "^lengths: expected int32 or int64", {"lengths": torch.ones(2)}),
        (TypeError, "^x: expected float32, bfloat16 or float16", {"x": x.double(), "weight": weight.double()}),
    ]:
        with pytest.raises(error, match=message):
            gated_conv1d(options.pop("x", x), options.pop("weight", weight), backend="cpu", **options)


def test_a_launch_that_the_device_refuses(library: ptx_on_cpu.Library, emulated: str) -> None:
    """Tiles that need more shared memory than there is: one error, and the next call is a new one."""
    x, weight = torch.ones(4, 300, 136).bfloat16(), torch.ones(272, 136, 3).bfloat16()
    expected = gated_conv1d(x, weight, backend="cpu")
    with library.runtime.options(capability=70), pytest.raises(RuntimeError, match="^pykernels: gated_conv_forward: "):
        gated_conv1d(x, weight, backend="cpu")
    assert torch.equal(gated_conv1d(x, weight, backend="cpu"), expected)

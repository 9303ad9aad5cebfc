"""gated_conv1d's CUDA kernels without a GPU: nvcc's PTX, its launchers and the glue to PyTorch, executed on CPU tensors
by tests/ptx_on_cpu. Only csrc/cuda/device.h is another one. Accesses are held to the exact bytes of every tensor."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import ptx_on_cpu
from tests.gated_conv_cases import Case, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, assert_equal
from tests.ptx_on_cpu.torch_glue import load_operators, record_allocations

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx_on_cpu.unavailable() is not None, reason=f"{ptx_on_cpu.unavailable()}"),
]
SCHEDULES = {"forward": 0, "reverse": 1, "random": 5}
DTYPES = ["fp32", "bf16", "fp16"]


@pytest.fixture(scope="module", params=["80", "90"])
def library(request: pytest.FixtureRequest) -> ptx_on_cpu.Library:
    """The kernels for that capability, and their operators in a namespace of their own."""
    include = (ROOT, ROOT / "csrc", ROOT / "kernels", ROOT / "kernels" / "cpu")
    flags = [f"-I{folder}" for folder in include] + ["-DPYKERNELS_SM90A"] * (request.param == "90")
    kernels = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
    built = ptx_on_cpu.build(*kernels, arch=request.param, flags=tuple(flags))
    glue = sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    glue += [ROOT / "csrc" / f"{name}.cpp" for name in ("arguments", "gated_conv_arguments", "ops")]
    built.namespace = f"pykernels_sm{request.param}"
    record_allocations(load_operators(tuple(glue), built, built.namespace, include))
    return built


@pytest.fixture(params=SCHEDULES)
def emulated(
    request: pytest.FixtureRequest, library: ptx_on_cpu.Library, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """gated_conv1d(backend="cpu") calls the emulated CUDA kernels."""
    module = importlib.import_module("pykernels.gated_conv")
    operators = getattr(torch.ops, library.namespace)
    monkeypatch.setattr(module, "_fwd", operators._gated_conv_fwd.default)
    monkeypatch.setattr(module, "_bwd", operators._gated_conv_bwd.default)
    capability = int(library.namespace[-2:])
    options = {"schedule": SCHEDULES[request.param], "capability": capability, "processors": 4}
    with library.runtime.options(**options), library.runtime.bounds():
        yield


def check_case(case: Case, dtype: str) -> None:
    """Training by the error rule; inference and recomputation give the same bits."""
    p = problem(case, FLOATS[dtype])
    trained = evaluate(p.inputs, case.dy, backend="cpu", **p.options)
    p.check(trained)
    assert_equal(evaluate(p.inputs, None, backend="cpu", **p.options), {"y": trained["y"]}, case)
    assert_equal(evaluate(p.inputs, case.dy, backend="cpu", recompute=True, **p.options), trained, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str, emulated: None) -> None:
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
def test_sizes(dtype: str, emulated: None) -> None:
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
def test_random_bits(kind: str, dtype: str, emulated: None) -> None:
    for channels, rows, padding in [(5, "all", "same"), (17, "lengths", "causal"), (8, "mask", "valid")]:
        case = Case(B=3, L=21, C_in=channels, C_out=channels, rows=rows, padding=padding, cond="one", **{kind: 0.4})
        check_case(case, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_large_tiles(dtype: str, emulated: None) -> None:
    """What a long input uses, on Hopper by warpgroup instructions."""
    check_case(Case(B=2, L=300, C_in=136, C_out=136, rows="lengths", residual="add"), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, emulated: None) -> None:
    case = Case(B=3, L=13, C_in=16, C_out=16, cond="all", rows="mask")
    p = problem(case, torch.bfloat16)
    x, dy = LAYOUTS[layout](p.inputs["x"]), LAYOUTS[layout](case.dy(p.same["y"]))
    got = evaluate(p.inputs | {"x": x}, dy, backend="cpu", **p.options)
    plain = evaluate(p.inputs | {"x": x.contiguous().clone()}, dy.contiguous().clone(), backend="cpu", **p.options)
    assert_equal(got, plain, layout)

"""What Triton and its ptxas make of the kernels for GPUs that are not here: registers, shared memory, matrix
instructions. Compiled, in every configuration, as calls of the operators launch them; nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gated_conv_cases import Case, evaluate, problem
from tests.helpers import FLOATS

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

from pykernels.triton_kernels.gated_conv import gated_conv_forward  # noqa: E402
from pykernels.triton_kernels.gated_conv_bwd import input_backward, weight_backward  # noqa: E402
from tests.triton_compiled import Compiled, compiling  # noqa: E402

TUNED = (gated_conv_forward, input_backward, weight_backward)
# A block's shared memory, by the CUDA programming guide.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MULTIPLY = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def compile_call(dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch, **form: str) -> list[Compiled]:
    """The kernels of a training step of a size that is aligned as models' are."""
    for kernel in TUNED:
        monkeypatch.setattr(kernel, "cache", {})
    case = Case(B=2, L=64, C_in=64, C_out=64, **form)
    p = problem(case, FLOATS[dtype])
    with compiling(capability) as compiled:
        evaluate(p.inputs, case.dy, backend="triton", **p.options)
    names = [c.name for c in compiled]
    for kernel in TUNED:
        assert names.count(kernel.base_fn.__name__) == len(kernel.configs)
    return compiled


def assert_fits(compiled: list[Compiled], folder: Path) -> None:
    for c in compiled:
        assert c.shared <= SHARED[c.capability], (c.name, c.shared)
        assert c.spilled_bytes(folder) == 0, (c.name, c.capability, c.ptx[:200])


@pytest.mark.parametrize("capability", SHARED)
def test_16_bit(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product by the instructions of its GPU, loads of aligned rows by asynchronous copies of 16 bytes."""
    compiled = compile_call("bf16", capability, monkeypatch, rows="lengths", residual="highway")
    assert_fits(compiled, tmp_path)
    products = [c for c in compiled if c.name in [kernel.base_fn.__name__ for kernel in TUNED]]
    for c in products:
        assert MULTIPLY[capability] in c.ptx, c.name
        assert "cp.async.cg.shared.global" in c.ptx, c.name


@pytest.mark.parametrize("capability", [80, 120])
def test_float32(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tf32 but where the setting asks for it."""
    compiled = compile_call("fp32", capability, monkeypatch, rows="lengths", value_act="tanh")
    assert_fits(compiled, tmp_path)
    assert not any(word in c.ptx for c in compiled for word in ("tf32", "mma.sync", "wgmma.mma", "tcgen05.mma"))


@pytest.mark.parametrize("capability", [90, 100])
def test_tf32(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        compiled = compile_call("fp32", capability, monkeypatch, rows="lengths")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_fits(compiled, tmp_path)
    products = [c for c in compiled if c.name in [kernel.base_fn.__name__ for kernel in TUNED]]
    assert all("tf32" in c.ptx for c in products)


@pytest.mark.parametrize("form", [{"rows": "mask", "cond": "all"}, {"rows": "packed", "gate_dropout": 0.1}])
def test_other_forms_do_not_spill(form: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_fits(compile_call("fp16", 80, monkeypatch, **form), tmp_path)

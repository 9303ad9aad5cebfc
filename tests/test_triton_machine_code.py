"""What Triton and its ptxas make of the kernels for GPUs that are not here: spills, shared memory, the instructions
that multiply. Compiled, in every configuration, as training steps of the operators launch them; nothing is run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import attention_pool_cases, child_update_cases, gated_conv_cases, lora_linear_cases
from tests.helpers import FLOATS

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

from pykernels.triton_kernels import (  # noqa: E402
    attention_pool,
    attention_pool_bwd,
    gated_conv,
    gated_conv_bwd,
    lora_linear,
    lora_linear_bwd,
)
from tests.triton_compiled import Compiled, compiling  # noqa: E402

# A block's shared memory, by the CUDA programming guide.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MULTIPLY = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
PRODUCTS = ("mma.sync", "wgmma.mma", "tcgen05.mma")


def gated_conv_step(dtype: torch.dtype) -> None:
    case = gated_conv_cases.Case(B=2, L=64, C_in=64, C_out=64, rows="lengths", residual="highway")
    p = gated_conv_cases.problem(case, dtype)
    gated_conv_cases.evaluate(p.inputs, case.dy, backend="triton", **p.options)


def attention_pool_step(dtype: torch.dtype) -> None:
    """With a gate and several heads, for which a program holds most."""
    sizes = {"B": 2, "L": 64, "D": 64, "H": 64, "J": 2}
    case = attention_pool_cases.PoolCase(**sizes, gated=True, rows="lengths", returned="softmax")
    p = attention_pool_cases.problem(case, dtype)
    attention_pool_cases.evaluate(p.inputs, case.gradients, backend="triton", **p.options)


def lora_linear_step(dtype: torch.dtype) -> None:
    """One adapter, and several, with dropout and adapters in float32."""
    for adapters in (0, 3):
        sizes = {"leading": (64,), "K": 128, "N": 128, "R": 16, "E": adapters}
        case = lora_linear_cases.LoraCase(**sizes, dropout=0.1, float_adapters=True)
        p = lora_linear_cases.problem(case, dtype)
        lora_linear_cases.evaluate(p.inputs, case.dy, backend="triton", **p.options)


class Operator(NamedTuple):
    """A training step of sizes that are aligned as models' are, and the kernels that are tuned."""

    step: Callable[[torch.dtype], None]
    tuned: tuple[Any, ...]
    # Whose rows may be loaded into registers: those of one adapter among several, and what forward kept.
    to_registers: tuple[str, ...] = ()


OPERATORS = {
    "gated_conv": Operator(
        gated_conv_step,
        (gated_conv.gated_conv_forward, gated_conv_bwd.input_backward, gated_conv_bwd.weight_backward),
    ),
    "attention_pool": Operator(
        attention_pool_step,
        (
            attention_pool.attention_pool_forward,
            attention_pool_bwd.hidden_backward,
            attention_pool_bwd.pool_input_backward,
        ),
        ("hidden_backward",),
    ),
    "lora_linear": Operator(
        lora_linear_step,
        (
            lora_linear.lora_shrink,
            lora_linear.lora_product,
            lora_linear_bwd.lora_adapter_sums,
            lora_linear_bwd.lora_weight_sums,
        ),
        ("lora_adapter_sums",),
    ),
}
# Bytes, of configurations that others stand beside: kernel, its number, capability, dtype.
KNOWN_SPILLS: dict[tuple[str, int, int, str], int] = {
    ("gated_conv_forward", 0, 100, "fp32"): 24,
    ("gated_conv_forward", 0, 120, "fp32"): 40,
    ("input_backward", 0, 100, "tf32"): 8,
    ("input_backward", 1, 120, "bf16"): 8,
    ("weight_backward", 2, 100, "bf16"): 8,
    ("weight_backward", 3, 120, "bf16"): 8,
    ("hidden_backward", 1, 80, "fp32"): 16,
    ("hidden_backward", 0, 120, "bf16"): 8,
    ("pool_input_backward", 2, 80, "fp32"): 8,
    ("lora_shrink", 7, 90, "fp32"): 8,
    ("lora_shrink", 6, 120, "tf32"): 8,
    ("lora_product", 1, 100, "fp32"): 8,
    ("lora_product", 0, 100, "bf16"): 8,
    ("lora_product", 3, 120, "bf16"): 8,
    ("lora_product", 4, 120, "bf16"): 16,
    ("lora_product", 5, 120, "bf16"): 8,
    ("lora_product", 7, 120, "bf16"): 8,
    ("lora_adapter_sums", 2, 120, "bf16"): 8,
    ("lora_adapter_sums", 6, 120, "bf16"): 8,
}


# Masked AdamW in every way to tell what is masked, clipped or not, and SGD with momentum.
CHILD_FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adamw", {"mode": "none", "max_grad_norm": 1.0}),
    ("adamw", {"mode": "F"}),
    ("adamw", {"mode": "D"}),
    ("adamw", {"mode": "D", "compact": False}),
    ("sgd", {"mode": "F"}),
)


def child_steps(dtype: torch.dtype) -> None:
    for kind, options in CHILD_FORMS:
        params = child_update_cases.parameters(dtype, ((64, 64), (128,)))
        if options["mode"] == "D":
            masks = child_update_cases.masks_for(params)
            options = options | {"masks": child_update_cases.with_masks(params, masks)}
        child_update_cases.steps(child_update_cases.make(kind, params, backend="triton", **options), params, 0, 1)


def compile_step(name: str, dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """All kernels of a step, every configuration of the tuned ones."""
    operator = OPERATORS[name]
    for kernel in operator.tuned:
        monkeypatch.setattr(kernel, "cache", {})
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        with compiling(capability) as compiled:
            operator.step(FLOATS["fp32" if dtype == "tf32" else dtype])
    finally:
        torch.set_float32_matmul_precision("highest")
    names = Counter(c.name for c in compiled)
    for kernel in operator.tuned:
        assert names[kernel.base_fn.__name__] >= len(kernel.configs), kernel.base_fn.__name__
    return compiled


def products_of(name: str, compiled: list[Compiled]) -> list[Compiled]:
    tuned = [kernel.base_fn.__name__ for kernel in OPERATORS[name].tuned]
    return [c for c in compiled if c.name in tuned]


def assert_fits(compiled: list[Compiled], dtype: str, folder: Path) -> None:
    number: Counter[str] = Counter()
    found, clean = [], set()
    for c in compiled:
        assert c.shared <= SHARED[c.capability], (c.name, c.shared)
        spilled = c.stack_bytes(folder)
        if spilled > KNOWN_SPILLS.get((c.name, number[c.name], c.capability, dtype), 0):
            found.append((c.name, number[c.name], c.capability, dtype, spilled))
        if not spilled:
            clean.add(c.name)
        number[c.name] += 1
    assert not found
    assert clean == set(number), "a kernel of which every configuration spills"


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_16_bits(operator: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by the instructions of the GPU, loads of aligned rows by 16 bytes, asynchronously where they can be."""
    compiled = compile_step(operator, "bf16", capability, monkeypatch)
    assert_fits(compiled, "bf16", tmp_path)
    for c in products_of(operator, compiled):
        assert MULTIPLY[capability] in c.ptx, c.name
        registers = c.name in OPERATORS[operator].to_registers and "ld.global.v4.b32" in c.ptx
        assert registers or "cp.async.cg.shared.global" in c.ptx, c.name


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_strict_float32(operator: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tf32 but where the setting asks for it."""
    compiled = compile_step(operator, "fp32", capability, monkeypatch)
    assert_fits(compiled, "fp32", tmp_path)
    assert not [c.name for c in compiled for word in ("tf32", *PRODUCTS) if word in c.ptx]


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_tf32(operator: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_step(operator, "tf32", capability, monkeypatch)
    assert_fits(compiled, "tf32", tmp_path)
    assert all("tf32" in c.ptx for c in products_of(operator, compiled))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", SHARED)
def test_child_update(capability: int, dtype: str, tmp_path: Path) -> None:
    """Parameters, gradients and moments by 16 bytes, but for compact moments; nothing spills."""
    with compiling(capability) as compiled:
        child_steps(FLOATS[dtype])
    names = Counter(c.name for c in compiled)
    wanted = {"child_update": len(CHILD_FORMS), "square_sums": 1, "count_selected": 1, "scan_selected": 1}
    assert names == wanted
    assert_fits(compiled, dtype, tmp_path)
    updates = [c for c in compiled if c.name == "child_update"]
    assert all("st.global.v4.b32" in c.ptx for c in updates)
    assert all("ld.global.v4.b32" in c.ptx for c in compiled if c.name in ("child_update", "square_sums"))
    # Where a compact moment lies depends on the mask: those of this form alone are loaded one by one.
    single = [set(re.findall(r"(?:ld|st)\.global\.b(?:16|32)\b", c.ptx)) for c in updates]
    assert sorted(single, key=len) == [set()] * (len(updates) - 1) + [{"ld.global.b32", "st.global.b32"}]

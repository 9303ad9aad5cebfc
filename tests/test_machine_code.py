"""What nvcc makes of the CUDA kernels for GPUs of compute capability 8.0, 9.0, 10.0 and 12.0: not executed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import machine_code
from tests.machine_code import ARCHS, Kernel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(machine_code.unavailable() is not None, reason=f"{machine_code.unavailable()}"),
]
SOURCES = [path.name for path in machine_code.sources()]


@pytest.fixture(scope="module")
def found() -> list[Kernel]:
    """Compiled side by side."""
    return machine_code.all_kernels()


def some(found: list[Kernel], *parts: str, arch: str | None = None) -> list[Kernel]:
    """Kernels with all of these in their names; there must be one at least."""
    chosen = [k for k in found if all(part in k.name for part in parts) and arch in (None, k.arch)]
    assert chosen, parts
    return chosen


def have(kernel: Kernel, begins: str) -> bool:
    return any(instruction.startswith(begins) for instruction in kernel.instructions)


@pytest.mark.parametrize("source", SOURCES)
def test_it_compiles_without_warnings_and_spills(source: str, found: list[Kernel]) -> None:
    own, warnings = machine_code.kernels(Path(machine_code.ROOT / "kernels" / "cuda" / source))
    assert not warnings
    assert {kernel.arch for kernel in own} in (set(ARCHS), set())  # or launchers alone
    assert not [(k.name, k.arch, k.spilled) for k in own if k.spilled]


def test_no_kernel_takes_more_than_before(found: list[Kernel]) -> None:
    """Registers and static shared memory; `python -m tests.machine_code` writes the table anew."""
    table = json.loads(machine_code.TABLE.read_text())
    assert {(k.arch, k.name) for k in found} == {(arch, name) for arch in ARCHS for name in table[arch]}
    if machine_code.version() != table["nvcc"]:
        pytest.skip(f"registers are those of nvcc {table['nvcc']}, and this is {machine_code.version()}")
    grown = {
        (k.arch, k.name): ((k.registers, k.shared), table[k.arch][k.name])
        for k in found
        if k.registers > table[k.arch][k.name][0] or k.shared > table[k.arch][k.name][1]
    }
    assert not grown


@pytest.mark.parametrize("math", ["Bfloat16Math", "Float16Math", "Tf32Math"])
def test_products_are_those_of_tensor_cores(math: str, found: list[Kernel]) -> None:
    """mma.sync everywhere, of that type; copies of 16 bytes that go past the registers; fragments by ldmatrix."""
    wanted = {"Bfloat16Math": "BF16", "Float16Math": "F32", "Tf32Math": "TF32"}[math]
    for kernel in some(found, "<ProductTile<" + math) + some(found, "<RowProductTile<" + math):
        assert any(i.startswith("HMMA") and wanted in i for i in kernel.instructions), kernel
        assert have(kernel, "LDGSTS") and not have(kernel, "HGMMA"), kernel
    for kernel in some(found, "<ProductTile<" + math):
        assert have(kernel, "LDSM"), kernel


def test_float32_is_multiplied_in_float32(found: list[Kernel]) -> None:
    for kernel in some(found, "Float32Math"):
        assert have(kernel, "FFMA") and not have(kernel, "HMMA") and not have(kernel, "HGMMA"), kernel


def test_warpgroups_multiply_on_hopper(found: list[Kernel]) -> None:
    for tile in ("WarpgroupTile", "WarpgroupRowTile"):
        for kernel in some(found, tile, arch="90a"):
            assert have(kernel, "HGMMA") and have(kernel, "LDGSTS"), kernel


@pytest.mark.parametrize("kernel", ["child_update", "gate_backward", "gated_conv_forward", "gated_conv_input"])
def test_elements_go_sixteen_bytes_at_a_time(kernel: str, found: list[Kernel]) -> None:
    for k in some(found, kernel):
        assert have(k, "LDG") and have(k, "STG"), k

"""What the tests of Triton kernels without a GPU share: which configurations are built, for which GPU, and a process of
its own for Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ptx_on_cpu
from tests.ptx_on_cpu.triton_driver import active

MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ptx_on_cpu.unavailable(cuda=False)), reason=f"{ptx_on_cpu.unavailable(cuda=False)}"),
    pytest.mark.usefixtures("forget_compiled"),
]


def smallest_tiles(*tuned: Any) -> Any:
    """A fixture that is always on. Each specialisation takes seconds to build: one configuration each of the tuned
    kernels, but where the test is of them all."""

    @pytest.fixture(autouse=True)
    def smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
        for kernel in tuned:
            smallest = min(kernel.configs, key=lambda c: (c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"], str(c)))
            monkeypatch.setattr(kernel, "configs", [smallest])

    return smallest_tiles


@pytest.fixture(params=[80, 90])
def capability(request: pytest.FixtureRequest) -> Iterator[int]:
    with active(request.param):
        yield request.param


@pytest.fixture
def ampere() -> Iterator[None]:
    with active(80):
        yield


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(folder), str(root)])
    variables = os.environ | {"PYTHONPATH": paths} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)

"""Fixtures of the operator tests.

backend   runs the test on the reference and on the CPU kernels of every tier that this machine has
kernels   the same without the reference
amx       the AMX tier, in an emulator where the processor has none
bert      a random BERT's folder; task: a folder in CoLA's form; pretrained, parts: both as the examples load them
poems     a file of 64 texts
poison    (always on) memory that is not initialised holds NaN instead of convenient zeros
"""

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels import _extension
from tests import amx_on_cpu, small_bert

_C = _extension._C
TIERS = [name for name, usable, _ in _C.cpu_tiers() if usable] if _C is not None else []
NO_EXTENSION = pytest.param("none", marks=pytest.mark.skip(reason=f"no compiled extension: {_extension.reason}"))


def _enter(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        yield "reference"
        return
    before = _C.cpu_tier()
    _C.set_cpu_tier(request.param)
    yield "cpu"
    _C.set_cpu_tier(before)


@pytest.fixture(params=["reference", *TIERS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend; for "cpu" the tier is set."""
    yield from _enter(request)


@pytest.fixture(params=TIERS or [NO_EXTENSION])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cpu", with one tier after the other set."""
    yield from _enter(request)


@pytest.fixture
def extension() -> object:
    """The compiled extension, in the tier that the machine chose."""
    if _C is None:
        pytest.skip(f"no compiled extension: {_extension.reason}")
    return _C


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bert.make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bert.make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def poems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 poems of two lines, each of one of eight characters repeated."""
    rows = [{"paragraphs": [f"{c * n}，", f"{c * 3}。"]} for c in "春夏秋冬山水花月" for n in range(2, 10)]
    path = tmp_path_factory.mktemp("data") / "poems.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pretrained(bert: Path) -> Any:
    from sentence_classifier import Pretrained

    return Pretrained(str(bert), 24)


@pytest.fixture(scope="module")
def parts(pretrained: Any, task: Path) -> dict[str, Any]:
    from sentence_data import load_task

    return {name: pretrained.tokenize(*part) for name, part in load_task(task, 0.1, 1).items()}


def _no_amx() -> str | None:
    if _C is None:
        return f"no compiled extension: {_extension.reason}"
    if "amx" in TIERS:
        return None
    # The tier's other instructions are executed as they are.
    emulated = "avx512_bf16" in TIERS and not amx_on_cpu.unavailable()
    return None if emulated else "needs AVX512-BF16 around the emulated AMX"


@pytest.fixture
def amx() -> Iterator[None]:
    """The AMX tier. Where it is emulated, the test must have multiplied tiles."""
    if reason := _no_amx():
        pytest.skip(reason)
    emulator = amx_on_cpu.enable() if amx_on_cpu.needed() else None
    before, multiplied = _C.cpu_tier(), emulator.counts()["TDPBF16PS"] if emulator else 0
    _C.set_cpu_tier_unchecked("amx")
    yield
    _C.set_cpu_tier(before)
    assert emulator is None or emulator.counts()["TDPBF16PS"] > multiplied


@pytest.fixture
def forget_compiled() -> Iterator[None]:
    """torch.compile begins anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _fill_malloc(on: bool) -> None:
    # M_PERTURB of the C library: new memory, which is what the kernels' scratch comes from, holds the complement of the
    # low byte of a value that is not zero. 0xff everywhere is NaN in every floating type.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-6, 0x100 if on else 0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_poison: memory that is not initialised stays as it comes")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the files, the slow ones come first: the last would keep one process alone for minutes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)  # known where pytest-xdist is there
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of `-n auto`: one a CPU that this process may use, each of which takes a gigabyte or two."""
    return min(len(os.sched_getaffinity(0)), 16)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors made by empty() hold NaN (PyTorch does so for deterministic algorithms), and so does other new memory."""
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    _fill_malloc(True)
    yield
    _fill_malloc(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here, and threads that wait for each other on a busy machine take most of the time.

    That results do not depend on their number is tested on its own (test_*_determinism.py).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""``python -m bench --model gpu-triton``: the model of gpu_model.py for what Triton makes of its kernels.

Triton compiles for compute capability 8.0, and its PTX is executed on the CPU. What L2 keeps is kept for one kernel,
where a launcher of the CUDA kernels may have several. Of the configurations that are tuned on a GPU, the one with the
largest tile is counted that is tried at all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from .gpu_model import Case, Work, work_of
from .on_cuda import on_triton


def unavailable() -> str | None:
    """Why kernels cannot be executed here, None when they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "needs triton, which is not installed"
    from tests import ptx_on_cpu

    return ptx_on_cpu.unavailable(cuda=False)


def _tile(config: Any) -> int:
    size = 1
    for name, value in config.kwargs.items():
        if name in ("BLOCK_M", "BLOCK_N"):
            size *= value
    return size


def _largest_of(prune: Callable[..., list[Any]] | None) -> Callable[..., list[Any]]:
    def chosen(configs: list[Any], arguments: Any, **more: Any) -> list[Any]:
        return [max(prune(configs, arguments, **more) if prune else configs, key=_tile)]

    return chosen


@contextmanager
def _largest_tiles() -> Iterator[None]:
    """Inside, one configuration of the tuned kernels is left for each call, so that none is tried."""
    from triton.runtime import Autotuner

    from pykernels import triton_kernels

    package = triton_kernels.__name__
    modules = [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(triton_kernels.__path__)]
    kernels = {id(k): k for module in modules for k in vars(module).values() if isinstance(k, Autotuner)}.values()
    before = [(k, k.early_config_prune, k.cache) for k in kernels]
    for k in kernels:
        k.early_config_prune, k.cache = _largest_of(k.early_config_prune), {}
    try:
        yield
    finally:
        for k, prune, cache in before:
            k.early_config_prune, k.cache = prune, cache


@contextmanager
def _launches(runtime: Any) -> Iterator[list[tuple[str, dict[str, int]]]]:
    """Collects the name of each kernel that is launched, and what it counted."""
    import triton

    from tests.ptx_on_cpu import triton_driver

    class Counting(triton_driver.Launcher):
        def __call__(self, *args: Any) -> None:
            runtime.reset_counters()  # so that distinct sectors are those of one kernel
            super().__call__(*args)
            # Triton keeps a launcher with its kernel, for later drivers too.
            triton.runtime.driver.active.launched.append((self.metadata.name, runtime.counters()))

    driver = triton.runtime.driver.active
    driver.launcher_cls, driver.launched = Counting, []
    # Kernels that find tensors by a table of addresses may touch more than their arguments.
    with mock.patch.object(runtime, "bounds", lambda *_, **__: nullcontext()):
        yield driver.launched


def count(case: Case, check: bool = True) -> tuple[list[dict[str, Work]], int | None]:
    """As gpu_model.count, by kernel."""
    from tests.ptx_on_cpu.triton_driver import active

    found: list[dict[str, Work]] = []
    with active(80, count=True) as runtime, _largest_tiles(), _launches(runtime) as launches, on_triton():
        if check:
            case.check()
        for n in case.counted:
            call = case.call(n)
            launches.clear()
            call()
            found.append({})
            for name, counts in launches:
                found[-1][name] = found[-1].get(name, Work()) + work_of(counts, case.dtype)
    return found, None

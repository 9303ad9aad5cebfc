"""Loads the compiled extension, or tells why there is none.

    _C           the module, or None
    reason       why there is none (None if there is one)
    cuda_reason  why the CUDA kernels are not there (None if they are)

A library built for another torch may load and then misbehave, so the torch it was built for (in `_build.py`, written by
setup.py) is compared before the library is opened.

Environment variable PYKERNELS_CPU_TIER names the instruction set that the CPU kernels shall use: generic, avx2, avx512,
avx512_bf16 or amx. It is read once, here; one that does not exist or cannot run on this processor raises RuntimeError.
"""

import importlib
import os
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

_BUILD = "pip install --force-reinstall --no-deps ."


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        build = importlib.import_module("pykernels._build")
    except ModuleNotFoundError:
        return None, f"it was never built; in the source folder run: {_BUILD}"
    if build.TORCH != str(torch.__version__):
        raise ImportError(
            f"pykernels was built for torch {build.TORCH}, but torch {torch.__version__} is installed. "
            f"Build it for this torch (in the source folder: {_BUILD}), or install torch {build.TORCH} again."
        )
    try:
        return importlib.import_module("pykernels._C"), None
    except ModuleNotFoundError:
        return None, f"it was built for another Python than {sysconfig.get_config_var('SOABI')}; run: {_BUILD}"


def _apply_tier(extension: ModuleType) -> None:
    tier = os.environ.get("PYKERNELS_CPU_TIER")
    if tier:
        try:
            extension.set_cpu_tier(tier)
        except RuntimeError as error:
            raise RuntimeError(f"PYKERNELS_CPU_TIER: {error}") from None


def _load_cuda() -> str | None:
    """Registers the CUDA kernels beside _C's operators; needs no GPU. Returns why it could not."""
    if _C is None:
        return f"pykernels has no compiled extension: {reason}"
    if not importlib.import_module("pykernels._build").CUDA_ARCHS:
        return "not built: this pykernels was built without CUDA kernels (USE_CUDA=1 tells why)"
    try:
        torch.ops.load_library(str(Path(__file__).parent / "_cuda.so"))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


_C, reason = _load()
if _C is not None:
    _apply_tier(_C)
else:
    warnings.warn(f"pykernels has no compiled extension and uses the reference backend: {reason}", stacklevel=2)
cuda_reason = _load_cuda()

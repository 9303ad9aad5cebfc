"""The Triton backend as PyTorch sees it: whether it can be used, and how its raw operators are made.

Triton and the kernels are imported by the first call that needs them. The operators need no compiled extension.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch


@functools.cache
def _import() -> str:
    """Imports Triton. Returns why that cannot be done, empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken one raises more than ImportError
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return ""


def _constant(function: Any) -> Any:
    """torch.compiler.assume_constant_result, which would import torch._dynamo, and so Triton, with this package."""
    function._dynamo_marked_constant = True
    return function


@_constant
def why_not() -> str:
    """Why there is no Triton here, empty if there is."""
    return _import()


@_constant
def runs_on_cpu() -> bool:
    """Whether Triton runs kernels on CPU tensors at present: its interpreter, or an active driver for the CPU."""
    if _import():
        return False
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        return True
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no driver
        return False


_library = torch.library.Library("pykernels", "FRAGMENT")


def operator(schema: str, module: str, function: str) -> Any:
    """Defines a raw operator of CPU and CUDA tensors: that function of that module of pykernels.triton_kernels."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"pykernels.triton_kernels.{module}"), function)(*args)

    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, call, key)
    return getattr(torch.ops.pykernels, name).default

"""Which backend serves an operator: one table, asked on every call.

    reference   the operator's definition in plain PyTorch: every device and dtype, needs nothing
    cpu         the C++ kernels
    cuda        CUDA kernels
    triton      Triton kernels

The argument `backend=` goes before `set_backend()`, which goes before the environment variable PYKERNELS_BACKEND (read
when the package is imported). "auto", which is the default, takes the first backend that can serve the call, or
with PYKERNELS_AUTOTUNE=1 the one that _autotune.py measured to be the fastest.
"""

import os
from typing import NamedTuple

import torch

from . import _extension, _triton

BACKENDS = ("reference", "cpu", "cuda", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_NO_EXTENSION = f"pykernels has no compiled extension: {_extension.reason}" if _extension._C is None else ""


class Backend(NamedTuple):
    """What a backend of one operator accepts, and why it cannot be used at all (empty where it can)."""

    devices: tuple[str, ...]  # empty: every device
    dtypes: tuple[torch.dtype, ...]
    why_not: str

    def missing(self) -> str:
        """Why it cannot be used at all, empty if it can."""
        return self.why_not

    def refusal(self, device: str, dtype: torch.dtype, named: bool) -> str:
        """Why it cannot serve a call, empty if it can. named: by the user, who may ask for what "auto" does not."""
        if self.why_not:
            return self.why_not
        if self.devices and device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, and the tensors are on {device}"
        if dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, and the tensors have {dtype}"
        return ""


class TritonBackend(Backend):
    """Triton is imported only when a call would else be served. On CPU tensors it runs where it is named, and where its
    interpreter or a driver for the CPU is active."""

    __slots__ = ()

    def missing(self) -> str:
        return _triton.why_not()

    def refusal(self, device: str, dtype: torch.dtype, named: bool) -> str:
        on_cpu = named and device == "cpu" and _triton.runs_on_cpu()
        return super().refusal("cuda" if on_cpu else device, dtype, named) or self.missing()


def _backends() -> dict[str, Backend]:
    """Of one operator, in the order in which "auto" tries them."""
    return {
        "cpu": Backend(("cpu",), FLOATS, _NO_EXTENSION),
        "cuda": Backend(("cuda",), FLOATS[:3], _extension.cuda_reason or ""),
        "triton": TritonBackend(("cuda",), FLOATS[:3], ""),
        "reference": Backend((), FLOATS, ""),
    }


OPERATORS = {name: _backends() for name in ("attention_pool", "child_update", "gated_conv1d", "lora_linear")}


def _known(name: str | None, source: str) -> str:
    if name is None or name == "auto":
        return "auto"
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of 'auto', {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_default = _known(os.environ.get("PYKERNELS_BACKEND") or None, "PYKERNELS_BACKEND")


def set_backend(name: str | None) -> None:
    """Backend of later calls that name none: "reference", "cpu", "cuda", "triton"; None or "auto" chooses by itself.

    ValueError for any other name. A backend that cannot serve a call raises RuntimeError then, with the reason.
    """
    global _default
    _default = _known(name, "name")


def default() -> str:
    """What calls go by that name no backend."""
    return _default


def candidates(operator: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that "auto" could take, in its order."""
    return [name for name, b in OPERATORS[operator].items() if not b.refusal(device, dtype, named=False)]


def choose(operator: str, backend: str | None, device: str, dtype: torch.dtype) -> str:
    """The backend that serves this call. RuntimeError with the reason where the one that was named cannot."""
    name = _default if backend is None else _known(backend, "backend")
    backends = OPERATORS[operator]
    if name == "auto":
        for name, candidate in backends.items():
            if not candidate.refusal(device, dtype, named=False):
                return name
        return "reference"
    reason = backends[name].refusal(device, dtype, named=True)
    if reason and dtype in backends["reference"].dtypes:
        raise RuntimeError(f"backend: {name!r} cannot serve {operator} here: {reason}")
    return "reference" if reason else name  # a dtype that no backend takes is for the operator to refuse by name


def table() -> list[tuple[str, str, tuple[str, ...], tuple[torch.dtype, ...], str]]:
    """Rows (operator, backend, devices, dtypes, why not); an empty reason says that it works."""
    return [
        (operator, name, backend.devices or ("every device",), backend.dtypes, backend.missing())
        for operator, backends in OPERATORS.items()
        for name, backend in backends.items()
    ]

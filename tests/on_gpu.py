"""What the tests of CUDA kernels on a GPU share. References are computed on the CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import _extension

# What PyTorch wants of cuBLAS for deterministic algorithms; read when CUDA is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HAS_GPU = torch.version.cuda is not None and torch.cuda.is_available()
GPU_MARKS = [pytest.mark.cuda, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
KERNEL_MARKS = [
    *GPU_MARKS,
    pytest.mark.skipif(_extension.cuda_reason is not None, reason=f"no CUDA kernels: {_extension.cuda_reason}"),
]
DTYPES = ["fp32", "bf16", "fp16"]


def on(device: str, value: Any) -> Any:
    """Tensors in dictionaries and alone on that device, with their strides."""
    if isinstance(value, dict):
        return {name: on(device, v) for name, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value

"""DTensors, without importing torch.distributed.tensor, which takes a second and which most programs never need."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(t: object) -> bool:
    """Whether t is a DTensor. Where that module was never imported there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Tensor:
    """What of t this process has."""
    return t.to_local() if is_sharded(t) else t

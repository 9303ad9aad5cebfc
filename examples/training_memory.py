"""What training holds in memory but for activations: counted, and by arithmetic from the shapes of a network alone."""

from __future__ import annotations

import itertools
import math
import re

import torch
from child_training import state_bytes
from torch import Tensor, nn

from pykernels.fisher_masks import BLOCKS

PARTS = ("weights", "gradients", "state")
STEP = 4  # bytes of the number of steps, which an optimizer keeps for each tensor


def weights_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))


def allocated(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that are there after a step."""
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return dict(zip(PARTS, (weights_bytes(model), gradients, state_bytes(optimizer)), strict=True))


def expected(model: nn.Module, kind: str, reserve_p: float) -> dict[str, int]:
    """What `allocated` will be. The model, adapted already, may be on the meta device, which holds shapes alone.

    kind: "adamw", "adafactor" (PyTorch's), or "F" and "D" of ChildTuningAdamW, D with masks as `fisher_masks` makes
    them where no two entries have the same information.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = sum(p.nbytes for p in trained.values())
    if kind == "adafactor":
        state = sum(_adafactor(p) for p in trained.values())
    elif kind == "D":
        masked = {name for name in trained if re.search(BLOCKS, name)}
        entries = sum(trained[name].numel() for name in masked)
        reserved = entries - math.ceil((entries - 1) * (1 - reserve_p) - 1e-6)
        bits = sum(-(-trained[name].numel() // 8) for name in masked)
        dense = sum(p.numel() for name, p in trained.items() if name not in masked)
        state = 8 * (reserved + dense) + bits + STEP * len(trained)
    else:
        state = sum(2 * (p.nbytes if kind == "adamw" else 4 * p.numel()) + STEP for p in trained.values())
    return dict(zip(PARTS, (weights_bytes(model), gradients, state), strict=True))


def _adafactor(p: Tensor) -> int:
    """Of a matrix the second moments of rows and columns, of a vector those of its elements."""
    if p.dim() < 2:
        return p.nbytes + STEP
    return (p.numel() // p.shape[-1] + p.numel() // p.shape[-2]) * p.element_size() + STEP

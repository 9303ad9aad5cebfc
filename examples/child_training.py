"""What examples that train with AdamW and with ChildTuning share: options, groups of parameters, D's masks, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kit.config import option
from kit.options import Options
from kit.progress import Progress
from kit.stop import Stop
from pykernels import fisher_masks
from pykernels.child_update import unpack_mask


@dataclass(frozen=True)
class ChildOptions(Options):
    """Each example gives its own defaults to some."""

    reserve_p: float = option(0.3, "share of the gradient that F keeps, and of the numbered layers that D trains")
    warmup: float = option(0.1, "share of the steps over which the rate rises; then it falls to zero")
    weight_decay: float = option(0.01, "of all but biases and the weights of norms")
    clip: float = option(1.0, "norm of all gradients, at most; 0: not clipped")
    dropout: float = option(0.1, "of the network")
    fisher_batches: int = option(0, "batches for D's masks; 0: an epoch")
    seeds: int = option(3, "runs of each kind, with seeds from --seed on", may_change=True)
    steps: int = option(0, "of a run; 0: three epochs")
    batch_size: int = option(16, "of a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(warmup=0, weight_decay=0, clip=0, dropout=0, fisher_batches=0, seeds=1, steps=0, batch_size=1)
        if not 0 < self.reserve_p <= 1:
            raise ValueError(f"reserve_p: expected 0 < reserve_p <= 1, got {self.reserve_p}")
        for name in ("warmup", "dropout"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name}: expected less than 1, got {getattr(self, name)}")

    def steps_of(self, samples: int) -> int:
        """Of a run on so many samples."""
        return self.steps or 3 * -(-samples // self.batch_size)

    def once_each(self, *names: str) -> None:
        """ValueError for the first option that says the same twice."""
        for name in names:
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected each once, got {' '.join(map(str, values))}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Named trained parameters, so that masks find them, with decay and without, which is for biases and norms."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() < 2]["params"].append((name, p))
    return [group for group in groups if group["params"]]  # an empty one would count as one without names


def masks_for(
    options: ChildOptions,
    model: nn.Module,
    loss: Callable[[nn.Module, list[int]], Tensor],
    train: Any,
    seed: int,
    progress: Progress,
    stop: Stop,
) -> dict[str, Tensor]:
    """D's masks, from the first batches of an epoch in the order of the seed, with dropout. Stopped between two."""

    def batches() -> Iterator[list[int]]:
        for i, chosen in enumerate(fisher_batches(options, train, seed)):
            stop.check()
            yield chosen
            progress.step(f"seed {seed}: Fisher information, batch {i + 1}")

    torch.manual_seed(seed)
    model.train()
    return fisher_masks(model, loss, batches(), options.reserve_p, max_grad_norm=options.clip or None)


def fisher_batches(options: ChildOptions, train: Any, seed: int) -> list[list[int]]:
    return train.batches(options.batch_size, seed, 0)[: options.fisher_batches or None]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What moments, masks and steps take."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def trained_elements(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Elements of the trained parameters that masks select, or that have no mask."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return sum(int(unpack_mask(masks[n], p.shape).sum()) if n in masks else p.numel() for n, p in trained)


def trained_share(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Of all parameters."""
    return trained_elements(model, masks) / sum(p.numel() for p in model.parameters())

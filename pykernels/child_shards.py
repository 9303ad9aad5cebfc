"""Sharded parameters (DTensor): which elements a shard has, and tensors that are placed like a parameter."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dtensor import is_sharded, local


def local_grad(p: Any, grad: Any) -> Tensor:
    """This process's part of a gradient, placed like its parameter."""
    if is_sharded(p) and is_sharded(grad) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def _box(p: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and first indices of a shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)


@functools.lru_cache(maxsize=4096)
def box_runs(shape: tuple[int, ...], size: tuple[int, ...], first: tuple[int, ...]) -> Tensor | None:
    """Rows (start, length, stride) of the box [first, first + size) of a tensor of that shape; None for all of it."""
    cut = [d for d in range(len(shape)) if size[d] != shape[d]]
    if not cut or 0 in size:
        return None
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    inner = cut[-1]
    length, stride = size[inner] * strides[inner], shape[inner] * strides[inner]
    # The dimensions before the last but one that is cut are written out: a row of the table for each of their indices.
    outer = cut[-2] if len(cut) > 1 else 0
    start = sum(first[d] * strides[d] for d in cut)
    indices = itertools.product(*(range(n) for n in size[:outer]))
    rows = [[start + sum(i * s for i, s in zip(index, strides, strict=False)), length, stride] for index in indices]
    return torch.tensor(rows, dtype=torch.int64)


def runs_of(p: Any) -> Tensor | None:
    """Which elements of the whole parameter this process has; None for all of them."""
    return box_runs(tuple(p.shape), *map(tuple, _box(p))) if is_sharded(p) else None


def like(p: Any, part: Tensor) -> Any:
    """A shard's values as a tensor of the parameter's global shape and placements."""
    part = part.view(local(p).shape)
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def part_of(p: Any, t: Any) -> Tensor:
    """This process's part of t, which has the parameter's global shape: whole, or placed in any way."""
    if not is_sharded(p):
        return t.full_tensor() if is_sharded(t) else t
    if is_sharded(t):
        return t.redistribute(p.device_mesh, p.placements).to_local()
    size, first = _box(p)
    return t[tuple(slice(i, i + n) for i, n in zip(first, size, strict=True))].reshape(local(p).shape)


def sum_over_shards(p: Any, value: Tensor) -> Tensor:
    """The sum of a number over the processes that have different elements of p."""
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if place.is_replicate() else Partial() for place in p.placements]
    return DTensor.from_local(value, p.device_mesh, placements, run_check=False).full_tensor()


def check_found_inf(params: Sequence[Any], found_inf: Tensor) -> None:
    """RuntimeError, on all processes, where only some have a gradient that is not finite and would leave the step out.

    GradScaler takes the maximum over the processes among which the first gradient is shared out: all of them, where
    parameters are placed alike. Otherwise processes can differ, in their next scale too.
    """
    placed = {layout(p): p for p in params if is_sharded(p)}
    if len(placed) < 2:
        return
    from torch.distributed.tensor import DTensor, Partial

    differ = []
    for mesh, p in {p.device_mesh: p for p in placed.values()}.items():
        flag = (found_inf != 0).to(local(p).device, torch.float32)
        count = DTensor.from_local(flag, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor().item()
        if 0 < count < mesh.size():
            differ.append(f"on {count:g} of {mesh.size()} processes")
    if differ:
        wanted = "the same on all processes (GradScaler: with a first parameter that is sharded over all of them)"
        raise RuntimeError(f"found_inf: expected {wanted}, got gradients that are not finite {' and '.join(differ)}")


def layout(p: Any) -> Any:
    """What parameters have in common that are shared out alike; None for whole ones."""
    return (p.device_mesh, tuple(p.placements)) if is_sharded(p) else None

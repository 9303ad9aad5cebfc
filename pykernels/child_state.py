"""The state of ChildTuning's optimizers: made, shown to others, and taken from what others saved.

    step      float32, as in torch.optim      stream    the parameter's number among all: which bits it draws
    moments   float32 (float64 for float64) whatever the parameter's dtype, contiguous; with a mask and compact=True
              those of the selected elements alone
    mask      uint8, a bit an element
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import child_shards as shards
from .child_update import compress, expand, pack_mask, unpack_mask

State = dict[str, Any]


def moment_type(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def selected(packed: Tensor, numel: int) -> int:
    return int(unpack_mask(packed, [numel]).sum())


def local_mask(name: str, p: Tensor, mask: object) -> Tensor:
    """A user's mask as this process's packed bits: bool of the parameter's shape, or packed."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    numel = p.numel()
    if mask.dtype == torch.bool and tuple(mask.shape) == tuple(p.shape):
        return pack_mask(shards.part_of(p, mask).to(p.device))
    if mask.dtype == torch.uint8 and not shards.is_sharded(mask) and tuple(mask.shape) == (-(-numel // 8),):
        if not shards.is_sharded(p):
            return pack_mask(unpack_mask(mask, [numel]).to(p.device))  # without what may be set behind the last element
        return pack_mask(shards.part_of(p, unpack_mask(mask, p.shape)).to(p.device))
    wanted = f"bool {list(p.shape)} or uint8 [{-(-numel // 8)}]"
    error = ValueError if mask.dtype in (torch.bool, torch.uint8) else TypeError
    raise error(f"{name}: expected {wanted}, got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}")


def new_moment(p: Tensor, mask: Tensor | None, compact: bool) -> Tensor:
    part = shards.local(p)
    shape = [selected(mask, part.numel())] if mask is not None and compact else part.shape
    return torch.zeros(shape, dtype=moment_type(part), device=part.device)


def dense_moment(p: Tensor, m: Tensor, mask: Tensor | None) -> Tensor:
    """A moment for each of this process's elements."""
    shape = shards.local(p).shape
    return m.view(shape) if mask is None or m.numel() == shape.numel() else expand(m, mask, shape)


def stored_moment(dense: Tensor, mask: Tensor | None, compact: bool) -> Tensor:
    return compress(dense, mask) if mask is not None and compact else dense.contiguous()


def present(p: Tensor, state: State, moments: Sequence[str], with_mask: bool) -> State:
    """The state with a value for each element, placed like the parameter: what can be saved and shared out anew.

    with_mask: a mask is there even where nothing is masked, so that one that is loaded finds its place."""
    mask = state.get("mask")
    shown = {name: value for name, value in state.items() if name != "mask"}
    for name in moments:
        if name in state:
            shown[name] = shards.like(p, dense_moment(p, state[name], mask))
    if mask is not None or with_mask:
        part = shards.local(p)
        bits = torch.ones(part.shape, dtype=torch.bool, device=part.device)
        shown["mask"] = shards.like(p, bits if mask is None else unpack_mask(mask, part.shape))
    return shown


def _step(name: str, value: object) -> Tensor:
    single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    number = float(value) if single else -1.0  # type: ignore[arg-type]
    if not (number >= 0 and number == math.floor(number)):
        raise ValueError(f"{name}: expected a whole number >= 0, got {value}")
    return torch.tensor(number, dtype=torch.float32)


def _saved_moment(name: str, p: Tensor, value: object, mask: Tensor | None) -> Tensor:
    """A saved moment as a value for each of this process's elements."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    part = shards.local(p)
    if tuple(value.shape) == tuple(p.shape):
        dense = shards.part_of(p, value)
    elif tuple(value.shape) == tuple(part.shape):
        dense = value
    elif mask is not None and value.dim() == 1 and value.numel() == selected(mask, part.numel()):
        dense = expand(value.to(part.device), mask, part.shape)
    else:
        compact = "" if mask is None else f" or [{selected(mask, part.numel())}]"
        raise ValueError(f"{name}: expected shape {list(p.shape)}{compact}, got {list(value.shape)}")
    return dense.detach().to(part.device, moment_type(part), copy=True).contiguous()


def take(
    name: str, p: Tensor, saved: object, moments: Sequence[str], own_mask: Tensor | None, stream: int, compact: bool,
    masked: bool,
) -> State:  # fmt: skip
    """The state that was saved for a parameter, checked; from this optimizer or from the plain one of torch.optim.

    own_mask: what goes for a state that has none. masked: whether the parameter's group uses masks.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"{name}: expected a dict, got {type(saved).__name__}")
    unknown = saved.keys() - {"step", "stream", "mask", *moments}
    if unknown:
        wanted = ", ".join(("step", "stream", "mask", *moments))
        raise ValueError(f"{name}: expected {wanted}, got {min(map(str, unknown))!r}")
    saved_mask = saved.get("mask")
    mask = own_mask
    if saved_mask is not None:
        # Compact and dense forms differ in the mask's type; a packed one may be this process's own part.
        part = shards.local(p)
        packed = isinstance(saved_mask, Tensor) and saved_mask.dtype == torch.uint8
        own = packed and tuple(saved_mask.shape) == (-(-part.numel() // 8),)
        mask = local_mask(f"{name}.mask", part if own else p, saved_mask)
    state: State = {}
    given = [m for m in moments if saved.get(m) is not None]
    if given and len(given) < len(moments):
        missing = next(m for m in moments if m not in given)
        raise ValueError(f"{name}: expected {missing}, got {', '.join(map(str, saved))}")
    # The momentum of torch.optim.SGD says that there was a step, and nothing says how many.
    state["step"] = _step(f"{name}.step", saved.get("step", 1.0 if given else 0.0))
    stream = saved.get("stream", stream)
    if isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < 2**31:
        raise ValueError(f"{name}.stream: expected an int from 0 to 2**31 - 1, got {stream!r}")
    state["stream"] = stream
    dense = {m: _saved_moment(f"{name}.{m}", p, saved[m], mask) for m in given}
    if not masked or (mask is not None and selected(mask, shards.local(p).numel()) == shards.local(p).numel()):
        mask = None
    for m, value in dense.items():
        state[m] = stored_moment(value, mask, compact)
    if mask is not None:
        state["mask"] = mask
    return state

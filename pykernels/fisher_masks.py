"""Which parameters ChildTuning-D trains: those with the largest Fisher information on the task's data."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_float
from ._dtensor import is_sharded, local
from .child_update import pack_mask

# A component of the name that is a number: the blocks of a network, without embeddings, pooler and a new classifier.
BLOCKS = r"(^|\.)\d+\."

_CHUNK = 1 << 22  # entries that are looked at together; bounds the memory of the selection


def fisher_masks(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    reserve_p: float = 0.3,
    *,
    include: str | Callable[[str, Tensor], bool] = BLOCKS,
    accumulate: str = "batch",
    max_grad_norm: float | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The masks of ChildTuning-D (https://arxiv.org/abs/2109.05687, https://kexue.fm/archives/8764), by name.

    One pass over `batches` sums the squared gradient of each included parameter,

        F = sum over batches of (gradient of loss_fn(model, batch))^2

    and an entry is reserved where F is at least the k-th largest of all included entries of all tensors, with k as many
    as lie at or above their (1 - reserve_p) quantile: entries equal to the k-th are all reserved, so that ties (many
    entries without gradient, say) reserve more than k. The k-th value is exact, found by counting bit patterns.

    With LoRA one factor begins at zero and the other has no gradient then: masks that are taken before some steps of
    training leave it out, and it is never trained.

    Args:
        model: in the mode that it is in (the paper's code leaves dropout on). Gradients that it holds are left alone.
        loss_fn: loss_fn(model, batch) -> 0-d loss, the batch's mean.
        batches: anything that can be iterated; a DataLoader.
        include: a regular expression that is searched in a parameter's name, or include(name, parameter) -> bool.
            By default the numbered blocks ("encoder.layer.0.", "h.11."); "layer" is the selection of the paper's code.
            Parameters that do not require gradients are never included; without a mask they train normally.
        accumulate: "batch", the squared gradient of a batch's mean, as the paper's code does; or "sample", the squared
            gradient of each sample alone, as in the paper's formula: B backward passes a batch. A sample is row i of
            every tensor in the batch (a tensor, or lists and dictionaries of them), with its first dimension kept.
        max_grad_norm: each tensor's gradient is scaled down to this norm first (1.0 in the paper's code).
        progress: show a bar (needs tqdm).

    Returns:
        A mask for each included parameter, for ChildTuningAdamW(masks=...): uint8 [ceil(n / 8)] on its device, with
        entry i of the whole parameter (flat index) in bit i % 8 of byte i // 8.
    """
    check_float("reserve_p", reserve_p)
    if not 0 < reserve_p <= 1:
        raise ValueError(f"reserve_p: expected 0 < reserve_p <= 1, got {reserve_p}")
    check_choice("accumulate", accumulate, ("batch", "sample"))
    if max_grad_norm is not None:
        check_float("max_grad_norm", max_grad_norm)
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected > 0, got {max_grad_norm}")
    parameters = _included(model, include)

    fisher = {name: torch.zeros_like(local(p).detach(), dtype=torch.float32) for name, p in parameters.items()}
    count = 0
    with _own_gradients(model):
        for batch in _with_bar(batches, progress):
            for part in (batch,) if accumulate == "batch" else _samples(batch):
                _add_squares(fisher, model, loss_fn, part, parameters, max_grad_norm)
            count += 1
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")

    n = sum(p.numel() for p in parameters.values())
    k = n - math.ceil((n - 1) * (1 - reserve_p) - 1e-6)  # less a rounding: 0.7 * 100 may lie above 70
    sharded = any(map(is_sharded, parameters.values()))
    counted = [fisher[name] for name, p in parameters.items() if _counted_here(p, sharded)]
    threshold = kth_largest(counted, k, _sum_over_processes if sharded else lambda counts: counts)
    if threshold == 0 and reserve_p < 1:
        warnings.warn(
            f"fisher_masks: fewer than {k} of {n} entries have had a gradient, so that all entries are reserved",
            stacklevel=2,
        )
    return {name: pack_mask(_whole(fisher.pop(name) >= threshold, p)) for name, p in parameters.items()}


def kth_largest(tensors: Sequence[Tensor], k: int, total: Callable[[Tensor], Tensor]) -> float:
    """The k-th largest entry of all tensors (float32, none negative or NaN), 1 <= k <= number of entries.

    Such floats are ordered as their bit patterns are. Three passes fix 11, 11 and 10 bits, each by counting the entries
    that agree with the bits so far: no sort, no concatenation, and memory for a few million entries. `total` sums the
    counts (int64) over processes that hold different tensors.
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    prefix = 0
    for shift, width in ((20, 11), (9, 11), (0, 9)):
        counts = torch.zeros(1 << width, dtype=torch.int64, device=device)
        for chunk in (chunk for t in tensors for chunk in t.reshape(-1).split(_CHUNK)):
            bits = chunk.view(torch.int32)
            bits = bits[bits >> (shift + width) == prefix] if shift < 20 else bits
            counts += torch.bincount(bits >> shift & ((1 << width) - 1), minlength=1 << width).to(device)
        at_least = total(counts).flip(0).cumsum(0).tolist()  # entries in the highest bin, the two highest, ...
        place = next(i for i, entries in enumerate(at_least) if entries >= k)
        k -= at_least[place - 1] if place else 0
        prefix = prefix << width | (1 << width) - 1 - place
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32).item()


def _included(model: nn.Module, include: str | Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    if isinstance(include, str):
        try:
            pattern = re.compile(include)
        except re.error as error:
            raise ValueError(f"include: expected a regular expression, got {include!r} ({error})") from None
        chosen = lambda name, p: pattern.search(name) is not None  # noqa: E731
    elif callable(include):
        chosen = include
    else:
        raise TypeError(f"include: expected a regular expression or a function, got {type(include).__name__}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters: dict[str, Tensor] = {name: p for name, p in trained.items() if chosen(name, p)}
    if not any(p.numel() for p in parameters.values()):
        raise ValueError(f"include: expected to choose some of the {len(trained)} trained parameters, got none")
    return parameters


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Sets the gradients that the model holds aside, and puts them back whatever happens."""
    held = {p: p.grad for p in model.parameters()}
    try:
        for p in held:
            p.grad = None
        yield
    finally:
        for p, grad in held.items():
            p.grad = grad


def _add_squares(
    fisher: dict[str, Tensor],
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    parameters: dict[str, Tensor],
    max_grad_norm: float | None,
) -> None:
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn: expected to return a 0-d tensor that requires a gradient, got {got}")
    loss.backward()
    for name, p in parameters.items():
        if p.grad is None:
            continue
        norm = torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        norm = norm.full_tensor() if is_sharded(norm) else norm
        if not torch.isfinite(norm):
            raise ValueError(f"loss_fn: expected finite gradients, got NaN or infinity in that of {name}")
        grad = local(p.grad).detach().float()
        if max_grad_norm is not None:
            grad = grad * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        fisher[name].addcmul_(grad, grad)
    for p in model.parameters():
        p.grad = None


def _samples(batch: Any) -> Iterator[Any]:
    sizes = {t.shape[0] for t in _tensors(batch) if t.dim()}
    if len(sizes) != 1:
        raise ValueError(f"batches: expected tensors of equal first dimension for the samples, got {sorted(sizes)}")
    for i in range(sizes.pop()):
        yield _row(batch, i)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _row(batch: Any, i: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _row(value, i) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        rows = [_row(value, i) for value in batch]
        return type(batch)(*rows) if hasattr(batch, "_fields") else type(batch)(rows)
    return batch


def _with_bar(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(batches, desc="Fisher information", unit="batch")


def _counted_here(p: Any, sharded: bool) -> bool:
    """Whether this process counts its part of p: of copies in several processes the first is counted."""
    if not sharded:
        return True
    if not is_sharded(p):
        return torch.distributed.get_rank() == 0
    place = p.device_mesh.get_coordinate()
    if place is None:
        return False
    return all(i == 0 for i, placed in zip(place, p.placements, strict=True) if placed.is_replicate())


def _sum_over_processes(counts: Tensor) -> Tensor:
    torch.distributed.all_reduce(counts)
    return counts


def _whole(mask: Tensor, p: Any) -> Tensor:
    if not is_sharded(p):
        return mask
    layout = {"shape": p.shape, "stride": p.stride()}  # told, since the shards may be of unequal sizes
    return type(p).from_local(mask, p.device_mesh, p.placements, run_check=False, **layout).full_tensor()

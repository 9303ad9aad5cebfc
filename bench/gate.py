"""The correctness gate before any timing: outputs and gradients against an fp64 reference by the error rule.

Error rule: the largest error against the fp64 reference is at most FORWARD (GRADIENT) times that of the same-dtype
PyTorch expression, plus a floor of two roundings of the result and those of a sum of n products. Added one by one these
err by eps * sqrt(n / 24) of their size (standard deviation); sqrt(n) * eps is five times that, which is what
the largest of a million elements reaches. Sums are taken in fp32, for fp64 in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

FORWARD = 2.0
GRADIENT = 3.0

Tensors = Mapping[str, torch.Tensor]


def _largest_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return (got.double() - exact).abs().max().item() if exact.numel() else 0.0


def judge(name: str, got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, terms: int) -> str | None:
    """None where ``got``, sums of ``terms`` products, obeys the error rule, else one line that says how it fails."""
    if got.shape != exact.shape or got.dtype != eager.dtype:
        return f"{name}: want {tuple(exact.shape)} {eager.dtype}, got {tuple(got.shape)} {got.dtype}"
    if not torch.isfinite(got).all():
        return f"{name}: not finite"
    factor = GRADIENT if name.startswith("d") else FORWARD
    largest = exact.abs().max().item() if exact.numel() else 0.0
    sums = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps * math.sqrt(terms)
    floor = (2 * torch.finfo(got.dtype).eps + sums) * largest
    error, eager_error = _largest_error(got, exact), _largest_error(eager, exact)
    if error <= factor * eager_error + floor:
        return None
    return f"{name}: error {error:.3g} against fp64, allowed {factor:g} x {eager_error:.3g} of eager + {floor:.3g}"


def compare(got: Tensors, eager: Tensors, exact: Tensors, terms: Mapping[str, int]) -> str | None:
    """First violation of the error rule, or None; names that begin with "d" are gradients."""
    failures = (judge(name, got[name], eager[name], exact[name], terms[name]) for name in got)
    return next((failure for failure in failures if failure), None)


def gradients(call: Callable[[], torch.Tensor], dy: torch.Tensor, wanted: Tensors) -> dict[str, torch.Tensor]:
    """Output "y" and gradients "d<name>" of one call, for the tensors in ``wanted``."""
    with torch.enable_grad():
        y = call()
        grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def saved_bytes(call: Callable[[], torch.Tensor], given: Sequence[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass: unique storages that belong to none of the ``given`` tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    # Storages, not numbers, so that none is freed and its address reused while they are counted.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in kept.values())

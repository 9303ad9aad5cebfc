"""ChildTuning (Xu et al. 2021, "Raise a Child in Large Language Model", arXiv 2109.05687): AdamW and SGD that train a
part of the parameters, drawn anew in each step (mode "F") or chosen once for the task (mode "D"). child_update.py has
the formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from . import child_shards as shards
from . import child_update
from ._checks import check_choice, check_float
from .child_optimizer import ChildTuning, check_bool, check_rate


class ChildTuningAdamW(ChildTuning):
    """AdamW on a part of the parameters, in one pass over memory.

    Mode "F" keeps each element of the gradient with probability reserve_p, drawn anew in each step, and divides it by
    reserve_p. Mode "D" keeps the elements that `masks` select, undivided, and moments for these alone. "none" is AdamW.
    Gradients are masked after clipping, and p.grad is never written.

    Args:
        params: parameters, named parameters, or groups, as in torch.optim. float32, bfloat16, float16 or float64, any
            strides without overlap, or DTensors.
        lr, weight_decay: numbers, or tensors of one element.
        betas, eps: as in torch.optim.AdamW; the original's eps is 1e-6.
        mode: "F", "D" or "none"; the original's "ChildTuning-F", "ChildTuning-D" and None are the same.
        reserve_p: of mode "F", in multiples of 2**-16.
        seed: of the random bits. The same seed draws the same masks on every backend, thread count and sharding.
        masks: of mode "D", by name or by parameter (see set_masks).
        where: "grad", or "update": the moments are those of whole gradients, and the update is masked. With fixed masks
            both are the same but for the decay of SGD, which is a part of its update.
        order: "torch" (decay first, eps beside the corrected root, as torch.optim.AdamW) or "hf" (decay last, eps
            beside the uncorrected root, as the original and transformers' former AdamW).
        decay: "all", or "reserved": only elements that the mask selects decay.
        correct_bias: False leaves the moments' bias as it is.
        compact: in mode "D" keep moments for the selected elements alone; the results are the same.
        maximize: as in torch.optim.
        max_grad_norm: clip the norm of all gradients together, as torch.nn.utils.clip_grad_norm_ does.
        stochastic_rounding: round bfloat16 parameters up or down by random bits, right in the mean.
        amsgrad: must be False.
        backend: "reference", "cpu", "cuda", "triton", or "auto"; None: what `set_backend` or PYKERNELS_BACKEND says.

    Raises TypeError for types and dtypes, ValueError for values, RuntimeError for a named backend that cannot serve.
    GradScaler's grad_scale and found_inf are applied in the step; where only some of the processes that share sharded
    parameters found infinity, all raise RuntimeError.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        correct_bias: bool = True,
        reserve_p: float = 0.3,
        mode: str | None = "F",
        *,
        seed: int = 0,
        masks: Mapping[Any, Tensor] | None = None,
        where: str = "grad",
        order: str = "torch",
        decay: str = "all",
        compact: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        amsgrad: bool = False,
        backend: str | None = None,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad: expected False, got True: the largest second moment is not kept")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias,
            "reserve_p": reserve_p, "mode": mode, "seed": seed, "where": where, "order": order, "decay": decay,
            "compact": compact, "maximize": maximize, "max_grad_norm": max_grad_norm,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        super().__init__(params, defaults, masks, backend)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        betas = group["betas"]
        if not (isinstance(betas, tuple | list) and len(betas) == 2):
            raise TypeError(f"betas: expected two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_float(f"betas[{i}]", beta)
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}]: expected 0 <= beta < 1, got {beta}")
        check_rate("eps", group["eps"])
        check_choice("order", group["order"], ("torch", "hf"))
        check_bool("correct_bias", group["correct_bias"])

    def _update(self, backend: str, group: dict[str, Any], arguments: tuple[Any, ...], common: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        own: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "order": group["order"]}
        call = child_update.adamw_of(backend)
        call(*arguments, **own, correct_bias=group["correct_bias"], **common)


class ChildTuningSGD(ChildTuning):
    """SGD on a part of the parameters: torch.optim.SGD on the masked gradient, in one pass over memory.

    momentum, dampening, nesterov and weight_decay are those of torch.optim.SGD: decay is added to the masked gradient,
    for all elements, or with decay="reserved" for those that the mask selects. In mode "D" the momentum is kept for the
    selected elements alone, unless others decay. The other arguments and the errors are those of ChildTuningAdamW.
    """

    moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        reserve_p: float = 0.3,
        mode: str | None = "F",
        seed: int = 0,
        masks: Mapping[Any, Tensor] | None = None,
        where: str = "grad",
        decay: str = "all",
        compact: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "reserve_p": reserve_p, "mode": mode, "seed": seed, "where": where, "decay": decay, "compact": compact,
            "maximize": maximize, "max_grad_norm": max_grad_norm, "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        super().__init__(params, defaults, masks, backend)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        check_rate("momentum", group["momentum"])
        check_float("dampening", group["dampening"])
        check_bool("nesterov", group["nesterov"])
        if group["nesterov"] and not (group["momentum"] > 0 and group["dampening"] == 0):
            raise ValueError("nesterov: expected a momentum and no dampening with it, got True")

    def _moments_of(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return self.moments if group["momentum"] else ()

    def _compacts(self, group: Mapping[str, Any]) -> bool:
        return super()._compacts(group) and (float(group["weight_decay"]) == 0 or group["decay"] == "reserved")

    def _check_step(self, group: dict[str, Any], params: list[Any], moments: list[list[Any]], masks: list[Any]) -> None:
        if not group["momentum"]:
            return
        decays = float(group["weight_decay"]) != 0 and group["decay"] == "all"
        for p, buffer, mask in zip(params, moments[0], masks, strict=True):
            if buffer is None:
                raise ValueError("momentum: expected 0, as it was when the state began")
            if decays and mask is not None and buffer.numel() != shards.local(p).numel():
                wanted = "0, or decay='reserved', with momentum for selected elements alone"
                raise ValueError(f"weight_decay: expected {wanted}, got {group['weight_decay']}")

    def _update(self, backend: str, group: dict[str, Any], arguments: tuple[Any, ...], common: dict[str, Any]) -> None:
        params, grads, buffers, *others = arguments
        own: dict[str, Any] = {name: group[name] for name in ("momentum", "dampening", "nesterov")}
        call = child_update.sgd_of(backend)
        call(params, grads, buffers if group["momentum"] else [], *others, **own, **common)

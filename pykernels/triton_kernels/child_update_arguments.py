"""The arguments of child_update's raw operators: the checks of csrc/child_update_arguments.cpp in the same words, and
what all kernels of a call are told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, name_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_STEPS = 2**24  # float32 counts no further


class Inputs(NamedTuple):
    """What the operators of AdamW and SGD have in common."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    steps: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    runs: Sequence[Tensor | None]
    streams: Sequence[int]
    grad_scale: Tensor | None
    found_inf: Tensor | None
    square_sum: Tensor | None
    lr: Tensor
    weight_decay: Tensor
    reserve_p: float | None
    max_grad_norm: float
    seed: int
    where: str
    decay: str
    maximize: bool
    stochastic_rounding: bool


class Slice:
    """One parameter as the kernels see it: contiguous tensors of its elements, first and second moments if any."""

    __slots__ = ("compact", "first", "g", "mask", "p", "root_scale", "runs", "second", "step", "step_size", "stream")

    def __init__(self, p: Tensor, g: Tensor, mask: Tensor | None, runs: Tensor | None, stream: int, step: int) -> None:
        self.p, self.g, self.mask, self.runs, self.stream, self.step = p, g, mask, runs, stream, step
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.compact = False  # the moments are those of the selected elements
        self.step_size = self.root_scale = 0.0


def _number(name: str, t: Tensor) -> float:
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {name_of(t.dtype)}")
    if t.numel() != 1:
        raise ValueError(f"{name}: expected one number, got shape {list(t.shape)}")
    return t.item()


def _rate(name: str, t: Tensor) -> float:
    value = _number(name, t)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value


def check_dtype(name: str, t: Tensor) -> None:
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16 on Triton, got {name_of(t.dtype)}")


def check_dense(name: str, t: Tensor, like: Tensor, of: str) -> None:
    """The layout, dtype and device of the tensor named `of`."""
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {t.layout}")
    if t.dtype != like.dtype:
        raise TypeError(f"{name}: expected {name_of(like.dtype)} like {of}, got {name_of(t.dtype)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} like {of}, got {t.device}")


class ChildCall:
    """One step. What is read from the device, and waits for it, is what csrc/cuda/child_update.cpp reads."""

    def __init__(self, inputs: Inputs) -> None:
        if not inputs.params:
            raise ValueError("params: expected at least one tensor, got none")
        like = inputs.params[0]
        check_dtype("params", like)
        lists = (inputs.params, inputs.grads, inputs.steps, inputs.masks, inputs.runs, inputs.streams)
        counts = [len(values) for values in lists]
        if len(set(counts)) > 1:
            names = "params, grads, steps, masks, runs, streams"
            raise ValueError(f"{names}: expected as many of each, got {', '.join(map(str, counts))}")
        if inputs.stochastic_rounding and like.dtype != torch.bfloat16:
            raise TypeError(f"stochastic_rounding: expected bfloat16 parameters, got {name_of(like.dtype)}")
        self.inputs, self.device, self.dtype = inputs, like.device, like.dtype
        self.skips = inputs.found_inf is not None and _number("found_inf", inputs.found_inf) != 0
        self.lr, self.weight_decay = _rate("lr", inputs.lr), _rate("weight_decay", inputs.weight_decay)
        self._set_factors()
        self.copies: list[tuple[Tensor, Tensor]] = []  # parameters that are not contiguous, and their elements
        self.slices = [self._slice(i, *values) for i, values in enumerate(zip(*lists, strict=True))]

    def _set_factors(self) -> None:
        given = self.inputs
        check_choice("where", given.where, ("grad", "update"))
        check_choice("decay", given.decay, ("all", "reserved"))
        self.reserved_decay = given.decay == "reserved"
        factor, scale = -1.0 if given.maximize else 1.0, 1.0
        if given.grad_scale is not None:
            scale = _number("grad_scale", given.grad_scale)
            if not self.skips and not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"grad_scale: expected a finite number > 0, got {scale}")
            factor /= scale or 1.0
        if given.square_sum is not None and not given.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected more than 0, got {given.max_grad_norm}")
        # The norm stays where it is, so that nothing waits for it; one from elsewhere is brought to the kernels.
        self.square_sum = None
        if given.square_sum is not None:
            self.square_sum = given.square_sum.to(self.device, torch.float64)
        self.norm_factor = 1.0 / (scale or 1.0)
        self.mask_grad = self.mask_update = True
        self.update_factor, self.threshold = 1.0, 0
        if given.reserve_p is not None:
            p = given.reserve_p
            if not 0 < p <= 1:
                raise ValueError(f"reserve_p: expected 0 < reserve_p <= 1, got {p}")
            self.threshold = math.floor(p * 65536 + 0.5)
            if self.threshold == 0:
                raise ValueError(f"reserve_p: {p} keeps fewer than one element in 65536")
            kept = torch.tensor(65536 / self.threshold, dtype=torch.float32).item()
            self.mask_grad, self.mask_update = given.where == "grad", given.where == "update"
            if self.mask_grad:
                factor *= kept
            else:
                self.update_factor = kept
        self.grad_factor = factor

    def _slice(self, i: int, p: Tensor, g: Tensor, step: Tensor, mask: Any, runs: Any, stream: int) -> Slice:
        like = self.inputs.params[0]
        check_dense(f"params[{i}]", p, like, "params[0]")
        check_dense(f"grads[{i}]", g, like, "params[0]")
        if g.shape != p.shape:
            raise ValueError(f"grads[{i}]: expected shape {list(p.shape)} like the parameter, got {list(g.shape)}")
        if step.dtype != torch.float32:
            raise TypeError(f"steps[{i}]: expected float32, got {name_of(step.dtype)}")
        if step.numel() != 1 or not step.is_cpu:
            wanted = "one number on cpu"
            raise ValueError(f"steps[{i}]: expected {wanted}, got shape {list(step.shape)} on {step.device}")
        done = step.item()
        if not (0 <= done < MOST_STEPS and done == math.floor(done)):
            raise ValueError(f"steps[{i}]: expected a whole number from 0 to 2^24 - 1, got {done}")
        if not 0 <= stream < 2**31:
            raise ValueError(f"streams[{i}]: expected 0 to 2^31 - 1, got {stream}")
        elements = p.detach()
        if not p.is_contiguous():
            if torch._debug_has_internal_overlap(p) == 1:
                wanted = "elements that do not share memory"
                raise ValueError(f"params[{i}]: expected {wanted}, got strides {list(p.stride())}")
            elements = elements.contiguous()
            self.copies.append((p, elements))
        numel = p.numel()
        if mask is not None:
            if self.inputs.reserve_p is not None:
                raise ValueError(f"masks[{i}]: expected None with reserve_p, got a tensor")
            mask = self._mask(f"masks[{i}]", mask, numel)
        if runs is not None:
            runs = self._runs(f"runs[{i}]", runs, numel)
        return Slice(elements, g.detach().contiguous(), mask, runs, stream, int(done) + 1)

    def _mask(self, name: str, mask: Tensor, numel: int) -> Tensor:
        if mask.dtype != torch.uint8:
            raise TypeError(f"{name}: expected uint8, got {name_of(mask.dtype)}")
        size = (numel + 7) // 8
        if mask.device != self.device or tuple(mask.shape) != (size,):
            wanted = f"[{size}] on {self.device}, a bit for each of {numel} elements"
            raise ValueError(f"{name}: expected {wanted}, got shape {list(mask.shape)} on {mask.device}")
        return mask.contiguous()

    @staticmethod
    def _runs(name: str, runs: Tensor, numel: int) -> Tensor | None:
        if runs.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {name_of(runs.dtype)}")
        if not runs.is_cpu or runs.dim() != 2 or runs.shape[1] != 3:
            wanted = "rows (start, length, stride) on cpu"
            raise ValueError(f"{name}: expected {wanted}, got shape {list(runs.shape)} on {runs.device}")
        if numel == 0:
            return None
        if runs.shape[0] == 0 or numel % runs.shape[0] != 0:
            raise ValueError(f"{name}: expected rows that share {numel} elements equally, got {runs.shape[0]}")
        for start, length, stride in runs.tolist():
            if start < 0 or length <= 0 or stride < 0:
                wanted = "start >= 0, length > 0, stride >= 0"
                raise ValueError(f"{name}: expected {wanted}, got {start}, {length}, {stride}")
        return runs

    def set_moments(self, name: str, moments: Sequence[Tensor], which: int) -> None:
        """Moments number `which`, 0 or 1. How many elements a mask selects is known to the device alone: fewer moments
        than the parameter has elements are those of the selected ones, and none behind them are touched."""
        if len(moments) != len(self.slices):
            raise ValueError(f"{name}: expected {len(self.slices)} tensors like params, got {len(moments)}")
        for i, (m, s) in enumerate(zip(moments, self.slices, strict=True)):
            if m.dtype != torch.float32:
                raise TypeError(f"{name}[{i}]: expected float32, got {name_of(m.dtype)}")
            if m.device != self.device or not m.is_contiguous():
                wanted = f"a contiguous tensor on {self.device}"
                raise ValueError(f"{name}[{i}]: expected {wanted}, got strides {list(m.stride())} on {m.device}")
            numel, count = s.p.numel(), m.numel()
            if not (count == numel or (s.mask is not None and count < numel)):
                also = "" if s.mask is None else ", or one for each that the mask selects"
                raise ValueError(f"{name}[{i}]: expected {numel} elements like the parameter{also}, got {count}")
            if which == 0:
                s.first, s.compact = m, count < numel
                continue
            assert s.first is not None
            if count != s.first.numel():
                wanted = f"{s.first.numel()} elements like the first moments"
                raise ValueError(f"{name}[{i}]: expected {wanted}, got {count}")
            s.second = m

    def check_sgd(self, momentum: float, dampening: float, nesterov: bool) -> None:
        if not (math.isfinite(momentum) and momentum >= 0):
            raise ValueError(f"momentum: expected a finite number >= 0, got {momentum}")
        if not math.isfinite(dampening):
            raise ValueError(f"dampening: expected a finite number, got {dampening}")
        if nesterov and not (momentum > 0 and dampening == 0):
            got = f"momentum = {momentum} and dampening = {dampening}"
            raise ValueError(f"nesterov: expected a momentum and no dampening, got {got}")
        for i, s in enumerate(self.slices):
            if s.compact and self.weight_decay != 0 and not self.reserved_decay:
                wanted = "one for each element where all of them decay"
                raise ValueError(f"momentum_buffers[{i}]: expected {wanted}, got those that the mask selects")
        # Decay is a part of SGD's update: masks of gradients leave it to all elements.
        if self.inputs.reserve_p is None:
            self.mask_update = self.inputs.where == "update"

    def set_adamw(self, beta1: float, beta2: float, eps: float, order: str, correct_bias: bool) -> tuple[float, float]:
        """What parameters are multiplied with before the update, and by how much of themselves they shrink after it."""
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {beta}")
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
        check_choice("order", order, ("torch", "hf"))
        for s in self.slices:
            correction1 = 1 - beta1**s.step if correct_bias else 1.0
            root2 = math.sqrt(1 - beta2**s.step) if correct_bias else 1.0
            if order == "hf":
                s.step_size, s.root_scale = self.lr / correction1 * root2, 1.0
            else:
                s.step_size, s.root_scale = self.lr / correction1, 1 / root2
        shrink = self.lr * self.weight_decay
        return (1.0, shrink) if order == "hf" else (1 - shrink, 0.0)

    def finish(self, changed: Sequence[Tensor]) -> None:
        for p, elements in self.copies:
            p.detach().copy_(elements)
        torch._foreach_add_(list(self.inputs.steps), 1)
        torch.autograd.graph.increment_version([*self.inputs.params, *changed])

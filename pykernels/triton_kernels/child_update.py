"""The steps of ChildTuning's optimizers: AdamW and SGD with masked gradients or updates, in one pass over memory.

All tensors of a kind are one launch. A table in the device's memory tells of them, addresses included: it is copied
there without waiting. Tensors are cut into chunks, one for each program. A block of a chunk is [ROWS, 8] elements, so
that a row has one byte of a stored mask and takes one call of Philox. Kernels are not tuned by trying, which would
repeat the step; results do not depend on the sizes. Each rounding is written down, as in kernels/cuda/child_rules.cuh:
with compact moments and without, the same bits come out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .child_update_arguments import ChildCall, Inputs, Slice, check_dense, check_dtype
from .launch import on_device

SGD, MOMENTUM, ADAMW = (tl.constexpr(i) for i in range(3))
# Which elements are selected: every one, by drawn bits, by stored bits, or by stored bits with moments of them alone.
ALL, DRAWN, STORED, COMPACT = (tl.constexpr(i) for i in range(4))

# The table: numbers of the call, fields of each tensor, which tensor each chunk is of, rows (start, length, stride).
SEED, GRAD_FACTOR, MAX_GRAD_NORM, NORM_FACTOR, HEADER = (tl.constexpr(i) for i in range(5))
(
    P, G, FIRST, SECOND, MASK, MOMENTS, ELEMENTS, FIRST_CHUNK, STREAM, STEP, STEP_SIZE, ROOT_SCALE, RUNS, RUN_ELEMENTS,
    FIELDS,
) = (tl.constexpr(i) for i in range(15))  # fmt: skip

CHUNK = 8192
ROWS, COUNTED, WARPS = 128, 1024, 4  # of a block; bytes of masks that are counted together

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# --- kernels ---


@triton.jit
def tensor_of(table, count):
    """Where the fields of this program's tensor are, and its chunk's number among those of the tensor."""
    number = tl.load(table + HEADER + count.to(tl.int64) * FIELDS + tl.program_id(0))
    fields = table + HEADER + number * FIELDS
    return fields, tl.program_id(0) - tl.load(fields + FIRST_CHUNK)


@triton.jit
def pointer_of(field, ELEMENT: tl.constexpr, WIDE: tl.constexpr):
    pointer = tl.load(field).to(tl.pointer_type(ELEMENT))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def popcount(bits):
    """How many of the lowest eight bits are set; there are no others."""
    bits = bits - (bits >> 1 & 0x55)
    bits = (bits & 0x33) + (bits >> 2 & 0x33)
    return (bits + (bits >> 4)) & 0x0F


@triton.jit
def stored_bits(mask, byte, elements):
    """Bytes of a mask as int32, without bits behind the last element."""
    left = tl.minimum(tl.maximum(elements - byte * 8, 0), 8).to(tl.int32)
    return tl.load(mask + byte, mask=left > 0, other=0).to(tl.int32) & ((1 << left) - 1)


@triton.jit
def draws_of(table, fields, row, stream, SHARDED: tl.constexpr, ROWS: tl.constexpr):
    """The draws of elements 8 * row ... 8 * row + 7. row: int64 [ROWS] -> uint32 [ROWS, 8]."""
    seed, step = tl.load(table + SEED), tl.load(fields + STEP).to(tl.uint32)
    seed_low, seed_high = (seed & 0xFFFFFFFF).to(tl.int32), (seed >> 32).to(tl.int32)
    if SHARDED:
        element, part = row[:, None] * 8 + tl.arange(0, 8)[None, :], tl.load(fields + RUN_ELEMENTS)
        # No row for elements that do not exist.
        inside = element < tl.load(fields + ELEMENTS)
        run = table + tl.load(fields + RUNS) + tl.where(inside, element, 0) // part * 3
        start, length, stride = tl.load(run), tl.load(run + 1), tl.load(run + 2)
        within = element % part
        return philox.draws_at(seed_low, seed_high, start + within // length * stride + within % length, stream, step)
    draws = philox.draws_of_calls(seed_low, seed_high, row, stream, step)
    return tl.reshape(draws, (ROWS, 8))


@triton.jit
def grad_factor(table, square_sum):
    """What gradients are multiplied with: clipped as torch.nn.utils.clip_grad_norm_ does."""
    factor = tl.load(table + GRAD_FACTOR).to(tl.float64, bitcast=True)
    if square_sum is not None:
        norm = tl.sqrt(tl.load(square_sum)) * tl.load(table + NORM_FACTOR).to(tl.float64, bitcast=True)
        clip = tl.load(table + MAX_GRAD_NORM).to(tl.float64, bitcast=True) / (norm + 1e-6)
        factor = tl.where(clip >= 1.0, factor, factor * clip)  # NaN spreads
    return factor.to(tl.float32)


@triton.jit(do_not_specialize=[
    "count", "beta1", "beta2", "rest1", "rest2", "eps", "before", "after", "lr", "decay", "momentum", "gain",
    "nesterov", "threshold", "update_factor", "mask_grad", "mask_update", "reserved_decay",
])  # fmt: skip
def child_update(
    table, count, square_sum, selected,
    beta1, beta2, rest1, rest2, eps, before, after, lr, decay, momentum, gain, nesterov,
    threshold, update_factor, mask_grad, mask_update, reserved_decay,
    ELEMENT: tl.constexpr, RULE: tl.constexpr, MASKS: tl.constexpr, STOCHASTIC: tl.constexpr, SHARDED: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """WIDE: all addresses are multiples of 16 and the numbers of elements of 8, but for compact moments."""
    fields, chunk = tensor_of(table, count)
    elements = tl.load(fields + ELEMENTS)
    if WIDE:
        elements = tl.multiple_of(elements, 8)
    p, g = pointer_of(fields + P, ELEMENT, WIDE), pointer_of(fields + G, ELEMENT, WIDE)
    factor = grad_factor(table, square_sum)
    stream = tl.load(fields + STREAM).to(tl.uint32)
    ALIGNED: tl.constexpr = WIDE and MASKS != COMPACT
    if RULE != SGD:
        first = pointer_of(fields + FIRST, tl.float32, ALIGNED)
    if RULE == ADAMW:
        second = pointer_of(fields + SECOND, tl.float32, ALIGNED)
        step_size = tl.load(fields + STEP_SIZE).to(tl.float64, bitcast=True).to(tl.float32)
        root_scale = tl.load(fields + ROOT_SCALE).to(tl.float64, bitcast=True).to(tl.float32)
    if MASKS == STORED or MASKS == COMPACT:
        mask = pointer_of(fields + MASK, tl.uint8, False)
    if MASKS == COMPACT:
        moments, rank = tl.load(fields + MOMENTS), tl.load(selected + tl.program_id(0))

    column = tl.arange(0, 8)
    begin = chunk * CHUNK
    for row0 in range(begin // 8, tl.minimum(begin + CHUNK, elements + 7) // 8, ROWS):
        row = row0 + tl.arange(0, ROWS).to(tl.int64)
        element = row[:, None] * 8 + column[None, :]
        inside = element < elements
        at, held = element, inside  # of moments
        if MASKS == DRAWN:
            selects = draws_of(table, fields, row, stream, SHARDED, ROWS) < threshold.to(tl.uint32)
        elif MASKS != ALL:
            bits = stored_bits(mask, row, elements)
            selects = (bits[:, None] >> column[None, :] & 1) != 0
        if MASKS == COMPACT:
            counts = popcount(bits)
            ahead = tl.cumsum(counts, 0) - counts
            at = rank + ahead[:, None] + popcount(bits[:, None] & ((1 << column) - 1)[None, :])
            held = selects & (at < moments)
            rank += tl.sum(counts, 0)

        weight = tl.load(p + element, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(g + element, mask=inside, other=0.0).to(tl.float32) * factor
        decays = inside
        if MASKS != ALL:
            grad = tl.where(selects | (mask_grad == 0), grad, 0.0)
            decays = selects | (reserved_decay == 0)
        if RULE == ADAMW:
            m = tl.load(first + at, mask=held, other=0.0)
            v = tl.load(second + at, mask=held, other=0.0)
            m = tl.fma(m, beta1, rest1 * grad)
            v = tl.fma(v, beta2, rest2 * (grad * grad))
            tl.store(first + at, m, mask=held)
            tl.store(second + at, v, mask=held)
            d = tl.div_rn(step_size * m, tl.fma(tl.sqrt_rn(v), root_scale, eps))
        else:
            grad = tl.where(decay != 0, tl.fma(tl.where(decays, weight, 0.0), decay, grad), grad)
            if RULE == MOMENTUM:
                m = tl.load(first + at, mask=held, other=0.0)
                m = tl.where(tl.load(fields + STEP) == 1, grad, tl.fma(m, momentum, gain * grad))
                tl.store(first + at, m, mask=held)
                grad = tl.where(nesterov != 0, tl.fma(m, momentum, grad), m)
            d = grad * lr
        if MASKS != ALL:
            d = tl.where(mask_update == 0, d, tl.where(selects, d * update_factor, 0.0))
        if MASKS == COMPACT:
            d = tl.where(held, d, 0.0)
        weight = tl.fma(weight, tl.where(decays, before, 1.0), -d)
        weight = tl.where(decays & (after != 0), tl.fma(weight, -after, weight), weight)
        if STOCHASTIC:
            # bfloat16 by a random number below one unit of its last place in place of a half; NaN stays NaN.
            word = weight.to(tl.uint32, bitcast=True)
            word += draws_of(table, fields, row, stream | 0x80000000, SHARDED, ROWS)
            rounded = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
            weight = tl.where(weight == weight, rounded, weight)
        tl.store(p + element, weight.to(ELEMENT), mask=inside)


@triton.jit(do_not_specialize=["count"])
def count_selected(table, count, selected, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """How many elements each chunk selects."""
    fields, chunk = tensor_of(table, count)
    mask, elements = pointer_of(fields + MASK, tl.uint8, False), tl.load(fields + ELEMENTS)
    bits = stored_bits(mask, chunk * (CHUNK // 8) + tl.arange(0, BLOCK), elements)
    tl.store(selected + tl.program_id(0), tl.sum(popcount(bits), 0).to(tl.int64))


@triton.jit
def scan_selected(table, selected, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """From the counts of a tensor's chunks to their sums before each."""
    fields = table + HEADER + tl.program_id(0) * FIELDS
    chunks = tl.cdiv(tl.load(fields + ELEMENTS), CHUNK)
    to = selected + tl.load(fields + FIRST_CHUNK)
    before = tl.zeros((), tl.int64)
    for chunk0 in range(0, chunks, BLOCK):
        chunk = chunk0 + tl.arange(0, BLOCK)
        counts = tl.load(to + chunk, mask=chunk < chunks, other=0)
        tl.store(to + chunk, before + tl.cumsum(counts, 0) - counts, mask=chunk < chunks)
        before += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["count"])
def square_sums(table, count, partials, ELEMENT: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """The sum of the squares of each chunk of g, in float64."""
    fields, chunk = tensor_of(table, count)
    g, elements = pointer_of(fields + G, ELEMENT, WIDE), tl.load(fields + ELEMENTS)
    if WIDE:
        elements = tl.multiple_of(elements, 8)
    sums = tl.zeros((BLOCK,), tl.float64)
    begin = chunk * CHUNK
    for at in range(begin, tl.minimum(begin + CHUNK, elements), BLOCK):
        element = at + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(g + element, mask=element < elements, other=0.0).to(tl.float32).to(tl.float64)
        sums += value * value
    tl.store(partials + tl.program_id(0), tl.sum(sums, 0))


# --- launches ---


def _bits(value: float) -> int:
    """A float64 as the table holds it."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _is_wide(s: Slice) -> bool:
    moments = () if s.compact else (s.first, s.second)
    return s.p.numel() % 8 == 0 and all(_address(t) % 16 == 0 for t in (s.p, s.g, *moments))


class Table:
    """The slices of one launch, told to the device; they must live until the launch has been made."""

    def __init__(self, slices: Sequence[Slice], header: Sequence[int], device: torch.device) -> None:
        self.slices, self.count = slices, len(slices)
        chunks = [triton.cdiv(s.p.numel(), CHUNK) for s in slices]
        self.chunks = sum(chunks)
        numbers, behind = list(header), len(header) + self.count * FIELDS.value + self.chunks
        runs: list[int] = []
        first_chunk = 0
        for s, own in zip(slices, chunks, strict=True):
            parts = 1 if s.runs is None else s.runs.shape[0]
            numbers += (
                _address(s.p), _address(s.g), _address(s.first), _address(s.second), _address(s.mask),
                0 if s.first is None else s.first.numel(), s.p.numel(), first_chunk, s.stream, s.step,
                _bits(s.step_size), _bits(s.root_scale), behind + len(runs), s.p.numel() // parts,
            )  # fmt: skip
            first_chunk += own
            if s.runs is not None:
                runs += s.runs.flatten().tolist()
        owners = torch.repeat_interleave(torch.arange(self.count), torch.tensor(chunks))
        table = torch.cat([torch.tensor(numbers), owners, torch.tensor(runs, dtype=torch.int64)])
        self.numbers = table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def launch(call: ChildCall, rule: int, numbers: dict[str, float]) -> None:
    """One launch for each kind of tensors that there are, and before it what compact moments need."""
    header = (call.inputs.seed, _bits(call.grad_factor), _bits(call.inputs.max_grad_norm), _bits(call.norm_factor))
    kinds: dict[tuple[int, bool, bool], list[Slice]] = {}
    for s in call.slices:
        if s.p.numel() == 0:
            continue
        masks = DRAWN if call.threshold else ALL if s.mask is None else COMPACT if s.compact else STORED
        kinds.setdefault((masks.value, s.runs is not None, _is_wide(s)), []).append(s)
    for (masks, sharded, wide), slices in kinds.items():
        table = Table(slices, header, call.device)
        selected = None
        if masks == COMPACT.value:
            selected = torch.empty(table.chunks, dtype=torch.int64, device=call.device)
            count_selected[(table.chunks,)](table.numbers, table.count, selected, CHUNK=CHUNK, BLOCK=CHUNK // 8)
            scan_selected[(table.count,)](table.numbers, selected, CHUNK=CHUNK, BLOCK=COUNTED)
        child_update[(table.chunks,)](
            table.numbers, table.count, call.square_sum, selected, **numbers, threshold=call.threshold,
            update_factor=call.update_factor, mask_grad=int(call.mask_grad), mask_update=int(call.mask_update),
            reserved_decay=int(call.reserved_decay), ELEMENT=TYPES[call.dtype], RULE=rule, MASKS=masks,
            STOCHASTIC=call.inputs.stochastic_rounding, SHARDED=sharded, WIDE=wide, CHUNK=CHUNK, ROWS=ROWS,
            num_warps=WARPS,
        )  # fmt: skip


def adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr,
           weight_decay, beta1, beta2, eps, reserve_p, max_grad_norm, seed, where, decay, order, correct_bias, maximize,
           stochastic_rounding) -> None:  # fmt: skip
    """_child_adamw_triton_."""
    call = ChildCall(Inputs(
        params, grads, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr, weight_decay, reserve_p,
        max_grad_norm, seed, where, decay, maximize, stochastic_rounding,
    ))  # fmt: skip
    call.set_moments("exp_avgs", exp_avgs, 0)
    call.set_moments("exp_avg_sqs", exp_avg_sqs, 1)
    before, after = call.set_adamw(beta1, beta2, eps, order, correct_bias)
    if call.skips:
        return
    numbers = _numbers(
        beta1=beta1, beta2=beta2, rest1=1 - beta1, rest2=1 - beta2, eps=eps, before=before, after=after
    )
    with on_device(params[0]):
        launch(call, ADAMW.value, numbers)
    call.finish([*exp_avgs, *exp_avg_sqs])


def sgd_(params, grads, momentum_buffers, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr,
         weight_decay, momentum, dampening, nesterov, reserve_p, max_grad_norm, seed, where, decay, maximize,
         stochastic_rounding) -> None:  # fmt: skip
    """_child_sgd_triton_."""
    call = ChildCall(Inputs(
        params, grads, steps, masks, runs, streams, grad_scale, found_inf, square_sum, lr, weight_decay, reserve_p,
        max_grad_norm, seed, where, decay, maximize, stochastic_rounding,
    ))  # fmt: skip
    if momentum:
        call.set_moments("momentum_buffers", momentum_buffers, 0)
    call.check_sgd(momentum, dampening, nesterov)
    if call.skips:
        return
    numbers = _numbers(
        lr=call.lr, decay=call.weight_decay, momentum=momentum, gain=1 - dampening, nesterov=int(nesterov)
    )
    with on_device(params[0]):
        launch(call, MOMENTUM.value if momentum else SGD.value, numbers)
    call.finish(momentum_buffers if momentum else [])


def _numbers(**given: float) -> dict[str, Any]:
    """The arguments of both rules: what the other one takes does nothing."""
    nothing = dict.fromkeys(("beta1", "beta2", "rest1", "rest2", "eps", "lr", "decay", "momentum", "gain"), 0.0)
    return {**nothing, "before": 1.0, "after": 0.0, "nesterov": 0, **given}


def square_sum(grads) -> Tensor:
    """_child_square_sum_triton: a 0-d float64 tensor."""
    if not grads:
        raise ValueError("grads: expected at least one tensor, got none")
    like = grads[0]
    check_dtype("grads", like)
    for i, g in enumerate(grads):
        check_dense(f"grads[{i}]", g, like, "the first")
    kinds: dict[bool, list[Slice]] = {}
    for g in grads:
        if g.numel():
            g = g.detach().contiguous()
            s = Slice(g, g, None, None, 0, 0)
            kinds.setdefault(_is_wide(s), []).append(s)
    sums: list[Tensor] = []
    with on_device(like):
        for wide, slices in kinds.items():
            table = Table(slices, [0] * HEADER.value, like.device)
            sums.append(torch.empty(table.chunks, dtype=torch.float64, device=like.device))
            square_sums[(table.chunks,)](
                table.numbers, table.count, sums[-1], ELEMENT=TYPES[like.dtype], WIDE=wide, CHUNK=CHUNK, BLOCK=1024,
                num_warps=WARPS,
            )  # fmt: skip
    return torch.cat(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=like.device)

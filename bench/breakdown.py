"""Where the time of a training step goes: its parts, each with the gradients of its own operators."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import repeat

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from .harness import Call

# The profiler's library writes lines of its own to stderr otherwise; it reads this when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

STEPS = 3
WHOLE, REST = "whole step", "everything else"
GRADIENT = "autograd::engine::evaluate_function: "


def breakdown(step: Call, parts: Mapping[str, Sequence[nn.Module]], marked: Sequence[str] = ()) -> dict[str, float]:
    """Seconds of one step by part, the longest part first, and REST.

    Args:
        step: takes a whole step on the processor.
        parts: modules by part; none of them within another.
        marked: further parts, which the step itself puts into ``record_function``.
    """
    opened: list[record_function] = []

    def begin(name: str, *_: object) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def end(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, modules in parts.items():
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(partial(begin, name)))
                hooks.enter_context(module.register_forward_hook(end))
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in repeat(None, STEPS):
                with record_function(WHOLE):
                    step()
    return _seconds(sorted(profiler.events(), key=lambda e: e.time_range.start), {*parts, *marked})


def _part(event: FunctionEvent | None, names: Collection[str]) -> str | None:
    """The part that an event of the forward pass belongs to; None for the backward pass."""
    while event is not None and event.name not in names:
        if event.name.startswith(GRADIENT):
            return None
        event = event.cpu_parent
    return REST if event is None else event.name


def _seconds(events: Sequence[FunctionEvent], names: Collection[str]) -> dict[str, float]:
    # Autograd numbers its nodes; an operator bears the number of the next one, which the last to bear it has made.
    part_of_node: dict[int, str] = {}
    for event in events:
        part = _part(event, names) if event.sequence_nr >= 0 else None
        if part is not None:
            part_of_node[event.sequence_nr] = part
    spent: Counter[str] = Counter()
    for event in events:
        if event.name.startswith(GRADIENT):
            spent[part_of_node.get(event.sequence_nr, REST)] += event.time_range.elapsed_us()
        elif event.name in names:
            spent[event.name] += event.time_range.elapsed_us()
    whole = sum(event.time_range.elapsed_us() for event in events if event.name == WHOLE)
    spent[REST] = whole - sum(time for name, time in spent.items() if name != REST)
    return {name: time * 1e-6 / STEPS for name, time in spent.most_common()}

"""``python -m bench --device cuda``: what operators take of a GPU's time.

Calls are captured in a CUDA graph and the graph is replayed between two events, so that the figure is the device's
time and not that of launching; "as called" is the time of a call from Python beside it, which counts where one of the
variants cannot be captured. Variants take turns, and medians are reported. Inputs stay in the L2 cache where they fit.
float32 products are exact for "fp32" and may be tf32 for "tf32", for PyTorch's own kernels and ours alike.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .harness import Call

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS, GRAPH_SECONDS, WARM_UP = 15, 0.001, 3


@dataclass(frozen=True)
class Group:
    """Variants measured together, those that are not None; flops of one call."""

    title: str
    variants: Mapping[str, Call | None]
    flops: float


@dataclass(frozen=True)
class Case:
    """One case and dtype. groups() checks first and raises what is wrong."""

    operator: str
    name: str
    dtype: str
    groups: Callable[[], Iterator[Group]]


def compiled(function: Callable, bind: Callable[[Callable], Call]) -> Call | None:
    """bind(torch.compile(function)), compiled now; None, and a line that says why, where that fails."""
    torch._dynamo.reset()
    try:
        call = bind(torch.compile(function, dynamic=False))
        call()
    except Exception as error:
        print(f"  torch.compile failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}", flush=True)
        return None
    return call


def _events(run: Call) -> float:
    """Seconds of the device between before and after run()."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _repeated(call: Call, count: int) -> Call:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def _captured(call: Call) -> tuple[Call, int]:
    """A replay of several calls, and how many these are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
        estimate = _events(call)
    torch.cuda.current_stream().wait_stream(stream)
    count = max(1, min(100, int(GRAPH_SECONDS / estimate)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    return graph.replay, count


def measure(group: Group) -> dict[str, tuple[float, float]]:
    """Seconds by variant: of the device, and as called. NaN of the device where a call cannot be captured."""
    variants = {name: call for name, call in group.variants.items() if call is not None}
    replays: dict[str, tuple[Call, int]] = {}
    for name, call in variants.items():
        try:
            replays[name] = _captured(call)
        except RuntimeError as error:
            print(f"  {name} cannot be captured: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    called: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(ROUNDS):
        names = list(variants)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if name in replays:
                replay, count = replays[name]
                samples[name].append(_events(replay) / count)
            called[name].append(_events(_repeated(variants[name], 10)) / 10)
    return {
        name: (statistics.median(samples[name] or [float("nan")]), statistics.median(called[name])) for name in variants
    }


def run(cases: Iterable[Case]) -> int:
    """Measures and prints all cases. 1 where one failed its check, else 0."""
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print("microseconds: device (as called); ratio to ours; TFLOP/s of the products (optimizers: TB/s)\n", flush=True)
    failures = 0
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for case in cases:
        print(f"{case.operator} {case.name} {case.dtype}", flush=True)
        torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
        try:
            for group in case.groups():
                times = measure(group)
                # All by the time as called where one has no other.
                which = int(any(math.isnan(device) for device, _ in times.values()))
                ours = next(iter(times.values()))[which]
                print(f"  {group.title}")
                for name, (device, called) in times.items():
                    counted = (device, called)[which]
                    rate = group.flops / counted * 1e-12
                    columns = f"{device * 1e6:9.1f} ({called * 1e6:8.1f}) {counted / ours:7.2f} {rate:8.1f}"
                    print(f"    {name:24}{columns}", flush=True)
        except Exception as failure:  # GateFailure, or what one case alone runs into
            print(f"  FAILED: {type(failure).__name__}: {failure}", flush=True)
            failures += 1
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    return 1 if failures else 0

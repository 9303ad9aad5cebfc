"""``python -m bench --device cuda``: what operators take of a GPU's time.

Calls are captured in a CUDA graph and the graph is replayed between two events, so that the figure is the device's
time and not that of launching; "as called" is the time of a call from Python beside it, which counts where one of the
variants cannot be captured. Variants take turns, and medians are reported. Inputs stay in the L2 cache where they fit.
"ours" is what the rule of pykernels/_backend.py chooses, "ours, triton" Triton's kernels by name.
float32 products are exact for "fp32" and may be tf32 for "tf32", for PyTorch's own kernels and ours alike.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pykernels import _backend

from .harness import Call

TRITON = "ours, triton"
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


@contextmanager
def on_triton() -> Iterator[None]:
    """Inside, calls that name no backend take Triton's."""
    before = _backend.default()
    _backend.set_backend("triton")
    try:
        yield
    finally:
        _backend.set_backend(before)


def by_triton(check: Callable[[], None]) -> Callable[[Call], Call | None]:
    """Makes of a call one that takes Triton's kernels. These are checked now: None for every call, and a line that says
    why, where that fails."""
    try:
        on_triton()(check)()
    except Exception as error:
        print(f"  triton failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}", flush=True)
        return lambda call: None
    return on_triton()


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


def _number(seconds: float) -> float | None:
    """JSON has no NaN."""
    return seconds if math.isfinite(seconds) else None


def _group_numbers(group: Group, times: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    variants = {
        name: {"device_seconds": _number(device), "called_seconds": _number(called)}
        for name, (device, called) in times.items()
    }
    return {"title": group.title, "flops": group.flops, "variants": variants}


def run(cases: Sequence[Case], json_path: Path | None = None, arguments: Sequence[str] = ()) -> int:
    """Measures and prints all cases. 1 where one failed its check, else 0.

    json_path: all numbers go there, and where the run is interrupted those of the cases that were finished; arguments:
    what the user asked for, to be written with them.
    """
    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    print(f"{properties.name}, torch {versions['torch']}, CUDA {versions['cuda']}")
    print("microseconds: device (as called); ratio to ours; TFLOP/s of the products (optimizers: TB/s)\n", flush=True)
    results: list[dict[str, Any]] = []
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for case in cases:
            results.append(_run_case(case))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        if json_path:
            head = {"device": properties.name, "versions": versions, "arguments": list(arguments)}
            everything = head | {"complete": len(results) == len(cases), "results": results}
            json_path.write_text(json.dumps(everything, indent=1) + "\n")
    return 1 if any(result["failure"] for result in results) else 0


def _run_case(case: Case) -> dict[str, Any]:
    """Measures and prints one case; its numbers for JSON."""
    result: dict[str, Any] = {"operator": case.operator, "case": case.name, "dtype": case.dtype, "failure": None}
    result["groups"] = groups = []
    print(f"{case.operator} {case.name} {case.dtype}", flush=True)
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
    try:
        for group in case.groups():
            times = measure(group)
            groups.append(_group_numbers(group, times))
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
        result["failure"] = f"{type(failure).__name__}: {failure}"
        print(f"  FAILED: {result['failure']}", flush=True)
    return result

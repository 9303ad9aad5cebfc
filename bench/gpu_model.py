"""``python -m bench --model gpu``: traffic of the CUDA kernels, counted on the CPU, and the least time of a GPU.

The kernels of compute capability 8.0 are executed on the CPU (tests/ptx_on_cpu), a few sequences of a batch, with the
tiles that the whole batch has on PROCESSORS multiprocessors. For each launcher this counts

    asked     sectors of 32 bytes that warps ask for, what L2 has to serve
    moved     distinct sectors, what memory has to serve if L2 keeps all while the launcher's kernels run, and nothing
              from one launcher to the next (for cases that ask so, also if L2 keeps all of the call)
    products  operations of tensor cores; with dtype fp32 those of the float32 units, all of them
    fp32      with other dtypes the operations of the float32 units beside them

and the time of a launcher on a GPU is the largest of moved / bandwidth, products / peak and fp32 / peak, the roofline.
What grows by the same amount with every sequence is extrapolated, and three sizes are counted to see that it does.
Eager PyTorch has the same model: each operation reads its inputs once and writes its outputs once, views are free.

No time here is measured: launches, latencies, shared memory, integer instructions and what peaks leave of themselves
are not in it, so that a GPU takes longer. H100 and H200 run other kernels where wgmma serves, which are not counted.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .harness import Call
from .report import bytes_text, seconds_text

PROCESSORS = 132  # of H100 and H200
SECTOR = 32
COUNTED = (1, 2, 3)


@dataclass(frozen=True)
class Gpu:
    """Bytes and operations a second, by dtype of the products."""

    name: str
    bandwidth: float
    peaks: Mapping[str, float]


# NVIDIA's data sheets of A100 80GB SXM (nvidia-1758950), H100 SXM and H200 SXM (nvidia.com/en-us/data-center/h100 and
# h200), Hopper's digits of the H100 architecture white paper. Dense, half of what those two data sheets print.
_HOPPER = {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}
GPUS = (
    Gpu("A100", 2.039e12, {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12}),
    Gpu("H100", 3.35e12, _HOPPER),
    Gpu("H200", 4.8e12, _HOPPER),
)


@dataclass(frozen=True)
class Work:
    """What one launcher or operation does: bytes asked of L2 and moved to and from memory, operations."""

    asked: float = 0
    moved: float = 0
    products: float = 0
    fp32: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, gpu: Gpu, dtype: str) -> float:
        return max(self.moved / gpu.bandwidth, self.products / gpu.peaks[dtype], self.fp32 / gpu.peaks["fp32"])


@dataclass(frozen=True)
class Emulated:
    """An operator that calls emulated kernels: kernels/cuda/<name>*.cu with csrc/cuda/<name>.cpp.

    replaced: attributes of pykernels.<name> and the operators put there.
    """

    name: str
    replaced: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One call. units: how many sequences, or whatever else `unit` says, the size in its name has.

    counted: how many are executed; three are extrapolated from, one is reported as it is. call(n) makes the call for n
    units of tensors on the CPU, check() raises GateFailure where the emulated kernels are wrong, eager() is the call of
    all reported units for PyTorch's own operations on the meta device. compulsory(n), products(n): bytes of everything
    that has to be read or written once, operations. bar: moved may be that multiple of the compulsory bytes.
    """

    operator: str
    name: str
    dtype: str
    title: str
    emulated: Emulated
    units: int
    call: Callable[[int], Call]
    check: Callable[[], None]
    eager: Callable[[int], Call]
    compulsory: Callable[[int], int]
    products: Callable[[int], float]
    counted: tuple[int, ...] = COUNTED
    bar: float | None = None
    unit: str = "sequences"
    whole: bool = False  # count also what the call moves if L2 keeps all of it

    @property
    def reported(self) -> int:
        return self.units if len(self.counted) > 1 else self.counted[0]


@dataclass
class Estimate:
    """What was found for a case. deviation: of the third count from the line through the first two."""

    launchers: dict[str, Work] = field(default_factory=dict)
    operations: list[tuple[str, Work]] = field(default_factory=list)
    compulsory: Work = field(default_factory=Work)
    deviation: float = 0.0
    kept: int | None = None  # bytes moved if L2 keeps all of the call

    @property
    def ours(self) -> Work:
        return sum(self.launchers.values(), Work())

    @property
    def eager(self) -> Work:
        return sum((work for _, work in self.operations), Work())

    @property
    def ratio(self) -> float:
        return self.ours.moved / self.compulsory.moved

    def seconds(self, gpu: Gpu, dtype: str) -> dict[str, float]:
        """By what the kernels move, by what eager's operations move, and by the compulsory alone."""
        return {
            "ours": sum(work.seconds(gpu, dtype) for work in self.launchers.values()),
            "eager": sum(work.seconds(gpu, dtype) for _, work in self.operations),
            "compulsory": self.compulsory.seconds(gpu, dtype),
        }


# --- what the kernels do ---


def unavailable() -> str | None:
    """Why kernels cannot be executed here, None when they can."""
    from tests import ptx_on_cpu

    return ptx_on_cpu.unavailable()


def work_of(counts: Mapping[str, int], dtype: str) -> Work:
    read, written = counts["global_read_sectors"], counts["global_write_sectors"]
    distinct = counts["unique_read_sectors"] + counts["unique_write_sectors"]
    products, fp32 = counts["tensor_flops"], counts["fp32_flops"]
    if dtype == "fp32":  # One unit does both, and its counter does not tell them apart.
        products, fp32 = products + fp32, 0
    return Work(SECTOR * (read + written), SECTOR * distinct, products, fp32)


@contextmanager
def _replaced(case: Case, operators: Any) -> Iterator[None]:
    module = importlib.import_module(f"pykernels.{case.emulated.name}")
    with mock.patch.multiple(
        module, **{name: getattr(operators, of).default for name, of in case.emulated.replaced.items()}
    ):
        yield


def count(case: Case, check: bool = True) -> tuple[list[dict[str, Work]], int | None]:
    """What each launcher does for each of case.counted, with `check` after case.check(); for case.whole, the bytes of
    the distinct sectors of the last of these calls."""
    from tests.emulated_cuda import build_operator
    from tests.ptx_on_cpu.torch_glue import count_launchers

    library = build_operator(case.emulated.name, "80", count=True)
    found: list[dict[str, Work]] = []
    kept = None
    with _replaced(case, getattr(torch.ops, library.namespace)):
        if check:
            case.check()
        for n in case.counted:
            call = case.call(n)
            # Tiles are chosen by how many of them a multiprocessor gets.
            processors = max(1, round(PROCESSORS * n / case.units))
            options = library.runtime.options(capability=80, processors=processors)
            with options, count_launchers(library.operators, library.runtime) as launchers:
                call()
            found.append({})
            for name, counts in launchers:
                found[-1][name] = found[-1].get(name, Work()) + work_of(counts, case.dtype)
        if case.whole:
            with library.runtime.options(capability=80, processors=processors):
                library.runtime.reset_counters()
                call()
                counts = library.runtime.counters()
            kept = SECTOR * (counts["unique_read_sectors"] + counts["unique_write_sectors"])
    return found, kept


def extrapolate(
    found: Sequence[Mapping[str, Work]], counted: Sequence[int], units: int
) -> tuple[dict[str, Work], float]:
    """The line through the first two counts at `units`, and how far from it the third lies, as a part of it."""
    first, second, third = found

    def line(at: int) -> dict[str, Work]:
        share = (at - counted[0]) / (counted[1] - counted[0])
        return {name: _blend(first[name], second[name], share) for name in first}

    expected = line(counted[2])
    deviations = [
        abs(getattr(third[name], of) - value) / value
        for name, work in expected.items()
        for of, value in asdict(work).items()
        if value
    ]
    return line(units), max(deviations, default=0.0)


def _blend(first: Work, second: Work, share: float) -> Work:
    a, b = asdict(first), asdict(second)
    return Work(**{name: a[name] + share * (b[name] - a[name]) for name in a})


Counter = Callable[[Case, bool], tuple[list[dict[str, Work]], int | None]]


# --- what eager PyTorch does ---

_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "new_empty_strided")


def _bytes(tensor: torch.Tensor) -> int:
    """Of the elements that exist: those of an expanded tensor once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def _tensors(value: Any) -> dict[int, torch.Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)}


class Operations(TorchDispatchMode):
    """Collects the operations that PyTorch executes inside, with the bytes that each has to move."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Work]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, schema = func.overloadpacket.__name__, func._schema
        given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
        changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if name in _FREE or any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return out
        reads, writes = _tensors(given), _tensors([given.get(n) for n in changed])
        if not changed:
            writes = _tensors(out)
        flops = flop_registry.get(func.overloadpacket)
        moved = sum(map(_bytes, reads.values())) + sum(map(_bytes, writes.values()))
        self.found.append((name, Work(moved, moved, flops(*args, **kwargs, out_val=out) if flops else 0)))
        return out


def operations(call: Call) -> list[tuple[str, Work]]:
    with Operations() as mode:
        call()
    return mode.found


# --- the report ---


def estimate(case: Case, check: bool = True, counter: Counter = count) -> Estimate:
    found, kept = counter(case, check)
    n = case.reported
    compulsory = Work(0, case.compulsory(n), case.products(n))
    result = Estimate(found[0], operations(case.eager(n)), compulsory, kept=kept)
    if len(case.counted) > 1:
        result.launchers, result.deviation = extrapolate(found, case.counted, case.units)
    return result


def _row(name: str, work: Work, seconds: Sequence[float]) -> str:
    asked = bytes_text(round(work.asked)) if work.asked else ""
    flops = "".join(f"{flops * 1e-9:>10.3g}" if flops else f"{'':10}" for flops in (work.products, work.fp32))
    times = "".join(f"{seconds_text(s):>10}" for s in seconds)
    return f"    {name:32}{bytes_text(round(work.moved)):>12}{asked:>12}{flops}  |{times}"


def text(case: Case, result: Estimate) -> str:
    """The table of one case."""
    lines = [f"{case.operator}  {case.dtype}  {case.name}  {case.title}"]
    if len(case.counted) > 1:
        linear = "exactly linear" if not result.deviation else f"the third {result.deviation:.2%} off the line"
        sizes = ", ".join(map(str, case.counted))
        lines.append(f"  counted for {sizes} of {case.units} {case.unit}, {linear}; extrapolated to all")
    elif case.counted[0] < case.units:
        lines.append(f"  counted for {case.counted[0]} of {case.units} {case.unit}; all figures are for these alone")
    else:
        lines.append("  counted for all of it")
    columns = "".join(f"{gpu.name:>10}" for gpu in GPUS)
    lines.append(f"    {'':32}{'bytes':>12}{'bytes':>12}{'GFLOP of':>10}{'GFLOP':>10}  |{'least time, modelled':>30}")
    lines.append(f"    {'':32}{'moved':>12}{'asked':>12}{'products':>10}{'fp32':>10}  |{columns}")
    for name, work in result.launchers.items():
        lines.append(_row(name, work, [work.seconds(gpu, case.dtype) for gpu in GPUS]))
    times = [result.seconds(gpu, case.dtype) for gpu in GPUS]
    plain = replace(result.eager, asked=0)
    count_ = len(result.operations)
    for name, work, key in (
        ("ours, all of it", result.ours, "ours"),
        ("the compulsory alone", result.compulsory, "compulsory"),
        (f"eager, {count_} operation{'s' * (count_ != 1)}", plain, "eager"),
    ):
        lines.append(_row(name, work, [t[key] for t in times]))
    line = f"moves {result.ratio:.2f}x of the compulsory bytes"
    if case.bar is not None:
        line += f" (bar <= {case.bar:.2f}x): {'PASS' if result.ratio <= case.bar else 'MISS'}"
    saved, more = result.ours.asked / result.ours.moved, result.eager.moved / result.ours.moved
    if result.kept is not None:
        kept = result.kept / result.compulsory.moved
        lines.append(f"    {kept:.2f}x if L2 keeps the call's {bytes_text(result.kept)}")
    lines.append(f"    {line}; asks L2 for {saved:.2f}x of what it moves; eager moves {more:.1f}x of ours")
    return "\n".join([*lines, ""])


def numbers(case: Case, result: Estimate) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "operator": case.operator, "case": case.name, "dtype": case.dtype, "title": case.title, "units": case.units,
        "reported": case.reported, "counted": list(case.counted), "deviation": result.deviation,
        "launchers": {name: asdict(work) for name, work in result.launchers.items()},
        "eager": [{"operation": name, **asdict(work)} for name, work in result.operations],
        "compulsory": asdict(result.compulsory), "ratio": result.ratio, "bar": case.bar, "kept": result.kept,
        "model_seconds": {gpu.name: result.seconds(gpu, case.dtype) for gpu in GPUS}, "failure": None,
    }  # fmt: skip


HEAD = f"""\
A MODEL, NOT A MEASUREMENT: no GPU was used. Bytes and operations are counted while the PTX of the {{kernels}} kernels
runs on the CPU; a time is the least one that a GPU's published bandwidth and dense peaks allow (roofline).
Kernels of compute capability 8.0 in all columns, {{tiles}}.
  bytes moved     to and from memory, if L2 keeps all while a launcher runs and nothing between launchers
  bytes asked     of L2, in sectors of {SECTOR} bytes
  the compulsory  every input read once, every output written once; eager: each of its operations likewise
"""


def run(
    cases: Sequence[Case],
    json_path: Path | None = None,
    arguments: Sequence[str] = (),
    counter: Counter = count,
    kernels: str = "CUDA",
    tiles: str = f"tiles as for {PROCESSORS} multiprocessors",
) -> int:
    """Counts and prints all cases. 1 where those of one are wrong or fail, else 0; a missed bar changes nothing.

    kernels, tiles: what the heading says of them.
    """
    print(HEAD.format(kernels=kernels, tiles=tiles), flush=True)
    results: list[dict[str, Any]] = []
    checked: set[tuple[str, str]] = set()  # an operator's cases of one dtype have the same check
    before = torch.get_float32_matmul_precision()
    try:
        for case in cases:
            torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
            try:
                result = estimate(case, (case.operator, case.dtype) not in checked, counter)
                checked.add((case.operator, case.dtype))
                results.append(numbers(case, result))
                print(text(case, result), flush=True)
            except Exception as failure:  # GateFailure, or what one case alone runs into
                line = f"{type(failure).__name__}: {failure}"
                results.append({"operator": case.operator, "case": case.name, "dtype": case.dtype, "failure": line})
                print(f"{case.operator}  {case.dtype}  {case.name}  {case.title}\n  FAILED: {line}\n", flush=True)
    finally:
        torch.set_float32_matmul_precision(before)
        if json_path:
            head = {"model": "gpu", "kernels": kernels, "processors": PROCESSORS, "gpus": [asdict(gpu) for gpu in GPUS]}
            head |= {"arguments": list(arguments), "complete": len(results) == len(cases), "results": results}
            json_path.write_text(json.dumps(head, indent=1) + "\n")
    return 1 if any(result["failure"] for result in results) else 0

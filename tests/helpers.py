"""What operator tests share: the error rule, layouts, equality over runs and threads, memory, exports."""

from __future__ import annotations

import gc
import math
import resource
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

Results = dict[str, Tensor]
T = TypeVar("T")

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FORWARD, GRADIENT = 2.0, 3.0
SIZES = (1, 2, 3, 7, 17, 31, 33, 63, 65, 127, 129, 1000)  # around vectors and tiles


# --- the error rule ---


def assert_close_to_reference(
    actual: Tensor, truth: Tensor, same: Tensor, *, factor: float, floor: float, what: str = ""
) -> None:
    """The largest error against `truth` (fp64) is at most `factor` times that of `same` (the PyTorch expression in the
    dtype of `actual`), plus `floor`."""
    assert actual.dtype == same.dtype and actual.shape == truth.shape, f"{what}: {actual.dtype} {list(actual.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = (actual.double() - truth).abs().max().item()
    eager = (same.double() - truth).abs().max().item()
    assert error <= factor * eager + floor, f"{what}: error {error:.3g}, allowed {factor:g} * {eager:.3g} + {floor:.3g}"


def rounding_floor(truth: Tensor, dtype: torch.dtype, terms: int, scale: float = 1.0) -> float:
    """Two roundings of the result to `dtype`, and the rounding of a sum of that many terms in the accumulator's type.

    scale: size of the values that make up the result, where they may cancel.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    largest = max(scale, truth.abs().max().item() if truth.numel() else 0.0)
    return (2 * torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(accumulator).eps) * largest


# --- layouts ---


def _poison(dtype: torch.dtype) -> Any:
    return float("nan") if dtype.is_floating_point else dtype != torch.bool and torch.iinfo(dtype).max


def sliced(t: Tensor) -> Tensor:
    """t inside larger storage that is full of NaN, in every dimension."""
    around = torch.full([n + 3 for n in t.shape], _poison(t.dtype), dtype=t.dtype)
    view = around[tuple(slice(1, -2) for _ in t.shape)]
    return view.copy_(t)


def stepped(t: Tensor) -> Tensor:
    """Every third element of the last dimension of storage that is otherwise NaN."""
    around = torch.full([*t.shape[:-1], 3 * t.shape[-1]], _poison(t.dtype), dtype=t.dtype)
    return around[..., 1::3].copy_(t)


def offset(t: Tensor) -> Tensor:
    """Contiguous, from the first element of its storage on: no more than the alignment of one element."""
    around = torch.full([t.numel() + 2], _poison(t.dtype), dtype=t.dtype)
    return around[1:-1].view(t.shape).copy_(t)


def expanded(t: Tensor) -> Tensor:
    """Stride 0 in the first and the last dimension: other values than t."""
    first = t[tuple(slice(0, 1 if i in (0, t.dim() - 1) else None) for i in range(t.dim()))]
    return first.clone().expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "batch_inside": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 1 else t.clone(),
    "channels_first": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t.clone(),
    "sliced": sliced,
    "stepped": stepped,
    "offset": offset,
    "expanded": expanded,
}


def far_apart(t: Tensor, dimension: int) -> Tensor:
    """t, 3-d float16, with one stride so large that its last element is more than 2**31 elements behind its first."""
    strides = [t.shape[1] * t.shape[2], t.shape[2], 1]
    strides[dimension] = 2**31 // (t.shape[dimension] - 1) + 64
    last = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    assert last > 2**31
    # Zeros that no memory stands behind until they are written.
    storage = torch.from_numpy(np.zeros(last + 1, np.float16))
    return storage.as_strided(t.shape, strides).copy_(t)


# --- equality ---


def assert_equal(a: Results, b: Results, what: object = "") -> None:
    """Bitwise equality of two results of `evaluate`, NaN not allowed."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} {what}: {(a[name].double() - b[name].double()).abs().max()}"


def assert_same(backend: str, got: Results, expected: Results, what: object, ulps: int = 8) -> None:
    """Bitwise on the kernels; PyTorch itself may sum in another order where strides differ."""
    if backend == "cpu":
        assert_equal(got, expected, what)
    # The coarsest dtype also rounds the products that other results are sums of.
    eps = max(torch.finfo(t.dtype).eps for t in got.values())
    for name in got:
        assert torch.allclose(got[name], expected[name], rtol=ulps * eps, atol=4 * ulps * eps), f"{name} {what}"


def assert_equal_over_runs_and_threads(train: Callable[[], Results], infer: Callable[[], Results], runs: int) -> None:
    """Bit for bit: `runs` runs with two threads, one with one and with three; inference gives what training gives."""
    expected = train()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(runs if threads == 2 else 1):
            assert_equal(train(), expected, f"with {threads} threads")
        for name, t in infer().items():
            assert torch.equal(t, expected[name]), f"{name}: inference with {threads} threads"


def assert_equal_from_several_threads(calls: Sequence[Callable[[], Results]]) -> None:
    """Four rounds of all calls from four threads give what they give one after the other."""
    expected = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for i, job in enumerate([pool.submit(call) for call in list(calls) * 4]):
            assert_equal(job.result(), expected[i % len(calls)])


def by_precision(run: Callable[[], T]) -> dict[str, T]:
    """What `run` gives with each of PyTorch's settings of float32 matrix products."""
    before, results = torch.get_float32_matmul_precision(), {}
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            results[precision] = run()
    finally:
        torch.set_float32_matmul_precision(before)
    return results


# --- memory ---


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def assert_memory_stays_flat(module: torch.nn.Module, batch: int) -> None:
    """2,500 calls with x [batch, L, 32] and ever other L keep nothing, neither in the module nor in the process."""
    lengths = torch.randint(1, 400, (2000,), generator=torch.Generator().manual_seed(0)).tolist()

    def run(lengths: list[int], training: bool) -> None:
        for n in lengths:
            with torch.set_grad_enabled(training):
                out = module(torch.zeros(batch, n, 32))
                if training:
                    out.sum().backward()

    run([400] * 20, True)
    run(lengths[:200], True)
    attributes = dict(module.__dict__)
    gc.collect()
    before = resident_bytes()
    run(lengths[::4], True)
    run(lengths, False)
    assert resident_bytes() - before < 8 << 20
    assert module.__dict__ == attributes


def bytes_kept_for_backward(call: Callable[[], Tensor], given: Iterable[Tensor], with_result: bool = True) -> int:
    """Bytes of what the call saves besides the tensors in `given` and, unless with_result, its result."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    for t in (*given, *([] if with_result else [result])):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


# --- exports and function transforms ---


def is_standard(graph: torch.fx.Graph | torch._C.Graph) -> bool:
    """Only PyTorch's own operators, no call into this package."""
    if isinstance(graph, torch._C.Graph):
        return {node.kind().split("::")[0] for node in graph.nodes()} <= {"aten", "prim"}
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return all(t.namespace in ("aten", "prims") for t in targets if isinstance(t, torch._ops.OpOverload)) and all(
        isinstance(t, torch._ops.OpOverload) or "pykernels" not in getattr(t, "__module__", "") for t in targets
    )


def through_onnx(
    module: torch.nn.Module, example: tuple[Tensor, ...], shapes: Any, folder: Path
) -> Callable[..., list[Tensor]]:
    """The module as the evaluator of the onnx package runs it, after an export that holds standard operators only."""
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript (in the test extra)")
    import onnx
    from onnx.reference import ReferenceEvaluator

    options = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False, "external_data": False}
    torch.onnx.export(module, example, folder / "model.onnx", **options)
    model = onnx.load(folder / "model.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    names, evaluator = [i.name for i in model.graph.input], ReferenceEvaluator(model)

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        return [torch.from_numpy(t) for t in evaluator.run(None, arrays)]

    return run


def assert_transforms_are_refused(operator: str, call: Callable[[Tensor], Any], x: Tensor) -> None:
    """torch.vmap over x, and forward mode at x[0], raise errors that begin with the operator's name."""
    with pytest.raises(NotImplementedError, match=f"^{operator}: torch.vmap"):
        torch.vmap(call)(x)
    with pytest.raises(NotImplementedError, match=f"^{operator}: forward-mode"):
        torch.func.jvp(call, (x[0],), (x[0],))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=f"^{operator}: forward-mode"),
    ):
        call(torch.autograd.forward_ad.make_dual(x[0], x[1]))

"""lora_linear: any strides of inputs and incoming gradients, nothing read or written beside tensors, no copies of x.
`#n` names a line of the project's failure checklist."""

import ctypes
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pykernels import lora_linear
from pykernels.random_bits import draws16, keep_threshold
from tests.helpers import FLOATS, LAYOUTS, assert_equal, assert_same, far_apart, sliced, stepped
from tests.lora_linear_cases import LoraCase, evaluate, problem

FEW = LoraCase(leading=(3, 4), dropout=0.2)
MANY = LoraCase(leading=(3, 13), float_adapters=True)
SEVERAL = LoraCase(leading=(3, 13), E=2, dropout=0.2)


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.contiguous().clone() for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("grad", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seven_input_layouts_by_seven_gradient_layouts(layout: str, grad: str, dtype: str, backend: str) -> None:
    """#7, #8: what comes out depends on values, not on strides; outputs and gradients are contiguous."""
    for case in (FEW, MANY, SEVERAL):
        p = problem(case, FLOATS[dtype])
        x, dy = LAYOUTS[layout](p.inputs["x"]), LAYOUTS[grad](case.dy(p.same["y"]))
        got = evaluate(p.inputs | {"x": x}, dy, **p.options, backend=backend)
        inputs = p.inputs | {"x": x.contiguous().clone()}
        assert_same(backend, got, evaluate(inputs, dy.contiguous().clone(), **p.options, backend=backend), case)
        if backend == "cpu":
            assert all(t.is_contiguous() for t in got.values())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_argument(layout: str, dtype: str, backend: str) -> None:
    """#7, #8: all arguments at once, adapters, scales and the index too, other dtypes included."""
    for case in (FEW, MANY, SEVERAL, LoraCase(leading=(20,), E=3, scales=True)):
        p = problem(case, FLOATS[dtype])
        inputs = {name: LAYOUTS[layout](t) for name, t in p.inputs.items()}
        options = {name: LAYOUTS[layout](t) if isinstance(t, Tensor) else t for name, t in p.options.items()}
        plain = {name: t.contiguous().clone() if isinstance(t, Tensor) else t for name, t in options.items()}
        got = evaluate(inputs, case.dy, **options, backend=backend)
        copies = contiguous(inputs)
        if (
            layout == "channels_first"
        ):  # the transpose of a [K, N] weight is read in place, with few rows in another order
            copies["weight"] = inputs["weight"]
        assert_same(backend, got, evaluate(copies, case.dy, **plain, backend=backend), case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [5, 40])
def test_transposed_weights_by_sizes(rows: int, dtype: str, kernels: str) -> None:
    """#7, #9: the view of a [K, N] tensor obeys the error rule like its copy; other views give the copy's bits."""
    for k, n in itertools.product((1, 2, 15, 33, 64), (1, 2, 17, 32, 65)):
        p = problem(LoraCase(leading=(rows,), K=k, N=n, transposed=True), FLOATS[dtype])
        p.check(evaluate(p.inputs, p.case.dy, **p.options, backend=kernels))
        weight = p.inputs["weight"]
        copy = p.inputs | {"weight": weight.contiguous()}
        p.check(evaluate(copy, p.case.dy, **p.options, backend=kernels))
        wider = p.inputs | {"weight": sliced(weight.t()).t()}  # a transpose with a larger stride
        assert_equal(
            evaluate(wider, p.case.dy, **p.options, backend=kernels),
            evaluate(copy, p.case.dy, **p.options, backend=kernels),
        )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [60, 700])
def test_row_strides_that_collide_in_a_cache(rows: int, dtype: str, kernels: str) -> None:
    """#8: rows of x and dy a multiple of 2,048 bytes apart, inside wider tensors that hold NaN elsewhere."""
    p = problem(LoraCase(leading=(rows,), K=300, N=450), FLOATS[dtype])
    dy = p.case.dy(p.same["y"])

    def spread(t: Tensor) -> Tensor:
        return torch.full((rows, 1024), float("nan"), dtype=t.dtype)[:, 5 : 5 + t.shape[1]].copy_(t)

    got = evaluate(p.inputs | {"x": spread(p.inputs["x"])}, spread(dy), **p.options, backend=kernels)
    assert_equal(got, evaluate(p.inputs, dy, **p.options, backend=kernels))


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbours_do_not_leak(dtype: str, kernels: str) -> None:
    """#35: NaN beside every slice - x, weights, adapters, incoming gradients - and odd rows, K, N and R."""
    sizes = [(1, 1, 1), (3, 33, 3), (17, 5, 1), (33, 3, 2), (31, 31, 9), (63, 17, 0), (65, 65, 5), (64, 64, 4)]
    for around, rows, (k, n, rank) in itertools.product((sliced, stepped), (7, 31, 47), sizes):
        p = problem(LoraCase(leading=(rows,), K=k, N=n, R=rank, dropout=0.2 * (rank % 2)), FLOATS[dtype])
        inputs = {name: around(t) for name, t in p.inputs.items()}
        p.check(evaluate(inputs, around(p.case.dy(p.same["y"])), **p.options, backend=kernels))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_leak_into_each_other(dtype: str, kernels: str) -> None:
    """#35: NaN and infinities in a row of x or dy change no other row, and rows outside of a window of x nothing."""
    for rows in (9, 40):
        p = problem(LoraCase(leading=(rows,), K=33, N=31), FLOATS[dtype])
        dy = p.case.dy(p.same["y"])
        expected = evaluate(p.inputs, dy, **p.options, backend=kernels)
        others = torch.arange(rows) != 4
        for value in (float("nan"), float("inf")):
            x, bad = p.inputs["x"].clone(), dy.clone()
            x[4], bad[4] = value, value
            got = evaluate(p.inputs | {"x": x}, bad, **p.options, backend=kernels)
            for name in ("y", "dx"):
                assert torch.equal(got[name][others], expected[name][others]) and not got[name][4].isfinite().any()
        around = torch.full((3 * rows, 33), float("inf"), dtype=FLOATS[dtype])
        around[rows : 2 * rows] = p.inputs["x"]
        window = p.inputs | {"x": around[rows : 2 * rows]}
        assert_equal(evaluate(window, dy, **p.options, backend=kernels), expected)


def test_dropped_elements_are_no_factor(kernels: str) -> None:
    """#35: NaN in an element that dropout drops stays out of S and of the adapters' gradients."""
    case = LoraCase(leading=(20,), K=33, dropout=0.5)
    p = problem(case, torch.float32)
    kept = draws16(torch.tensor(p.options["seed"]), 20, 33) < keep_threshold(0.5)
    x = torch.where(kept, p.inputs["x"], float("nan"))
    zero = p.inputs | {"weight": torch.zeros(7, 33)}
    plain = evaluate(zero | {"x": torch.where(kept, x, 0)}, case.dy, **p.options, backend=kernels)
    got = evaluate(zero | {"x": x}, case.dy, **p.options, backend=kernels)
    for name in ("dlora_a", "dlora_b", "dx"):
        assert torch.equal(got[name], plain[name]), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_are_not_written(dtype: str, kernels: str) -> None:
    """#13, #15: values and version counters of all arguments stay."""
    for case in (FEW, MANY, SEVERAL):
        p = problem(case, FLOATS[dtype])
        arguments = {**p.inputs, **{n: t for n, t in p.options.items() if isinstance(t, Tensor)}}
        before = {name: (t.clone(), t._version) for name, t in arguments.items()}
        dy = case.dy(p.same["y"])
        dy_before = dy.clone()
        evaluate(p.inputs, dy, **p.options, backend=kernels)
        for name, (values, version) in before.items():
            assert torch.equal(arguments[name], values) and arguments[name]._version == version, name
        assert torch.equal(dy, dy_before)


def test_downstream_of_the_result(kernels: str) -> None:
    """#7: gradients that arrive through sum, cat, transpose and expand have strides of 0 and others."""
    p = problem(LoraCase(leading=(2, 9)), torch.float64)
    consumers = {
        "sum": lambda y: y.sum(),
        "cat": lambda y: torch.cat([y, y], 2)[:, :, 3:8].square().sum(),
        "transpose": lambda y: (y.transpose(1, 2) @ y).sum(),
        "mean": lambda y: y.mean(1).square().sum(),
        "expand": lambda y: (y[:, :1].expand(-1, 4, -1) * 2).sum(),
    }
    for name, consumer in consumers.items():
        results = []
        for backend in (kernels, "reference"):
            leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
            consumer(lora_linear(**leaves, **p.options, backend=backend)).backward()
            results.append([t.grad for t in leaves.values()])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12), name


@pytest.mark.no_poison  # it would fill gigabytes that stay unused otherwise
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "row", "input"])
def test_strides_beyond_32_bits(dimension: int, kernels: str) -> None:
    """#10: the last element of x lies more than 2**31 elements behind the first, in each dimension in turn."""
    for leading in ((3, 4), (3, 10)):
        p = problem(LoraCase(leading=leading, K=5), torch.float16)
        x = far_apart(p.inputs["x"], dimension)
        got = evaluate(p.inputs | {"x": x}, p.case.dy, **p.options, backend=kernels)
        assert_equal(got, evaluate(p.inputs, p.case.dy, **p.options, backend=kernels))


@pytest.mark.no_poison
def test_rows_beyond_32_bits_are_read_in_place(kernels: str) -> None:
    """#10: two dimensions, so that x is a view of rows far apart and no copy."""
    for rows in (9, 40):
        p = problem(LoraCase(leading=(rows,), K=32), torch.float16)
        storage = torch.empty(2**31 + 2**20, dtype=torch.float16)
        x = storage.as_strided((rows, 32), (2**31 // (rows - 1) + 32, 1)).copy_(p.inputs["x"])
        got = evaluate(p.inputs | {"x": x}, p.case.dy, **p.options, backend=kernels)
        assert_equal(got, evaluate(p.inputs, p.case.dy, **p.options, backend=kernels))


# --- copies ---


def peak_bytes(call: Callable[[], object]) -> int:
    """How far the process grows while it runs, at most: Linux keeps the peak, and forgets it when it is told to."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(name))

    # Else what earlier tests freed serves the call, and the process does not grow.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    call()
    return field("VmHWM") - before


@pytest.mark.no_poison  # it would touch memory that nobody reads
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from Linux")
def test_memory_of_a_call_with_float_adapters(kernels: str) -> None:
    """#16: x [M, K] in bf16 is not copied to float32. PyTorch's expression does so, and the measurement shows it."""
    m, k, n, rank = 16384, 1280, 32, 8
    x, dy = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(m, n, dtype=torch.bfloat16)
    weight = torch.ones(n, k, dtype=torch.bfloat16)
    adapters = torch.ones(rank, k, requires_grad=True), torch.ones(n, rank, requires_grad=True)

    def train(backend: str) -> None:
        x.requires_grad_(False)
        lora_linear(x, weight, *adapters, backend=backend).backward(dy)

    def train_with_dx(backend: str) -> None:
        y = lora_linear(x.requires_grad_(), weight, *adapters, backend=backend)
        torch.autograd.grad(y, [x, *adapters], dy)

    copy, mib = 4 * m * k, 1 << 20
    train(kernels), train("reference")  # allocators and thread pools have what they keep
    assert peak_bytes(lambda: train("reference")) > 0.9 * copy
    assert peak_bytes(lambda: train(kernels)) < 8 * mib
    assert peak_bytes(lambda: train_with_dx(kernels)) < copy // 2 + 8 * mib

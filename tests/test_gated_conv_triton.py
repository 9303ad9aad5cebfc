"""gated_conv1d's Triton kernels without a GPU: what Triton compiles for sm_80 and sm_90 (warpgroup instructions),
executed on CPU tensors by tests/ptx_on_cpu. A second judge is Triton's interpreter, in a process of its own."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from pykernels import GatedConv1d, _backend, _extension, gated_conv1d
from tests.gated_conv_cases import Case, check_case, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, assert_equal
from tests.ptx_on_cpu import REVERSE

triton = pytest.importorskip("triton")

from pykernels.triton_kernels.gated_conv import gated_conv_forward  # noqa: E402
from pykernels.triton_kernels.gated_conv_bwd import input_backward, weight_backward  # noqa: E402
from tests import triton_cases  # noqa: E402
from tests.ptx_on_cpu.triton_driver import active  # noqa: E402
from tests.triton_cases import python  # noqa: E402

pytestmark = triton_cases.MARKS
TUNED = (gated_conv_forward, input_backward, weight_backward)
DTYPES = ["fp32", "bf16", "fp16"]
smallest_tiles = triton_cases.smallest_tiles(*TUNED)
capability, ampere = triton_cases.capability, triton_cases.ampere


def check(case: Case, dtype: str) -> None:
    check_case(case, FLOATS[dtype], "triton")


def trained(case: Case, dtype: str, **options: bool) -> dict[str, torch.Tensor]:
    p = problem(case, FLOATS[dtype])
    return evaluate(p.inputs, case.dy, backend="triton", **p.options, **options)


# --- values and gradients ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str, capability: int) -> None:
    """A sample of all combinations of options, another one for each dtype and capability."""
    axes = {
        "residual": ("highway", "add", "none"), "value_act": ("identity", "tanh"),
        "padding": ("same", "causal", "valid"), "cond": ("none", "one", "all"),
        "rows": ("all", "mask", "lengths", "packed"), "split": ("value_gate", "gate_value"),
        "two_weights": (False, True),
    }  # fmt: skip
    forms = [Case(L=11, **dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    forms = random.Random(1).sample([form for form in forms if form.legal], 12)
    number = DTYPES.index(dtype) * 2 + (capability == 90)
    for case in forms[number::6]:
        check(replace(case, C_out=7) if case.residual == "none" else case, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sizes(dtype: str, ampere: None) -> None:
    """Odd channels, several tiles in each direction, empties, dilations beyond the sequence, many taps."""
    for case in (
        Case(B=2, L=33, C_in=1, C_out=1), Case(B=1, L=130, C_in=33, C_out=33), Case(B=0), Case(L=0), Case(K=41, L=23),
        Case(B=3, L=0, rows="packed"), Case(L=4, padding="valid"), Case(dilation=1000),
        Case(K=1), Case(K=2, dilation=3),
    ):  # fmt: skip
        check(case, dtype)


def test_more_outputs_than_inputs(ampere: None) -> None:
    check(Case(B=3, L=50, C_in=40, C_out=130, K=2, residual="none", cond="one"), "bf16")


def test_no_inputs_and_no_outputs(ampere: None) -> None:
    """PyTorch's convolution takes neither: y is that of the bias, and gradients of the empty are empty."""
    for c_in, c_out in ((0, 3), (3, 0)):
        inputs = {"x": torch.ones(2, 9, c_in), "weight": torch.ones(2 * c_out, c_in, 3), "bias": torch.ones(2 * c_out)}
        got = evaluate(inputs, torch.ones_like, residual="none", backend="triton")
        assert torch.equal(got["y"], torch.sigmoid(torch.ones(2, 9, c_out)))
        assert got["dx"].shape == (2, 9, c_in) and (got["dx"] == 0).all() and got["dweight"].numel() == 0


def test_dilation_beyond_32_bits(ampere: None) -> None:
    """Only the tap in the middle reads a row, as with any dilation beyond the sequence."""
    case = Case(dilation=1000)
    p, dy = problem(case, torch.float32), case.dy
    expected = trained(case, "fp32")
    for dilation in (2**30, 2**31, 2**33 + 1):
        options = p.options | {"dilation": dilation}
        assert_equal(evaluate(p.inputs, dy, backend="triton", **options), expected, dilation)


def test_long_sums_are_cut_into_parts(ampere: None) -> None:
    """Several parts of dweight and of the sums for dbias."""
    check(Case(B=1, L=700, C_in=5, C_out=5), "fp32")


@pytest.mark.parametrize("kind", ["gate_dropout", "gate_noise"])
def test_random_bits(kind: str, capability: int) -> None:
    """The draws are those of the definition, which the reference uses; 17 columns take three calls of Philox a row."""
    channels, rows, padding = {80: (17, "lengths", "causal"), 90: (8, "mask", "valid")}[capability]
    case = Case(B=3, L=21, C_in=channels, C_out=channels, rows=rows, padding=padding, cond="one", **{kind: 0.4})
    check(case, "fp16" if kind == "gate_noise" else "fp32")


@pytest.mark.parametrize("seed", [1, 16, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1])
def test_seeds_of_any_size(seed: int, ampere: None) -> None:
    """Numbers whose halves Triton would else treat in another way; dropped gates are g = 1 / 2 exactly."""
    x, weight = torch.zeros(2, 9, 8), torch.ones(16, 8, 1)
    options = {"training": True, "gate_dropout": 0.5, "seed": seed, "residual": "none", "bias": torch.ones(16)}
    y = gated_conv1d(x, weight, backend="triton", **options)
    assert torch.equal(y == 0.5, gated_conv1d(x, weight, backend="reference", **options) == 0.5)
    assert 0 < (y == 0.5).sum() < y.numel()


def test_tf32_where_the_setting_allows_it(capability: int) -> None:
    """PyTorch's setting for CUDA's matrix products; tf32 keeps ten bits of mantissa."""
    case = Case(B=2, L=70, C_in=40, C_out=40)
    p = problem(case, torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        got = trained(case, "fp32")
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
    assert all(1e-5 < errors[name] < 2**-10 for name in ("y", "dx", "dweight")), errors


# --- tuning ---


@pytest.mark.parametrize("dtype, capability", [("fp32", 80), ("bf16", 80), ("bf16", 90)])
def test_every_configuration_gives_the_same_bits(
    dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which configuration is the fastest may differ from run to run; results may not."""
    monkeypatch.undo()
    case = Case(B=2, L=67, C_in=48, C_out=48, rows="lengths")
    p, every = problem(case, FLOATS[dtype]), {kernel: kernel.configs for kernel in TUNED}
    assert all(1 < len(configs) <= 6 for configs in every.values())
    results = []
    with active(capability):
        for i in range(6):
            for kernel, configs in every.items():
                monkeypatch.setattr(kernel, "configs", [configs[i % len(configs)]])
            results.append(trained(case, dtype))
    p.check(results[0])
    for i, result in enumerate(results):
        assert_equal(result, results[0], f"configuration {i}")


def test_the_tuner_tries_all_configurations_once(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps its choice for sizes within the same powers of two."""
    monkeypatch.undo()
    monkeypatch.setattr(gated_conv_forward, "cache", {})
    monkeypatch.setattr(gated_conv_forward, "configs", gated_conv_forward.configs[2:4])
    for length, choices in ((40, 1), (60, 1), (70, 2)):
        check_forward = problem(Case(B=1, L=length), torch.float32)
        check_forward.check(evaluate(check_forward.inputs, None, backend="triton", **check_forward.options))
        assert len(gated_conv_forward.cache) == choices


# --- layouts, masks, determinism ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, ampere: None) -> None:
    """Results depend on values, not on strides, bit for bit."""
    case = Case(B=3, L=13, C_in=16, C_out=16, cond="all", rows="mask")
    p = problem(case, torch.bfloat16)
    x, cond, dy = (LAYOUTS[layout](t) for t in (p.inputs["x"], p.inputs["cond"], case.dy(p.same["y"])))
    got = evaluate(p.inputs | {"x": x, "cond": cond}, dy, backend="triton", **p.options)
    plain = {"x": x.contiguous().clone(), "cond": cond.contiguous().clone()}
    assert_equal(got, evaluate(p.inputs | plain, dy.contiguous().clone(), backend="triton", **p.options), layout)


def test_padding_content_changes_nothing(ampere: None) -> None:
    """NaN and inf in masked rows of x, cond and dy."""
    case = Case(B=3, L=13, C_in=16, C_out=16, cond="all", rows="mask")
    p = problem(case, torch.bfloat16)
    live, dy = p.options["mask"], case.dy(p.same["y"])
    expected = evaluate(p.inputs, dy, backend="triton", **p.options)
    for content in (float("nan"), float("inf")):
        x, cond, grad = p.inputs["x"].clone(), p.inputs["cond"].clone(), dy.clone()
        x[~live], cond[~live], grad[~live] = content, content, content
        got = evaluate(p.inputs | {"x": x, "cond": cond}, grad, backend="triton", **p.options)
        assert_equal(got, expected, content)
    assert all((expected[name][~live] == 0).all() for name in ("y", "dx", "dcond"))


def test_lengths_equal_mask_and_packed_rows(ampere: None) -> None:
    case = Case(B=4, L=13, rows="lengths")
    p = problem(case, torch.float32)
    lengths, options = p.options["lengths"], {n: v for n, v in p.options.items() if n != "lengths"}
    live = torch.arange(case.L) < lengths.unsqueeze(-1)
    run = lambda inputs, **rows: evaluate(inputs, None, backend="triton", **options, **rows)["y"]  # noqa: E731
    y = run(p.inputs, lengths=lengths)
    assert torch.equal(run(p.inputs, mask=live), y) and torch.equal(run(p.inputs, lengths=lengths.int()), y)
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)])
    for index in (torch.int32, torch.int64):
        packed = run(p.inputs | {"x": p.inputs["x"][live]}, cu_seqlens=bounds.to(index))
        assert torch.equal(packed, y[live])


def test_schedules_and_recomputation_give_the_same_bits() -> None:
    case = Case(rows="lengths", gate_dropout=0.3)
    with active(80):
        expected = trained(case, "bf16")
        assert_equal(trained(case, "bf16", recompute=True), expected)
    for schedule in (REVERSE, 5):
        with active(80, schedule=schedule):
            assert_equal(trained(case, "bf16"), expected, schedule)


def test_only_the_gradients_that_are_needed(ampere: None) -> None:
    case = Case(two_weights=True, cond="one")
    p = problem(case, torch.float32)
    dy, expected = case.dy(p.same["y"]), trained(case, "fp32")
    for name in p.inputs:
        leaf = p.inputs[name].clone().requires_grad_()
        y = gated_conv1d(**p.inputs | {name: leaf}, **p.options, backend="triton")
        assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], expected[f"d{name}"]), name


# --- PyTorch ---


def test_compiled_and_raw_operators(ampere: None) -> None:
    """torch.compile without graph breaks, symbolic sizes too, and opcheck."""
    case = Case(gate_dropout=0.3)
    p, expected = problem(case, torch.float32), trained(case, "fp32")
    for dynamic in (False, True):
        compiled = torch.compile(gated_conv1d, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert_equal(evaluate(p.inputs, case.dy, compiled, backend="triton", **p.options), expected)
    tensors = (p.inputs["x"], p.inputs["weight"], p.inputs["bias"], *[None] * 6, torch.tensor(1234))
    form = (case.dilation, case.padding, case.residual, case.value_act, case.split, case.gate_dropout, 0.0)
    operators = torch.ops.pykernels
    y, saved = operators._gated_conv_fwd_triton(*tensors, None, *form, True)
    torch.library.opcheck(operators._gated_conv_fwd_triton.default, (*tensors, None, *form, True))
    needs = [t is not None for t in tensors[:6]]
    torch.library.opcheck(operators._gated_conv_bwd_triton.default, (case.dy(y), *tensors, saved, *form, needs))
    torch.library.opcheck(operators._gated_conv_pack_triton.default, (p.inputs["weight"], None, "value_gate"),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_export_has_no_raw_operator(ampere: None) -> None:
    module = GatedConv1d(5, 5, 3, backend="triton").eval()
    program = torch.export.export(module, (torch.randn(2, 9, 5),))
    assert not any("pykernels" in str(node.target) for node in program.graph.nodes)


def test_prepacked_weights(ampere: None) -> None:
    for split in ("value_gate", "gate_value"):
        module = GatedConv1d(5, 5, 3, dilation=2, backend="triton", split=split).eval()
        x = torch.randn(2, 19, 5, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = module(x)
            assert torch.equal(module.prepack()(x), expected)
            module._packed = module._packed[:-4]
            with pytest.raises(RuntimeError, match="^packed: made for other weights"):
                module(x)


def test_autocast(ampere: None) -> None:
    p = problem(Case(C_in=16, C_out=16), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(p.inputs, p.case.dy, backend="triton", **p.options)
    half = {name: t.bfloat16() for name, t in p.inputs.items()}
    expected = evaluate(half, p.case.dy, backend="triton", **p.options)
    assert got["y"].dtype == torch.bfloat16 and got["dweight"].dtype == torch.float32
    assert_equal({name: t.to(torch.bfloat16) for name, t in got.items()}, expected)


def test_errors_name_the_argument(ampere: None) -> None:
    x, weight = torch.zeros(2, 9, 4), torch.zeros(8, 4, 3)
    for error, message, options in [
        (TypeError, "^weight: expected .*like x", {"weight": weight.half()}),
        (ValueError, "^weight: expected C_in = 4 like x", {"weight": torch.zeros(8, 5, 3)}),
        (ValueError, r"^mask: expected shape \[2, 9\], got \[2, 8\]", {"mask": torch.ones(2, 8, dtype=torch.bool)}),
        (TypeError, "^mask: expected bool", {"mask": torch.ones(2, 9)}),
        (ValueError, "^lengths: expected values from 0 to L = 9", {"lengths": torch.tensor([3, 10])}),
        (RuntimeError, "^backend: 'triton' cannot .*float64", {"x": x.double(), "weight": weight.double()}),
    ]:
        with pytest.raises(error, match=message):
            gated_conv1d(options.pop("x", x), options.pop("weight", weight), backend="triton", **options)
    with pytest.raises(NotImplementedError, match="^gated_conv1d: torch.vmap"):
        torch.vmap(lambda t: gated_conv1d(t, weight, backend="triton"))(x.unsqueeze(0))


def test_cpu_tensors_need_a_driver_for_the_cpu() -> None:
    """And "auto" never sends them to Triton."""
    choose = lambda name: _backend.choose("gated_conv1d", name, "cpu", torch.float32)  # noqa: E731
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="^backend: 'triton'.* it runs on cuda, and the tensors are on cpu"):
            choose("triton")
    with active(80):
        assert choose("triton") == "triton" and choose("auto") != "triton"
    first = "cuda" if _extension.cuda_reason is None else "triton"
    assert _backend.choose("gated_conv1d", "auto", "cuda", torch.float32) == first
    assert _backend.choose("gated_conv1d", "auto", "cuda", torch.float64) == "reference"


# --- other processes: the interpreter, installations without something ---



INTERPRETED = """
import torch
from tests.gated_conv_cases import Case, check_case
torch.set_num_threads(1)
for case in (
    Case(rows="mask", cond="one"),
    Case(C_out=7, residual="none", value_act="tanh", padding="causal", rows="packed", cond="all", gate_dropout=0.4),
    Case(L=80, residual="add", padding="valid", rows="lengths", two_weights=True, gate_noise=0.4),
):
    for dtype in (torch.float32, torch.float16):
        check_case(case, dtype, "triton")
print("done")
"""


def test_the_interpreter_agrees(tmp_path: Path) -> None:
    """It takes kernels as Python and NumPy, without Triton's compiler. Its bfloat16 arithmetic is wrong in 3.8."""
    done = python(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


WITHOUT_TRITON = """
import sys
if {hidden}:
    sys.modules["triton"] = None
import torch
from pykernels import _backend, gated_conv1d
assert "triton" not in sys.modules or {hidden}
x, weight = torch.randn(1, 4, 3), torch.randn(6, 3, 1)
gated_conv1d(x, weight)
reasons = [row[-1] for row in _backend.table() if row[:2] == ("gated_conv1d", "triton")]
assert reasons == [{reason!r}], reasons
assert _backend.choose("gated_conv1d", "auto", "cuda", torch.float32) != "triton"
for device in ("cpu", "cuda"):
    try:
        _backend.choose("gated_conv1d", "triton", device, torch.float32)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize("hidden", [True, False], ids=["absent", "broken"])
def test_without_triton(hidden: bool, tmp_path: Path) -> None:
    """Not installed, or one that fails when it is imported: a named backend says so, and "auto" does without."""
    broken = tmp_path / "triton"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libtriton.so: wrong')")
    reason = "Triton cannot be imported: OSError: libtriton.so: wrong"
    if hidden:
        reason = "Triton is not installed: pip install triton"
    done = python(WITHOUT_TRITON.format(hidden=hidden, reason=reason), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"backend: 'triton' cannot serve gated_conv1d here: {reason}" in done.stdout


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["pykernels._build"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pykernels import _extension
    assert _extension._C is None and "no compiled extension" in str(caught[0].message)
import torch
from tests.gated_conv_cases import Case, check_case
check_case(Case(gate_dropout=0.4), torch.float32, "triton")
print("done")
"""


def test_without_extension(tmp_path: Path) -> None:
    done = python(WITHOUT_EXTENSION, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]

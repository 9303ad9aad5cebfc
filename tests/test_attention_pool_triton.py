"""attention_pool's Triton kernels without a GPU: what Triton compiles for sm_80 and sm_90 (warpgroup instructions),
executed on CPU tensors by tests/ptx_on_cpu. A second judge is Triton's interpreter, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pykernels import AttentionPool, _backend, _extension, attention_pool
from tests.attention_pool_cases import PoolCase, check_case, evaluate, problem
from tests.helpers import FLOATS, LAYOUTS, assert_equal, assert_transforms_are_refused, is_standard
from tests.ptx_on_cpu import REVERSE

pytest.importorskip("triton")

from pykernels.triton_kernels.attention_pool import attention_pool_forward  # noqa: E402
from pykernels.triton_kernels.attention_pool_bwd import hidden_backward, pool_input_backward  # noqa: E402
from pykernels.triton_kernels.gated_conv_bwd import weight_backward  # noqa: E402
from tests import triton_cases  # noqa: E402
from tests.ptx_on_cpu.triton_driver import active  # noqa: E402
from tests.triton_cases import python  # noqa: E402

pytestmark = triton_cases.MARKS
TUNED = (attention_pool_forward, hidden_backward, pool_input_backward, weight_backward)
smallest_tiles = triton_cases.smallest_tiles(*TUNED)
capability, ampere = triton_cases.capability, triton_cases.ampere


def check(case: PoolCase, dtype: str) -> None:
    check_case(case, FLOATS[dtype], "triton")


def trained(case: PoolCase, dtype: str, **options: bool) -> dict[str, torch.Tensor]:
    p = problem(case, FLOATS[dtype])
    return evaluate(p.inputs, case.gradients, backend="triton", **p.options, **options)


# --- values and gradients ---


@pytest.mark.parametrize(
    ("case", "dtype", "arch"),
    [
        (PoolCase(L=70, J=3, rows="lengths", returned="raw"), "fp32", 80),
        (PoolCase(activation="gelu", gated=True, rows="packed", returned="softmax"), "fp32", 90),
        (PoolCase(L=70, activation="swish", gated=True, J=2, rows="mask", returned="softmax"), "bf16", 80),
        (PoolCase(L=130, rows="packed", J=3, bias=False, returned="raw"), "bf16", 90),
        (PoolCase(activation="relu", rows="mask"), "fp16", 80),
        (PoolCase(L=70, activation="gelu", gated=True, bias=False, rows="lengths", returned="raw"), "fp16", 90),
    ],
)
def test_forms(case: PoolCase, dtype: str, arch: int) -> None:
    """A sample of all combinations of options."""
    with active(arch):
        check(case, dtype)


def test_sizes(ampere: None) -> None:
    """Odd widths, several tiles in each direction, one row, empties."""
    for case in (
        PoolCase(B=2, L=33, D=1, H=1), PoolCase(B=1, L=130, D=33, H=129), PoolCase(B=1, L=1), PoolCase(B=9, L=1),
        PoolCase(B=0), PoolCase(L=0), PoolCase(D=0), PoolCase(H=0, returned="raw"), PoolCase(B=0, rows="packed"),
        PoolCase(B=3, L=0, rows="packed"), PoolCase(B=1, L=0, rows="lengths", J=2),
    ):  # fmt: skip
        check(case, "fp32")
    check(PoolCase(B=2, L=33, D=1, H=1), "bf16")
    check(PoolCase(B=1, L=130, D=33, H=129), "bf16")


def test_wide_rows(ampere: None) -> None:
    """Rows that no program keeps are read for each tile of hidden units; several parts of dweight."""
    check(PoolCase(B=1, L=300, D=264, H=70, returned="raw"), "bf16")


def test_many_heads(ampere: None) -> None:
    """More than a program takes."""
    check(PoolCase(B=2, L=20, J=67, returned="softmax"), "bf16")


def test_a_bag_of_many_rows(ampere: None) -> None:
    """More chunks than are added up beside each other."""
    check(PoolCase(B=1, L=2300, D=3, H=2), "fp32")


def test_tf32_where_the_setting_allows_it(capability: int) -> None:
    """PyTorch's setting for CUDA's matrix products; tf32 keeps ten bits of mantissa."""
    case = PoolCase(B=2, L=70, D=40, H=40, returned="raw")
    p = problem(case, torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        got = trained(case, "fp32")
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
    assert all(1e-5 < errors[name] < 2**-9 for name in ("scores", "dx", "dweight")), errors


# --- tuning ---


@pytest.mark.parametrize("dtype, capability", [("fp32", 80), ("bf16", 80), ("bf16", 90)])
def test_every_configuration_gives_the_same_bits(
    dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which configuration is the fastest may differ from run to run; results may not."""
    monkeypatch.undo()
    case = PoolCase(B=2, L=67, D=136 if dtype == "fp32" else 48, H=130, J=2, rows="lengths")
    p, every = problem(case, FLOATS[dtype]), {kernel: kernel.configs for kernel in TUNED[:3]}
    assert all(1 < len(configs) <= 6 for configs in every.values())
    monkeypatch.setattr(weight_backward, "configs", weight_backward.configs[:1])  # a matter of gated_conv1d's tests
    results = []
    with active(capability):
        for i in range(max(map(len, every.values()))):
            for kernel, configs in every.items():
                monkeypatch.setattr(kernel, "configs", [configs[i % len(configs)]])
            results.append(trained(case, dtype))
    p.check(results[0])
    for i, result in enumerate(results):
        assert_equal(result, results[0], f"configuration {i}")


# --- layouts, masks, determinism ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, ampere: None) -> None:
    """Results depend on values, not on strides, bit for bit."""
    case = PoolCase(B=3, L=13, D=16, H=16, J=2, gated=True, rows="mask", returned="raw")
    p = problem(case, torch.bfloat16)
    change = LAYOUTS[layout]
    inputs = {name: change(t) for name, t in p.inputs.items()}
    grads = {name: change(t) for name, t in case.gradients({n: p.same[n] for n in ("out", "scores")}).items()}
    plain = [{name: t.contiguous().clone() for name, t in tensors.items()} for tensors in (inputs, grads)]
    got = evaluate(inputs, lambda _: grads, backend="triton", **p.options)
    assert_equal(got, evaluate(plain[0], lambda _: plain[1], backend="triton", **p.options), layout)


@pytest.mark.parametrize("returned", ["raw", "softmax"])
def test_padding_content_changes_nothing(returned: str, ampere: None) -> None:
    """NaN and inf in masked rows of x and of incoming gradients."""
    case = PoolCase(B=3, L=70, D=16, H=16, J=2, gated=True, rows="mask", returned=returned)
    p, live = problem(case, torch.bfloat16), case.live()
    incoming = case.gradients({n: p.same[n] for n in ("out", "scores")})
    expected = evaluate(p.inputs, lambda _: incoming, backend="triton", **p.options)
    for content in (float("nan"), float("inf")):
        x, dscores = p.inputs["x"].clone(), incoming["scores"].clone()
        x[~live] = content
        dscores.transpose(1, 2)[~live] = content
        grads = incoming | {"scores": dscores}
        got = evaluate(p.inputs | {"x": x}, lambda _, g=grads: g, backend="triton", **p.options)
        assert_equal(got, expected, content)
    assert (expected["dx"][~live] == 0).all() and (expected["scores"].transpose(1, 2)[~live] == 0).all()


def test_rows_that_are_all_masked(ampere: None) -> None:
    """Zeros out and zero, finite gradients."""
    nan = lambda results: {n: torch.full_like(t, torch.nan) for n, t in results.items()}  # noqa: E731
    for returned in ("raw", "softmax"):
        inputs = PoolCase(B=2, L=19, J=2, gated=True, returned=returned).inputs(torch.float32)
        inputs["x"] = torch.full_like(inputs["x"], torch.nan)
        for options in ({"mask": torch.zeros(2, 19, dtype=torch.bool)}, {"lengths": torch.zeros(2).int()}):
            got = evaluate(inputs, nan, backend="triton", return_scores=returned, **options)
            assert all((t == 0).all() for t in got.values())


def test_lengths_equal_mask_packed_rows_and_each_sequence_alone(ampere: None) -> None:
    """Bit for bit, whatever the neighbours and the padding behind."""
    case = PoolCase(B=4, L=70, D=16, H=24, J=2, rows="lengths", returned="raw")
    p, live = problem(case, torch.float32), case.live()
    x, rest = p.inputs["x"], {n: t for n, t in p.inputs.items() if n != "x"}
    lengths = p.options["lengths"]

    def call(x: torch.Tensor, **rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return evaluate({"x": x, **rest}, None, backend="triton", return_scores="raw", **rows)

    expected = call(x, lengths=lengths)
    for same in ({"mask": live}, {"mask": live.int()}, {"lengths": lengths.int()}):
        assert_equal(call(x, **same), expected, same)
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)])
    for index in (torch.int32, torch.int64):
        packed = call(x[live], cu_seqlens=bounds.to(index))
        assert torch.equal(packed["out"], expected["out"])
        assert torch.equal(packed["scores"], expected["scores"].transpose(1, 2)[live].T)
    longer = torch.nn.functional.pad(x, (0, 0, 0, 100), value=torch.nan)
    assert torch.equal(call(longer, lengths=lengths)["out"], expected["out"])
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(call(x[b : b + 1, :n])["out"][0], expected["out"][b])


def test_schedules_give_the_same_bits() -> None:
    case = PoolCase(L=70, rows="lengths", J=2, gated=True, returned="softmax")
    with active(80):
        expected = trained(case, "bf16")
    for schedule in (REVERSE, 5):
        with active(80, schedule=schedule):
            assert_equal(trained(case, "bf16"), expected, schedule)


def test_only_the_gradients_that_are_needed(ampere: None) -> None:
    """Of each argument alone, and of each result alone."""
    case = PoolCase(gated=True, J=2, returned="raw")
    p, expected = problem(case, torch.float32), trained(case, "fp32")
    incoming = case.gradients({n: p.same[n] for n in ("out", "scores")})
    for name in p.inputs:
        leaf = p.inputs[name].clone().requires_grad_()
        results = attention_pool(**p.inputs | {name: leaf}, **p.options, backend="triton")
        got = torch.autograd.grad(results, leaf, [incoming["out"], incoming["scores"]])[0]
        assert torch.equal(got, expected[f"d{name}"]), name
    for result in ("out", "scores"):
        grads = {result: incoming[result]}
        got, same = (
            evaluate(p.inputs, lambda _, g=grads: g, backend=backend, **p.options)
            for backend in ("triton", "reference")
        )
        for name, t in got.items():
            torch.testing.assert_close(t, same[name], rtol=1e-4, atol=1e-5)


# --- PyTorch ---


def test_compiled_and_raw_operators(ampere: None) -> None:
    """torch.compile without graph breaks, symbolic sizes too, and opcheck."""
    case = PoolCase(gated=True, J=2, rows="lengths", returned="softmax")
    p, expected = problem(case, torch.float32), trained(case, "fp32")
    for dynamic in (False, True):
        compiled = torch.compile(attention_pool, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert_equal(evaluate(p.inputs, case.gradients, compiled, backend="triton", **p.options), expected)
    i = p.inputs
    layer = (i["weight"], i["query"], i["bias"], i["gate_weight"], i["gate_bias"])
    tensors, form = (i["x"], *layer, None, p.options["lengths"], None), ("tanh", "softmax")
    operators = torch.ops.pykernels
    out, scores, _, max_sum, _, kept = operators._attention_pool_fwd_triton(*tensors, *form, True, True)
    torch.library.opcheck(operators._attention_pool_fwd_triton.default, (*tensors, *form, True, True))
    grads = case.gradients({"out": out, "scores": scores})
    saved = (scores, max_sum, out, kept)
    arguments = (grads["out"], grads["scores"], *tensors, *saved, *form, [True] * 6)
    torch.library.opcheck(operators._attention_pool_bwd_triton.default, arguments)


def test_export_has_no_raw_operator(ampere: None) -> None:
    module = AttentionPool(5, 7, backend="triton").eval()
    assert is_standard(torch.export.export(module, (torch.randn(2, 9, 5),)).graph)


def test_autocast(ampere: None) -> None:
    case = PoolCase(D=16, H=16)
    p = problem(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(p.inputs, case.gradients, backend="triton", **p.options)
    half = {name: t.bfloat16() for name, t in p.inputs.items()}
    expected = evaluate(half, case.gradients, backend="triton", **p.options)
    assert got["out"].dtype == torch.bfloat16 and got["dweight"].dtype == torch.float32
    assert_equal({name: t.to(torch.bfloat16) for name, t in got.items()}, expected)


def test_double_backward(ampere: None) -> None:
    """At the speed of plain PyTorch."""
    inputs = {name: t.requires_grad_() for name, t in PoolCase(B=2, L=5).inputs(torch.float32).items()}
    second = []
    for backend in ("triton", "reference"):
        out = attention_pool(**inputs, backend=backend)
        (dx,) = torch.autograd.grad(out.square().sum(), inputs["x"], create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), inputs["weight"])[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument(ampere: None) -> None:
    x, weight, query = torch.zeros(2, 9, 4), torch.zeros(8, 4), torch.zeros(8)
    for error, message, options in [
        (TypeError, "^weight: expected .*like x", {"weight": weight.half()}),
        (ValueError, r"^weight: expected \[H, D\] with D = 4", {"weight": torch.zeros(8, 5)}),
        (ValueError, r"^query: expected \[H\] or \[J, H\] with H = 8", {"query": torch.zeros(7)}),
        (ValueError, r"^mask: expected shape \[2, 9\], got \[2, 8\]", {"mask": torch.ones(2, 8, dtype=torch.bool)}),
        (TypeError, "^mask: expected bool", {"mask": torch.ones(2, 9)}),
        (ValueError, "^lengths: expected values from 0 to L = 9", {"lengths": torch.tensor([3, 10])}),
        (ValueError, "^activation: expected one of", {"activation": "sine"}),
        (RuntimeError, "^backend: 'triton' cannot .*float64", {"x": x.double(), "weight": weight.double()}),
    ]:
        with pytest.raises(error, match=message):
            attention_pool(
                options.pop("x", x), options.pop("weight", weight), options.pop("query", query), backend="triton",
                **options,
            )  # fmt: skip
    assert_transforms_are_refused(
        "attention_pool", lambda t: attention_pool(t, weight, query, backend="triton"), torch.zeros(3, 2, 9, 4)
    )


def test_choice_of_the_backend() -> None:
    choose = lambda name, device="cpu", dtype=torch.float32: _backend.choose("attention_pool", name, device, dtype)  # noqa: E731
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="^backend: 'triton'.* it runs on cuda, and the tensors are on cpu"):
            choose("triton")
    with active(80):
        assert choose("triton") == "triton" and choose("auto") != "triton"
    assert choose("auto", "cuda") == ("cuda" if _extension.cuda_reason is None else "triton")
    assert choose("auto", "cuda", torch.float64) == "reference"


# --- another process: the interpreter ---

INTERPRETED = """
import torch
from tests.attention_pool_cases import PoolCase, check_case
torch.set_num_threads(1)
for case in (
    PoolCase(L=70, rows="mask", gated=True, J=2, returned="raw"),
    PoolCase(rows="packed", activation="gelu", returned="softmax"),
    PoolCase(L=70, D=264, rows="lengths", activation="swish"),
):
    for dtype in (torch.float32, torch.float16):
        check_case(case, dtype, "triton")
print("done")
"""


def test_the_interpreter_agrees(tmp_path: Path) -> None:
    """It takes kernels as Python and NumPy, without Triton's compiler. Its bfloat16 arithmetic is wrong in 3.8."""
    done = python(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]

"""gated_conv1d in the AMX tier: its compiled instructions run, in an emulator where the processor has none.

bf16 is what this tier multiplies itself; the other dtypes take the AVX-512 path that it shares with the tiers below.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from pykernels import _extension, gated_conv1d
from tests.gated_conv_cases import Case, check_case, evaluate, problem
from tests.helpers import LAYOUTS, assert_equal, assert_equal_over_runs_and_threads, by_precision

_C = _extension._C

pytestmark = pytest.mark.usefixtures("amx")

# Heights below, at and above one and two tiles; widths around the 16 columns and the 32 inner elements of a tile.
SIZES = [(1, 1, 1), (2, 15, 16), (1, 17, 31), (1, 33, 33), (2, 40, 32), (1, 65, 48), (9, 2, 17)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("residual, value_act", [("highway", "identity"), ("none", "tanh")])
def test_sizes(size: tuple[int, int, int], residual: str, value_act: str) -> None:
    B, L, C = size
    check_case(Case(B=B, L=L, C_in=C, C_out=C, residual=residual, value_act=value_act), torch.bfloat16, "cpu")


ROWS_AND_PADDING = [
    case
    for rows, padding in itertools.product(("all", "mask", "lengths", "packed"), ("same", "causal", "valid"))
    if (case := Case(B=3, L=37, C_in=32, C_out=32, padding=padding, rows=rows, cond="all")).legal
]


@pytest.mark.parametrize("case", ROWS_AND_PADDING, ids=lambda case: f"{case.rows}-{case.padding}")
def test_rows_and_padding(case: Case) -> None:
    check_case(case, torch.bfloat16, "cpu")


@pytest.mark.parametrize("K, dilation", list(itertools.product((1, 2, 5), (1, 7, 64))))
def test_taps(K: int, dilation: int) -> None:
    case = Case(B=2, L=35, C_in=32, C_out=20, K=K, dilation=dilation, residual="none", cond="one", two_weights=True)
    check_case(case, torch.bfloat16, "cpu")


@pytest.mark.parametrize("random", ["gate_dropout", "gate_noise"])
def test_random_bits_are_those_of_every_tier(random: str) -> None:
    check_case(replace(Case(L=33, C_in=24, C_out=24), **{random: 0.3}), torch.bfloat16, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_neighbours_full_of_nan(layout: str) -> None:
    """#7, #35"""
    case = Case(B=2, L=33, C_in=31, C_out=31)
    inputs = case.inputs(torch.bfloat16)
    laid_out = inputs | {"x": LAYOUTS[layout](inputs["x"]), "weight": LAYOUTS[layout](inputs["weight"])}
    plain = {name: t.contiguous() for name, t in laid_out.items()}
    assert_equal(evaluate(laid_out, case.dy, backend="cpu"), evaluate(plain, case.dy, backend="cpu"), layout)


def test_threads() -> None:
    """#14, #27: rows prepared before the shares of columns or by each, weight gradients by parts or whole."""
    for case in (
        Case(B=2, L=40, C_in=300, C_out=300, K=7, rows="mask", cond="one", gate_dropout=0.1),
        Case(B=1, L=300, C_in=40, C_out=40),
    ):
        p = problem(case, torch.bfloat16)
        p.check(evaluate(p.inputs, case.dy, **p.options, backend="cpu"))
        assert_equal_over_runs_and_threads(
            lambda p=p: evaluate(p.inputs, p.case.dy, **p.options, backend="cpu"),
            lambda p=p: evaluate(p.inputs, None, **p.options, backend="cpu"),
            runs=2,
        )


def test_tiles_of_one_tier_give_the_product_of_the_other() -> None:
    """AMX and AVX512-BF16 sum in another order, but the same products."""
    inputs = Case(B=2, L=50, C_in=64, C_out=64).inputs(torch.bfloat16)
    with torch.no_grad():
        tiles = gated_conv1d(**inputs, backend="cpu")
        _C.set_cpu_tier_unchecked("avx512_bf16")
        pairs = gated_conv1d(**inputs, backend="cpu")
    torch.testing.assert_close(tiles, pairs, rtol=2**-7, atol=2**-7)


def test_float32_in_bf16_where_pytorch_allows_it() -> None:
    """Only "medium" allows it; "high" and "highest" multiply in float32, which is far more exact."""
    inputs = Case(B=2, L=40, C_in=40, C_out=40).inputs(torch.float32)
    truth = gated_conv1d(**{name: t.double() for name, t in inputs.items()}, backend="reference")
    errors = by_precision(lambda: (gated_conv1d(**inputs, backend="cpu").double() - truth).abs().max().item())
    assert errors["high"] == errors["highest"] < 1e-5
    assert 1e-4 < errors["medium"] < 0.1

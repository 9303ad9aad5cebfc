"""lora_linear in the AMX tier: its compiled instructions run, in an emulator where the processor has none.

bf16 base products of more than 16 rows, in both directions, are what this tier multiplies itself; all else takes the
AVX-512 path that it shares with the tiers below.
"""

from dataclasses import replace

import pytest
import torch

from pykernels import _extension, lora_linear
from tests.helpers import LAYOUTS, assert_equal, assert_equal_over_runs_and_threads, by_precision
from tests.lora_linear_cases import LoraCase, check_case, evaluate, problem

_C = _extension._C

pytestmark = pytest.mark.usefixtures("amx")

# Heights of more than one and of two tiles; widths around the 16 columns and the 32 inner elements of a tile; ranks.
SIZES = [
    (17, 1, 1, 1),
    (31, 16, 15, 3),
    (32, 32, 32, 8),
    (33, 31, 17, 0),
    (40, 33, 64, 16),
    (65, 64, 48, 5),
    (100, 48, 33, 1),
]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int, int, int], transposed: bool) -> None:
    rows, k, n, rank = size
    check_case(LoraCase(leading=(rows,), K=k, N=n, R=rank, transposed=transposed), torch.bfloat16, "cpu")


@pytest.mark.parametrize("float_adapters", [False, True], ids=["", "float adapters"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("E", [0, 3])
def test_adapters_and_dropout(E: int, dropout: float, float_adapters: bool) -> None:
    case = LoraCase(leading=(3, 15), K=40, N=33, E=E, dropout=dropout, float_adapters=float_adapters)
    check_case(case, torch.bfloat16, "cpu")
    check_case(replace(case, bias=False, leading=(70,)), torch.bfloat16, "cpu")


def test_tiles_read_no_row_beyond_the_tensor() -> None:
    """#35: rows in place where the tensor has a whole tile of them, through a copy at its end."""
    for rows in (31, 32, 40, 48):
        check_case(LoraCase(leading=(rows,), K=32, N=64), torch.bfloat16, "cpu")


def test_products_by_rows_and_by_columns() -> None:
    """Rows that collide in a cache, read in place and copied; a bias and a rank beyond a vector."""
    for rows, k, n in [(600, 1024, 40), (40, 1024, 70)]:
        check_case(LoraCase(leading=(rows,), K=k, N=n, R=20), torch.bfloat16, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_neighbours_full_of_nan(layout: str) -> None:
    """#7, #35"""
    case = LoraCase(leading=(3, 13), K=31, N=31)
    laid_out = {name: LAYOUTS[layout](t) for name, t in case.inputs(torch.bfloat16).items()}
    plain = {name: t.contiguous() for name, t in laid_out.items()}
    assert_equal(evaluate(laid_out, case.dy, backend="cpu"), evaluate(plain, case.dy, backend="cpu"), layout)


@pytest.mark.parametrize(
    "case",
    [LoraCase(leading=(150,), K=70, N=100, R=9, dropout=0.2), LoraCase(leading=(70,), K=1024, N=700, R=2)],
    ids=["epilogues that run between the products of the next tile", "rows prepared for several groups of columns"],
)
def test_threads(case: LoraCase) -> None:
    """#14, #27"""
    p = problem(case, torch.bfloat16)
    assert_equal_over_runs_and_threads(
        lambda: evaluate(p.inputs, p.case.dy, **p.options, backend="cpu"),
        lambda: evaluate(p.inputs, None, **p.options, backend="cpu"),
        runs=2,
    )


def test_tiles_of_one_tier_give_the_product_of_the_other() -> None:
    """AMX and AVX512-BF16 sum in another order, but the same products."""
    inputs = LoraCase(leading=(50,), K=64, N=64).inputs(torch.bfloat16)
    with torch.no_grad():
        tiles = lora_linear(**inputs, backend="cpu")
        _C.set_cpu_tier_unchecked("avx512_bf16")
        pairs = lora_linear(**inputs, backend="cpu")
    torch.testing.assert_close(tiles, pairs, rtol=2**-7, atol=2**-7)


def test_float32_in_bf16_where_pytorch_allows_it() -> None:
    """Only "medium" allows it; "high" and "highest" multiply in float32, which is far more exact."""
    inputs = LoraCase(leading=(40,), K=40, N=40).inputs(torch.float32)
    truth = lora_linear(**{name: t.double() for name, t in inputs.items()}, backend="reference")
    errors = by_precision(lambda: (lora_linear(**inputs, backend="cpu").double() - truth).abs().max().item())
    assert errors["high"] == errors["highest"] < 1e-5
    assert 1e-4 < errors["medium"] < 0.1

"""attention_pool in the AMX tier: its compiled instructions run, in an emulator where the processor has none."""

import itertools

import pytest
import torch

from pykernels import _extension, attention_pool
from tests.attention_pool_cases import PoolCase, check_case, evaluate
from tests.helpers import LAYOUTS, assert_equal, by_precision

_C = _extension._C

pytestmark = pytest.mark.usefixtures("amx")

# Heights below, at and above one and two tiles; widths around the 16 columns and the 32 inner elements of a tile.
SIZES = [
    (1, 1, 1, 1),
    (2, 15, 16, 17),
    (1, 17, 31, 33),
    (2, 32, 32, 32),
    (1, 33, 64, 16),
    (1, 150, 48, 40),
    (9, 2, 17, 65),
]


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int, int, int], gated: bool) -> None:
    B, L, D, H = size
    check_case(PoolCase(B=B, L=L, D=D, H=H, J=2 if gated else 0, gated=gated, returned="raw"), torch.bfloat16, "cpu")


@pytest.mark.parametrize("activation", ["tanh", "swish", "relu", "gelu"])
@pytest.mark.parametrize("rows", ["all", "mask", "lengths", "packed"])
def test_rows_and_activations(rows: str, activation: str) -> None:
    check_case(PoolCase(L=45, D=32, H=40, activation=activation, rows=rows), torch.bfloat16, "cpu")


def test_tiles_read_no_row_beyond_the_tensor() -> None:
    """#35: rows in place where the tensor has a whole tile of them, through a copy at its end."""
    for length, rows in itertools.product((31, 32, 40, 48), ("all", "lengths", "packed")):
        check_case(PoolCase(B=2, L=length, D=32, H=16, rows=rows), torch.bfloat16, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_neighbours_full_of_nan(layout: str) -> None:
    """#7, #35"""
    case = PoolCase(B=2, L=33, D=31, H=31)
    laid_out = {name: LAYOUTS[layout](t) for name, t in case.inputs(torch.bfloat16).items()}
    plain = {name: t.contiguous() for name, t in laid_out.items()}
    assert_equal(
        evaluate(laid_out, case.gradients, backend="cpu"), evaluate(plain, case.gradients, backend="cpu"), layout
    )


def test_tiles_of_one_tier_give_the_product_of_the_other() -> None:
    """AMX and AVX512-BF16 sum in another order, but the same products."""
    inputs = PoolCase(B=2, L=50, D=64, H=64).inputs(torch.bfloat16)
    with torch.no_grad():
        tiles = attention_pool(**inputs, backend="cpu")
        _C.set_cpu_tier_unchecked("avx512_bf16")
        pairs = attention_pool(**inputs, backend="cpu")
    torch.testing.assert_close(tiles, pairs, rtol=2**-7, atol=2**-7)


def test_float32_in_bf16_where_pytorch_allows_it() -> None:
    """Only "medium" allows it; "high" and "highest" multiply in float32, which is far more exact."""
    inputs = PoolCase(B=2, L=40, D=40, H=40).inputs(torch.float32)
    truth = attention_pool(**{name: t.double() for name, t in inputs.items()}, backend="reference")
    errors = by_precision(lambda: (attention_pool(**inputs, backend="cpu").double() - truth).abs().max().item())
    assert errors["high"] == errors["highest"] < 1e-5
    assert 1e-5 < errors["medium"] < 0.1

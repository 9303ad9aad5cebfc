"""gated_conv1d: masks, lengths and packed rows. `#n` names a line of the project's failure checklist."""

import pytest
import torch
from torch import Tensor

from pykernels import gated_conv1d
from tests.gated_conv_cases import Case, evaluate, problem
from tests.helpers import FLOATS, assert_equal

NAN = float("nan")


def assert_same(backend: str, a: Tensor, b: Tensor, what: object = "") -> None:
    """Bitwise on the kernels."""
    eps = torch.finfo(a.dtype).eps
    assert torch.equal(a, b) if backend == "cpu" else torch.allclose(a, b, rtol=16 * eps, atol=16 * eps), what


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ["mask", "lengths"])
def test_padding_content_changes_nothing(rows: str, dtype: str, backend: str) -> None:
    """Acceptance 1, #23: NaN and inf in masked rows of x, cond and dy; y, dx and all other gradients stay bitwise."""
    for residual in ("highway", "add", "none"):
        for padding in ("same", "causal", "valid"):
            for value_act in ("identity", "tanh"):
                case = Case(
                    B=4, L=23, residual=residual, padding=padding, value_act=value_act, rows=rows, cond="all", K=4
                )
                p = problem(case, FLOATS[dtype])
                live = p.options.get("mask")
                if live is None:
                    live = torch.arange(case.L) < p.options["lengths"].unsqueeze(-1)
                out = live[:, case.L - case.L_out :]
                dy = case.dy(p.same["y"])
                expected = evaluate(p.inputs, dy, **p.options, backend=backend)
                for content in (NAN, float("inf"), 3e4):
                    x, cond, grad = p.inputs["x"].clone(), p.inputs["cond"].clone(), dy.clone()
                    x[~live], cond[~out], grad[~out] = content, content, content
                    got = evaluate(p.inputs | {"x": x, "cond": cond}, grad, **p.options, backend=backend)
                    assert_equal(got, expected, (case, content))
                for name, t, keep in [
                    ("y", expected["y"], out),
                    ("dx", expected["dx"], live),
                    ("dcond", expected["dcond"], out),
                ]:
                    assert (t[~keep] == 0).all(), (name, case)


def test_lengths_equal_mask_and_packed_rows(backend: str) -> None:
    """Three ways to say the same, and each sequence alone; packed taps do not cross a boundary."""
    for padding in ("same", "causal"):
        for dtype in FLOATS.values():
            case = Case(B=5, L=30, K=3, dilation=4, padding=padding, rows="lengths")
            p = problem(case, dtype)
            lengths, options = p.options["lengths"], {n: v for n, v in p.options.items() if n != "lengths"}
            live = torch.arange(case.L) < lengths.unsqueeze(-1)
            x, rest = p.inputs["x"], {n: t for n, t in p.inputs.items() if n != "x"}
            y = gated_conv1d(x, **rest, **options, lengths=lengths, backend=backend)
            for mask in (live, live.int(), live.to(torch.uint8)):
                assert_same(backend, gated_conv1d(x, **rest, **options, mask=mask, backend=backend), y)
            for index in (torch.int32, torch.int64):
                bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(index)
                packed = gated_conv1d(x[live], **rest, **options, cu_seqlens=bounds, backend=backend)
                assert_same(backend, packed, y[live])
                assert torch.equal(gated_conv1d(x, **rest, **options, lengths=lengths.to(index), backend=backend), y)
            for b, n in enumerate(lengths.tolist()):
                alone = gated_conv1d(x[b : b + 1, :n], **rest, **options, backend=backend)
                assert_same(backend, alone[0], y[b, :n], (padding, dtype, n))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("channels", [5, 32, 65])
@pytest.mark.parametrize("with_cond", [False, True], ids=["", "cond"])
def test_pad_length_and_neighbours_change_nothing(with_cond: bool, channels: int, dtype: str, kernels: str) -> None:
    """Acceptance 1: y and dx of a sequence, bitwise, whatever it is batched with and however far it is padded; dweight
    and dbias of the batch, bitwise, however far it is padded."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 7, 40, 64, 100, 3, 33]
    case = Case(B=7, L=1, C_in=channels, C_out=channels, cond="one" if with_cond else "none")
    inputs = case.inputs(FLOATS[dtype])
    del inputs["x"]
    cond = inputs.pop("cond", None)
    sequences = [torch.randn(n, channels, generator=generator).to(FLOATS[dtype]) for n in lengths]
    grads = [torch.randn(n, channels, generator=generator).to(FLOATS[dtype]) for n in lengths]

    def run(order: list[int], padded: int) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        x = torch.full((len(order), padded, channels), NAN, dtype=FLOATS[dtype])
        dy = torch.full_like(x, NAN)
        for row, i in enumerate(order):
            x[row, : lengths[i]], dy[row, : lengths[i]] = sequences[i], grads[i]
        n = torch.tensor([lengths[i] for i in order])
        conditions = {} if cond is None else {"cond": cond[order]}
        got = evaluate(inputs | {"x": x} | conditions, dy, lengths=n, dilation=2, backend=kernels)
        single = {i: (got["y"][r, : lengths[i]], got["dx"][r, : lengths[i]]) for r, i in enumerate(order)}
        return single, {name: t for name, t in got.items() if name not in ("y", "dx", "dcond")}

    everyone = list(range(len(lengths)))
    expected, weights = run(everyone, 100)
    for order, padded in [
        (everyone, 101),
        (everyone, 300),
        (everyone[::-1], 128),
        ([3], 64),
        ([2, 0], 57),
        ([5, 4], 700),
    ]:
        got, other = run(order, padded)
        for i, (y, dx) in got.items():
            assert torch.equal(y, expected[i][0]) and torch.equal(dx, expected[i][1]), (lengths[i], padded)
        if order == everyone:
            assert_equal(other, weights, padded)


def test_rows_that_are_all_masked(backend: str) -> None:
    """#23: zeros out and zero, finite gradients, for some rows or for all of them; non-contiguous masks too."""
    inputs = Case(cond="one").inputs(torch.float32)
    dead = torch.zeros(2, 19, dtype=torch.bool)
    for options in (
        {"mask": dead},
        {"lengths": torch.zeros(2, dtype=torch.int32)},
        {"mask": dead[:, :1].expand(2, 19)},
    ):
        for content in (NAN, 1.0):
            x = torch.full_like(inputs["x"], content)
            got = evaluate(inputs | {"x": x}, torch.full((2, 19, 5), NAN), **options, backend=backend)
            for name, t in got.items():
                assert torch.equal(t, torch.zeros_like(t)), name
    one = dead.clone()
    one[1, 7] = True
    got = evaluate(inputs, torch.ones(2, 19, 5), mask=one, backend=backend)
    assert got["y"][0].eq(0).all() and got["y"][1, 7].ne(0).all() and got["y"][1, :7].eq(0).all()
    assert all(torch.isfinite(t).all() for t in got.values())


def test_random_bits_do_not_move_with_padding(backend: str) -> None:
    """A row's bits come from its place in the padded tensor, so that a mask changes no other row's gate."""
    case = Case(B=3, L=20, K=1, gate_dropout=0.5)
    p = problem(case, torch.float32)
    live = torch.ones(3, 20, dtype=torch.bool)
    live[0, ::3] = False
    full = evaluate(p.inputs, None, **p.options, backend=backend)["y"]
    masked = evaluate(p.inputs, None, **p.options, mask=live, backend=backend)["y"]
    assert_same(backend, masked[live], full[live])

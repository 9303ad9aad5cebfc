"""attention_pool: masks, lengths, packed rows, and bags of any size. `#n` names a line of the project's failure
checklist."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pykernels import attention_pool
from tests.attention_pool_cases import PoolCase, evaluate, problem
from tests.helpers import FLOATS, assert_equal

NAN = float("nan")


def assert_same(backend: str, a: Tensor, b: Tensor, what: object = "") -> None:
    """Bitwise on the kernels."""
    eps = torch.finfo(a.dtype).eps
    assert torch.equal(a, b) if backend == "cpu" else torch.allclose(a, b, rtol=16 * eps, atol=16 * eps), what


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ["mask", "lengths"])
def test_padding_content_changes_nothing(rows: str, dtype: str, backend: str) -> None:
    """Acceptance 1, #23: NaN and inf in masked rows of x and of incoming gradients; everything stays bitwise."""
    for gated in (False, True):
        for returned in ("raw", "softmax"):
            case = PoolCase(B=4, L=40, D=9, J=2, gated=gated, rows=rows, returned=returned)
            p = problem(case, FLOATS[dtype])
            live = case.live()
            incoming = case.gradients(evaluate(p.inputs, None, **p.options))
            expected = evaluate(p.inputs, lambda _, i=incoming: i, **p.options, backend=backend)
            for content in (NAN, float("inf"), 3e4):
                x, dscores = p.inputs["x"].clone(), incoming["scores"].clone()
                x[~live] = content
                dscores.transpose(1, 2)[~live] = content
                grads = incoming | {"scores": dscores}
                got = evaluate(p.inputs | {"x": x}, lambda _, g=grads: g, **p.options, backend=backend)
                assert_equal(got, expected, (case, content))
            assert (expected["dx"][~live] == 0).all() and (expected["scores"].transpose(1, 2)[~live] == 0).all()


def test_lengths_equal_mask_and_packed_rows(backend: str) -> None:
    """Three ways to say the same, and each sequence alone."""
    for dtype in FLOATS.values():
        for length in (30, 300):
            case = PoolCase(B=5, L=length, D=9, rows="lengths", returned="raw")
            p = problem(case, dtype)
            lengths, options = p.options["lengths"], {n: v for n, v in p.options.items() if n != "lengths"}
            live = case.live()
            x, rest = p.inputs["x"], {n: t for n, t in p.inputs.items() if n != "x"}
            out, s = attention_pool(x, **rest, **options, lengths=lengths, backend=backend)
            for mask in (live, live.int(), live.to(torch.uint8)):
                masked, scores = attention_pool(x, **rest, **options, mask=mask, backend=backend)
                assert_same(backend, masked, out)
                assert_same(backend, scores, s)
            for index in (torch.int32, torch.int64):
                bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(index)
                packed, scores = attention_pool(x[live], **rest, **options, cu_seqlens=bounds, backend=backend)
                if backend == "cpu":
                    assert torch.equal(packed, out) and torch.equal(scores, s[live])
                # The reference sums packed rows in float32, padded ones as the product does.
                eps = torch.finfo(dtype).eps
                assert torch.allclose(packed, out, rtol=8 * eps, atol=8 * eps) and torch.allclose(
                    scores, s[live], atol=8 * eps
                )
            for b, n in enumerate(lengths.tolist()):
                if n:
                    alone, _ = attention_pool(x[b : b + 1, :n], **rest, **options, backend=backend)
                    assert_same(backend, alone[0], out[b], (dtype, n))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [5, 32, 65, 512])
def test_pad_length_and_neighbours_change_nothing(width: int, dtype: str, kernels: str) -> None:
    """Acceptance 1: out, scores and dx of a sequence, bitwise, whatever it is batched with and however it is padded;
    gradients of parameters of the batch, bitwise, however far it is padded."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 7, 40, 64, 200, 3, 333]
    inputs = PoolCase(D=width, H=33, J=2, gated=True).inputs(FLOATS[dtype])
    del inputs["x"]
    sequences = [torch.randn(n, width, generator=generator).to(FLOATS[dtype]) for n in lengths]
    dout = torch.randn(len(lengths), 2, width, generator=generator).to(FLOATS[dtype])

    def run(order: list[int], padded: int, front: int = 0) -> tuple[dict[int, tuple[Tensor, ...]], dict[str, Tensor]]:
        x = torch.full((len(order), front + padded, width), NAN, dtype=FLOATS[dtype])
        live = torch.zeros(len(order), front + padded, dtype=torch.bool)
        for row, i in enumerate(order):
            x[row, front : front + lengths[i]] = sequences[i]
            live[row, front : front + lengths[i]] = True
        rows = {"mask": live} if front else {"lengths": live.sum(1)}
        got = evaluate(inputs | {"x": x}, lambda _: {"out": dout[order]}, **rows, return_scores="raw", backend=kernels)
        single = {}
        for r, i in enumerate(order):
            rows_of = slice(front, front + lengths[i])
            single[i] = (got["out"][r], got["scores"][r][:, rows_of], got["dx"][r, rows_of])
        return single, {n: t for n, t in got.items() if n not in ("out", "scores", "dx")}

    everyone = list(range(len(lengths)))
    expected, weights = run(everyone, 333)
    for order, padded, front in [
        (everyone, 334, 0),
        (everyone, 600, 0),
        (everyone, 340, 21),
        (everyone[::-1], 400, 0),
        ([3], 64, 0),
        ([2, 0], 57, 0),
        ([5, 4], 700, 0),
    ]:
        got, other = run(order, padded, front)
        for i, parts in got.items():
            for a, b in zip(parts, expected[i], strict=True):
                assert torch.equal(a, b), (lengths[i], padded, front)
        if order == everyone:
            assert_equal(other, weights, (padded, front))


def test_rows_that_are_all_masked(backend: str) -> None:
    """#23: zeros out and zero, finite gradients, for some rows or for all of them; non-contiguous masks too."""
    for returned in ("raw", "softmax"):
        case = PoolCase(B=2, J=2, gated=True, returned=returned)
        inputs = case.inputs(torch.float32)
        dead = torch.zeros(2, 19, dtype=torch.bool)
        for options in (
            {"mask": dead},
            {"lengths": torch.zeros(2, dtype=torch.int32)},
            {"mask": dead[:, :1].expand(2, 19)},
        ):
            for content in (NAN, 1.0):
                x = torch.full_like(inputs["x"], content)
                nan = lambda results: {n: torch.full_like(t, NAN) for n, t in results.items()}  # noqa: E731
                incoming = nan if backend == "cpu" else case.gradients
                got = evaluate(inputs | {"x": x}, incoming, **options, return_scores=returned, backend=backend)
                for name, t in got.items():
                    assert torch.equal(t, torch.zeros_like(t)), name
        one = dead.clone()
        one[1, 7] = True
        got = evaluate(inputs, case.gradients, mask=one, return_scores=returned, backend=backend)
        assert got["out"][0].eq(0).all() and torch.allclose(got["out"][1, 0], inputs["x"][1, 7])
        assert all(torch.isfinite(t).all() for t in got.values())
        assert got["dx"][0].eq(0).all() and got["dx"][1, :7].eq(0).all()
    packed = attention_pool(torch.randn(4, 5), inputs["weight"], inputs["query"], cu_seqlens=torch.tensor([0, 0, 4, 4]))
    assert packed.shape == (3, 2, 5) and packed[::2].eq(0).all() and packed[1].ne(0).all()


# --- bags of instances ---


def eager_bag(x: Tensor, weight: Tensor, query: Tensor, gate_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gated pooling of one bag as multiple-instance learning writes it: x [1, N, D] -> [1, J, D], [1, J, N]."""
    u = torch.tanh(x @ weight.T) * torch.sigmoid(x @ gate_weight.T)
    s = (u @ query.T).transpose(1, 2)
    return torch.softmax(s, -1) @ x, s


@pytest.mark.parametrize("n", [0, 1, 1000, 100_000])
def test_bags_of_any_size(n: int, extension: object) -> None:
    """Acceptance 5: raw scores equal eager's, their softmax gives the result again, and gradients hold; two heads."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(n)
    width, hidden = 64, 32
    x = torch.randn(1, n, width, generator=generator)
    tensors = {
        "weight": torch.randn(hidden, width, generator=generator) / 8,
        "query": torch.randn(2, hidden, generator=generator),
        "gate_weight": torch.randn(hidden, width, generator=generator) / 8,
    }
    dout = torch.randn(1, 2, width, generator=generator)
    got = evaluate({"x": x, **tensors}, lambda _: {"out": dout}, return_scores="raw", backend="cpu")
    if n == 0:
        assert all(t.eq(0).all() for t in got.values()) and got["out"].shape == (1, 2, width)
        return
    truth_out, truth_s = eager_bag(x.double(), **{k: t.double() for k, t in tensors.items()})
    eager_out, eager_s = eager_bag(x, **tensors)
    for ours, eager, truth in ((got["scores"], eager_s, truth_s), (got["out"], eager_out, truth_out)):
        error, allowed = (ours - truth).abs().max(), 2 * (eager - truth).abs().max() + 1e-6
        assert error <= allowed
    again = torch.softmax(got["scores"].double(), -1) @ x.double()
    assert torch.allclose(again, got["out"].double(), rtol=0, atol=1e-6)
    reference = evaluate({"x": x, **tensors}, lambda _: {"out": dout}, return_scores="raw", backend="reference")
    for name in ("dx", "dweight", "dquery", "dgate_weight"):
        assert torch.allclose(got[name], reference[name], rtol=1e-3, atol=2e-5), name


MEMORY = """
import sys, torch
from pathlib import Path
from pykernels import attention_pool
from tests.test_attention_pool_masks import eager_bag
torch.set_num_threads(2)
n, who = 100_000, sys.argv[1]
x, query = torch.randn(1, n, 128), torch.randn(2, 128)
weight, gate_weight = torch.randn(128, 128), torch.randn(128, 128)

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

for t in (weight, gate_weight, query):
    t.requires_grad_()
before = peak()
if who == "eager":
    out, s = eager_bag(x, weight, query, gate_weight)
else:
    out, s = attention_pool(x, weight, query, gate_weight=gate_weight, return_scores="raw")
out.sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_of_a_large_bag_is_below_eager(extension: object) -> None:
    """Acceptance 5: forward and backward of 100,000 rows need less than a fifth of what eager's temporaries take."""

    def peak(who: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, who], capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    ours, eager = peak("ours"), peak("eager")
    assert ours < eager / 5, f"{ours} KiB, eager {eager} KiB"
    # No [1, N, H] tensor: it would be 50,000 KiB alone.
    assert ours < 48_000


def test_masks_skip_the_work(extension: object) -> None:
    """Only live rows are multiplied: rows that are masked may even be more than memory could hold."""
    x = torch.randn(1, 1, 64).expand(1, 2**33, 64)
    lengths = torch.tensor([1000])
    out = attention_pool(x, torch.randn(8, 64), torch.randn(8), lengths=lengths)
    assert torch.allclose(out[0], x[0, 0], rtol=1e-5) and math.prod(x.shape) == 2**39

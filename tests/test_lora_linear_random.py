"""lora_linear: dropout. `#n` names a line of the project's failure checklist."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pykernels import lora_linear, lora_linear_multi
from pykernels.random_bits import draws16, dropout_factors
from tests.helpers import FLOATS, assert_equal
from tests.lora_linear_cases import LoraCase, evaluate, problem


def factors_of(leading: tuple[int, ...], k: int, p: float, seed: int) -> Tensor:
    """What dropout multiplies x [*leading, k] with, by the definition."""
    rows = torch.Size(leading).numel()
    return dropout_factors(draws16(torch.tensor(seed), rows, k), p).view(*leading, k)


@pytest.mark.parametrize("leading", [(7,), (40,), (), (3, 5), (2, 3, 9)], ids=str)
@pytest.mark.parametrize("k", [1, 5, 8, 17, 64, 257])
def test_the_bits_are_those_of_the_definition(k: int, leading: tuple[int, ...], backend: str) -> None:
    """Element by element, in all three places: dA = dS^T d with dS = 1 is d, y = S = d A^T with A = 1 is d, and dx is
    dropout(dS A)."""
    seed, p = -77, 0.3
    expected = factors_of(leading, k, p, seed)
    rows = expected.shape[:-1].numel()
    options = {"dropout": p, "training": True, "seed": seed, "backend": backend}
    x = torch.ones(*leading, k, requires_grad=True)
    # Rank = outputs = rows, and rows of the unit matrix as dy: each row of dA is a row of d.
    a, b = torch.zeros(rows, k, requires_grad=True), torch.eye(rows)
    y = lora_linear(x, torch.zeros(rows, k), a, b, **options)
    (da,) = torch.autograd.grad(y, a, torch.eye(rows).view(*leading, rows))
    assert torch.equal(da.view(expected.shape), expected)
    # Rank = outputs = inputs, unit matrices: y is d, and its gradient is multiplied with the same factors.
    y = lora_linear(x, torch.zeros(k, k), torch.eye(k), torch.eye(k), **options)
    assert torch.equal(y, expected)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, expected)


def test_the_base_product_is_not_dropped(backend: str) -> None:
    """With B = 0, y and dx are those of the linear layer alone."""
    p = problem(LoraCase(leading=(30,)), torch.float64)
    inputs = p.inputs | {"lora_b": torch.zeros_like(p.inputs["lora_b"])}
    dropped = evaluate(inputs, p.case.dy, dropout=0.9, training=True, backend=backend)
    plain = evaluate(inputs, p.case.dy, backend=backend)
    for name in ("y", "dx", "dweight", "dbias"):
        assert torch.allclose(dropped[name], plain[name], rtol=1e-12, atol=1e-13), name


def test_an_element_is_kept_below_the_threshold_and_not_at_it(backend: str) -> None:
    """Probabilities whose threshold is one of the draws, and the next one."""
    draws, eye = draws16(torch.tensor(6), 5, 17), torch.eye(17)
    for row, column in [(0, 0), (2, 16), (4, 7)]:
        draw = int(draws[row, column])
        for threshold in (draw, draw + 1):
            p = 1 - threshold / 65536
            y = lora_linear(
                torch.ones(5, 17), torch.zeros(17, 17), eye, eye, dropout=p, training=True, seed=6, backend=backend
            )
            assert torch.equal(y == 0, draws >= threshold)
            assert y.max().item() == torch.tensor(65536 / threshold).item()


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_and_gradients(dtype: str, kernels: str) -> None:
    """By the error rule: rows and widths around bytes and vectors of bits, several adapters."""
    for k in (1, 7, 8, 9, 16, 17, 33, 100):
        for rows in (3, 64, 65):
            for p in (0.1, 0.5, 0.999):
                case = LoraCase(leading=(rows,), K=k, dropout=p, E=2 * (k % 2))
                problem(case, FLOATS[dtype]).check(
                    evaluate(case.inputs(FLOATS[dtype]), case.dy, **case.options(), backend=kernels)
                )


def test_only_in_training(backend: str) -> None:
    inputs = LoraCase().inputs(torch.float32)
    plain = evaluate(inputs, None, backend=backend)["y"]
    assert torch.equal(evaluate(inputs, None, dropout=0.5, backend=backend)["y"], plain)
    assert torch.equal(evaluate(inputs, None, dropout=0.5, seed=3, backend=backend)["y"], plain)
    assert torch.equal(evaluate(inputs, None, dropout=0.0, training=True, backend=backend)["y"], plain)
    assert torch.equal(evaluate(inputs, None, dropout=0, training=True, backend=backend)["y"], plain)
    assert not torch.equal(evaluate(inputs, None, dropout=0.5, training=True, backend=backend)["y"], plain)


def test_mean_is_kept(backend: str) -> None:
    """The mean of d is that of x: the scale is the inverse of the exact probability of being kept."""
    x, eye = torch.ones(4, 500, 64), torch.eye(64)
    for p in (0.25, 0.1):
        d = lora_linear(x, torch.zeros(64, 64), eye, eye, dropout=p, training=True, seed=1, backend=backend).double()
        assert d.mean().item() == pytest.approx(1.0, abs=5 * (p / (1 - p) / d.numel()) ** 0.5)
        threshold = round((1 - p) * 65536)
        assert set(d.unique().tolist()) == {0.0, torch.tensor(65536 / threshold).item()}


def test_seeds(backend: str) -> None:
    """None draws from the default generator and torch.manual_seed governs it; equal seeds, given as int or tensor and
    as signed or unsigned 64 bits, give equal bits; a draw is made only where it is needed."""
    inputs = LoraCase().inputs(torch.float32)

    def run(**options: object) -> Tensor:
        return lora_linear(**inputs, dropout=0.5, **{"training": True, "backend": backend, **options})

    torch.manual_seed(3)
    a, b = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), a) and torch.equal(run(), b) and not torch.equal(a, b)
    assert torch.equal(run(seed=9), run(seed=torch.tensor(9))) and not torch.equal(run(seed=9), run(seed=10))
    assert torch.equal(run(seed=-1), run(seed=2**64 - 1)) and not torch.equal(run(seed=0), run(seed=2**32))
    state = torch.get_rng_state()
    run(seed=1), run(training=False), lora_linear(**inputs, training=True, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


def test_backends_and_tiers_agree_under_manual_seed(kernels: str) -> None:
    case = LoraCase(leading=(30,), K=33)
    inputs, results = case.inputs(torch.float64), []
    for name in (kernels, "reference"):
        torch.manual_seed(8)
        results.append(evaluate(inputs, case.dy, dropout=0.5, training=True, backend=name))
    for key in results[0]:
        assert torch.allclose(results[0][key], results[1][key], rtol=1e-10, atol=1e-12), key


def test_bits_do_not_depend_on_threads(kernels: str) -> None:
    p = problem(LoraCase(leading=(300,), K=77, dropout=0.3), torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(p.inputs, p.case.dy, **p.options, backend=kernels))
    for result in results[1:]:
        assert_equal(results[0], result)


def test_several_adapters_have_the_bits_of_one(kernels: str) -> None:
    """Bits depend on the row in the batch, not on its adapter; equal adapters give what one gives."""
    p = problem(LoraCase(leading=(40,), K=33, dropout=0.4), torch.float32)
    one = evaluate(p.inputs, None, **p.options, backend=kernels)["y"]
    inputs = p.inputs | {name: torch.stack([p.inputs[name]] * 3) for name in ("lora_a", "lora_b")}
    index = torch.arange(40) % 3
    assert torch.equal(lora_linear_multi(**inputs, adapter_index=index, **p.options, backend=kernels), one)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_bits(reentrant: bool, backend: str) -> None:
    """#15: checkpointed layers give the outputs and gradients of the plain ones, their dropout included."""
    p = problem(LoraCase(leading=(2, 10), K=8, N=8), torch.float32)
    options = {"dropout": 0.5, "training": True, "backend": backend}
    results = []
    for use in (False, True):
        torch.manual_seed(5)
        leaves = {name: t.clone().requires_grad_() for name, t in p.inputs.items()}
        layer = partial(lora_linear, **{name: t for name, t in leaves.items() if name != "x"}, **options)
        h = leaves["x"]
        for _ in range(3):
            h = checkpoint(layer, h, use_reentrant=reentrant) if use else layer(h)
        h.square().sum().backward()
        results.append([h, *(t.grad for t in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""gated_conv1d: dropout and noise of the gate. `#n` names a line of the project's failure checklist."""

import pytest
import torch
from torch import Tensor

from pykernels import GatedConv1d, gated_conv1d
from pykernels.random_bits import draws16, dropout_factors, uniform_noise
from tests.gated_conv_cases import Case, check_case, evaluate
from tests.helpers import FLOATS


def logits_case(channels: int, rows: tuple[int, ...], z: float) -> tuple[Tensor, Tensor, Tensor]:
    """x of zeros and a bias, so that value = 1 and the gate's logits = z everywhere: y = sigmoid(z * factor)."""
    x = torch.zeros(*rows, channels)
    weight = torch.zeros(2 * channels, channels, 1)
    bias = torch.cat([torch.ones(channels), torch.full((channels,), z)])
    return x, weight, bias


@pytest.mark.parametrize("channels", [1, 5, 8, 17, 64])
@pytest.mark.parametrize("kind", ["gate_dropout", "gate_noise"])
def test_the_bits_are_those_of_the_definition(kind: str, channels: int, backend: str) -> None:
    """Row = flattened output row, column = channel, for batches and for packed rows."""
    seed = -77
    for rows in [(3, 11), (40,)]:
        x, weight, bias = logits_case(channels, rows, 2.0)
        bounds = {"cu_seqlens": torch.tensor([0, 13, 40])} if len(rows) == 1 else {}
        draws = draws16(torch.tensor(seed), x.shape[:-1].numel(), channels).view(x.shape)
        factors = dropout_factors(draws, 0.3) if kind == "gate_dropout" else 1 + uniform_noise(draws, 0.3)
        y = gated_conv1d(x, weight, bias, **{kind: 0.3}, **bounds, training=True, seed=seed, backend=backend)
        assert torch.allclose(y, torch.sigmoid(2.0 * factors), rtol=0, atol=1e-6)


def test_an_element_is_kept_below_the_threshold_and_not_at_it(backend: str) -> None:
    """Probabilities whose threshold is one of the draws, and the next one."""
    x, weight, bias = logits_case(17, (5,), 2.0)
    draws = draws16(torch.tensor(6), 5, 17)
    options = {"cu_seqlens": torch.tensor([0, 5]), "training": True, "seed": 6, "backend": backend}
    for row, column in [(0, 0), (2, 16), (4, 7)]:
        draw = int(draws[row, column])
        for threshold in (draw, draw + 1):
            y = gated_conv1d(x, weight, bias, gate_dropout=1 - threshold / 65536, **options)
            assert (y[row, column].item() == 0.5) == (threshold == draw)
            assert torch.equal(y == 0.5, draws >= threshold)


def test_valid_padding_counts_output_rows(backend: str) -> None:
    x, _, bias = logits_case(8, (2, 9), 1.0)
    y = gated_conv1d(
        x,
        torch.zeros(16, 8, 3),
        bias,
        dilation=2,
        padding="valid",
        gate_dropout=0.5,
        training=True,
        seed=4,
        backend=backend,
    )
    factors = dropout_factors(draws16(torch.tensor(4), 10, 8).view(2, 5, 8), 0.5)
    assert torch.allclose(y, torch.sigmoid(factors), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["gate_dropout", "gate_noise"])
def test_values_and_gradients(kind: str, dtype: str, kernels: str) -> None:
    for channels, rows, padding in [
        (5, "all", "same"),
        (17, "lengths", "causal"),
        (33, "packed", "same"),
        (8, "mask", "valid"),
    ]:
        for residual, value_act in [("highway", "identity"), ("none", "tanh")]:
            case = Case(
                B=3, L=21, C_in=channels, C_out=channels, rows=rows, padding=padding, residual=residual,
                value_act=value_act, cond="one", **{kind: 0.4},
            )  # fmt: skip
            check_case(case, FLOATS[dtype], kernels)


def test_only_in_training(backend: str) -> None:
    inputs = Case().inputs(torch.float32)
    plain = evaluate(inputs, None, backend=backend)["y"]
    for kind in ("gate_dropout", "gate_noise"):
        assert torch.equal(evaluate(inputs, None, **{kind: 0.5}, backend=backend)["y"], plain)
        assert not torch.equal(evaluate(inputs, None, **{kind: 0.5}, training=True, backend=backend)["y"], plain)
        module = GatedConv1d(5, 5, 3, **{kind: 0.5}, backend=backend)
        assert not torch.equal(module(inputs["x"]), module(inputs["x"]))
        module.eval()
        assert torch.equal(module(inputs["x"]), module(inputs["x"]))


def test_mean_is_kept(backend: str) -> None:
    """The logits' mean is that without dropout: their scale is the inverse of the exact probability of being kept."""
    x, weight, bias = logits_case(64, (4, 500), 1.0)
    y = gated_conv1d(x, weight, bias, gate_dropout=0.25, training=True, seed=1, backend=backend)
    logits = torch.logit(y.double())
    assert logits.mean().item() == pytest.approx(1.0, abs=5 * (1 / 3 / logits.numel()) ** 0.5)
    assert set(logits.mul(3).round().unique().tolist()) == {0.0, 4.0}


def test_seeds(backend: str) -> None:
    """None draws from the default generator and torch.manual_seed governs it; equal seeds, given as int or tensor and
    as signed or unsigned 64 bits, give equal bits; a draw is made only where it is needed."""
    inputs = Case(C_in=8, C_out=8).inputs(torch.float32)

    def run(**options: object) -> Tensor:
        return gated_conv1d(**inputs, gate_dropout=0.5, **{"training": True, "backend": backend, **options})

    torch.manual_seed(3)
    a, b = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), a) and torch.equal(run(), b) and not torch.equal(a, b)
    assert torch.equal(run(seed=9), run(seed=torch.tensor(9))) and not torch.equal(run(seed=9), run(seed=10))
    assert torch.equal(run(seed=-1), run(seed=2**64 - 1)) and not torch.equal(run(seed=0), run(seed=2**32))
    state = torch.get_rng_state()
    run(seed=1), run(training=False), gated_conv1d(**inputs, training=True, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


def test_backends_agree_under_manual_seed(kernels: str) -> None:
    inputs = Case().inputs(torch.float64)
    results = []
    for name in (kernels, "reference"):
        torch.manual_seed(8)
        results.append(evaluate(inputs, Case().dy, gate_dropout=0.5, training=True, backend=name))
    for key in results[0]:
        assert torch.allclose(results[0][key], results[1][key], rtol=1e-10, atol=1e-12), key

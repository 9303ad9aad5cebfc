"""gated_conv1d_step: chunks of a causal sequence. `#n` names a line of the project's failure checklist."""

import pytest
import torch
from torch import Tensor

from pykernels import gated_conv1d, gated_conv1d_step
from tests.helpers import FLOATS, Case


def stream(x: Tensor, chunks: list[int], weights: dict[str, Tensor], cond: Tensor | None = None, **options) -> Tensor:
    state, outputs, at = None, [], 0
    for n in chunks:
        part = cond if cond is None or cond.shape[1] == 1 else cond[:, at : at + n]
        y, state = gated_conv1d_step(x[:, at : at + n], state, **weights, cond=part, **options)
        outputs.append(y)
        at += n
    assert at == x.shape[1]
    return torch.cat(outputs, 1)


def chunks_of(length: int, seed: int) -> list[int]:
    """Random sizes, an empty one and single rows among them."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [0, 1]
    while sum(chunks) < length:
        chunks.append(min(length - sum(chunks), int(torch.randint(0, 20, (), generator=generator))))
    return chunks


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cond", ["none", "one", "all"])
def test_chunks_equal_the_whole_pass(cond: str, dtype: str, kernels: str) -> None:
    """Acceptance 4: chunks of random size give the bits of the whole causal pass."""
    for residual, value_act in [("highway", "identity"), ("add", "tanh"), ("none", "tanh")]:
        for channels, k, dilation in [(5, 3, 2), (24, 2, 64), (17, 1, 3), (33, 4, 1)]:
            case = Case(
                L=90, C_in=channels, C_out=channels, K=k, dilation=dilation, padding="causal", cond=cond,
                residual=residual, value_act=value_act,
            )  # fmt: skip
            inputs, options = case.inputs(FLOATS[dtype]), case.options()
            whole = gated_conv1d(**inputs, **options, backend=kernels)
            x, c = inputs.pop("x"), inputs.pop("cond", None)
            del options["padding"]
            for seed in range(2):
                got = stream(x, chunks_of(90, seed), inputs, c, **options, backend=kernels)
                assert torch.equal(got, whole), (case, seed)


def test_reference_streams_too() -> None:
    case = Case(L=40, padding="causal")
    inputs = case.inputs(torch.float64)
    whole = gated_conv1d(**inputs, padding="causal", dilation=2, backend="reference")
    x = inputs.pop("x")
    got = stream(x, chunks_of(40, 1), inputs, dilation=2, backend="reference")
    assert torch.allclose(got, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_single_rows_of_many_series(dtype: str, kernels: str) -> None:
    """Acceptance 4: T = 1, B = 3,200, C = 24, k = 2, d = 64, with two weights, as time series models sample."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3200, 70, 24, generator=generator).to(FLOATS[dtype])
    weights = {
        name: torch.randn(24, 24, 2, generator=generator).mul(0.15).to(FLOATS[dtype])
        for name in ("weight", "gate_weight")
    }
    options = {"dilation": 64, "residual": "none", "value_act": "tanh"}
    whole = gated_conv1d(x, **weights, **options, padding="causal", backend=kernels)
    state = torch.cat([torch.zeros(3200, 62, 24, dtype=x.dtype), x[:, :2]], 1)
    for t in range(2, 70, 17):
        window = torch.cat([torch.zeros(3200, 64, 24, dtype=x.dtype), x[:, :t]], 1)[:, -64:]
        y, state = gated_conv1d_step(x[:, t : t + 1], window, **weights, **options, backend=kernels)
        assert torch.equal(y[:, 0], whole[:, t]), t
        assert torch.equal(state, torch.cat([window, x[:, t : t + 1]], 1)[:, 1:])


def test_state(backend: str) -> None:
    """The state is the last dilation * (K - 1) rows; none are kept for K = 1; the given one is not written."""
    x, weight = torch.randn(2, 3, 4), torch.randn(8, 4, 3)
    before = torch.randn(2, 10, 4)
    kept = before.clone()
    _, state = gated_conv1d_step(x, before, weight, dilation=5, backend=backend)
    assert torch.equal(state, torch.cat([before, x], 1)[:, -10:]) and torch.equal(before, kept)
    y, state = gated_conv1d_step(x, None, torch.randn(8, 4, 1), backend=backend)
    assert y.shape == (2, 3, 4) and state.shape == (2, 0, 4)
    y, state = gated_conv1d_step(x[:, :0], before, weight, dilation=5, backend=backend)
    assert y.shape == (2, 0, 4) and torch.equal(state, before)


def test_gradients_through_steps(backend: str) -> None:
    """Truncated or not: gradients flow through the state."""
    case = Case(L=12, padding="causal")
    leaves = {n: t.requires_grad_() for n, t in case.inputs(torch.float64).items()}
    options = {"dilation": 2, "backend": backend}
    whole = torch.autograd.grad(
        gated_conv1d(**leaves, **options, padding="causal").square().sum(), list(leaves.values())
    )
    weights = {n: t for n, t in leaves.items() if n != "x"}
    streamed = stream(leaves["x"], [5, 1, 6], weights, **options)
    for a, b in zip(torch.autograd.grad(streamed.square().sum(), list(leaves.values())), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_errors(backend: str) -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(8, 4, 3)
    for arguments, error, name in [
        ((x, torch.zeros(2, 3, 4), weight), ValueError, "state"),
        ((x, torch.zeros(2, 2, 4, dtype=torch.float64), weight), TypeError, "state"),
        ((x, [0.0], weight), TypeError, "state"),
        ((x[0], None, weight), ValueError, "x"),
        ((x, None, weight[0]), ValueError, "weight"),
        ((3, None, weight), TypeError, "x"),
    ]:
        with pytest.raises(error, match=f"^{name}:"):
            gated_conv1d_step(*arguments, backend=backend)
    with pytest.raises(ValueError, match="^dilation"):
        gated_conv1d_step(x, None, weight, dilation=0, backend=backend)

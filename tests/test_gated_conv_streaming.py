"""gated_conv1d_step: chunks of a causal sequence. `#n` names a line of the project's failure checklist."""

import copy

import pytest
import torch
from torch import Tensor

from pykernels import gated_conv1d, gated_conv1d_step
from tests.gated_conv_cases import Case
from tests.helpers import FLOATS


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


def test_a_state_is_kept_while_others_append_to_it(backend: str) -> None:
    """Steps that do not copy the state: two continuations of one state, each kept state used again later."""
    case = Case(L=64, C_in=3, C_out=3, padding="causal")
    inputs, options = case.inputs(torch.float32), {"dilation": 5, "backend": backend}
    x = inputs.pop("x")
    other = x.flip(1)
    states, copies = [None], []
    for t in range(40):
        states.append(gated_conv1d_step(x[:, t : t + 1], states[-1], **inputs, **options)[1])
        copies.append(states[-1].clone())
    assert len({s.untyped_storage().data_ptr() for s in states[1:]}) <= 5, "a copy in every 10th step, S = 10"
    for t in (3, 11, 39, 20, 3):
        whole = gated_conv1d(torch.cat([x[:, : t + 1], other], 1), **inputs, **options, padding="causal")
        y, following = gated_conv1d_step(other[:, :7], states[t + 1], **inputs, **options)
        again, _ = gated_conv1d_step(other[:, 7:], following, **inputs, **options)
        got = torch.cat([y, again], 1)
        if backend == "reference":
            assert torch.allclose(got, whole[:, t + 1 :], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got, whole[:, t + 1 :])
    assert all(torch.equal(s, c) for s, c in zip(states[1:], copies, strict=True))


def test_states_cross_modes(backend: str) -> None:
    """A state made in inference mode continues outside it, and one that autograd has saved may be appended to."""
    x, weight, before = torch.randn(2, 9, 4), torch.randn(8, 4, 3), torch.randn(2, 10, 4)
    with torch.inference_mode():
        _, state = gated_conv1d_step(x[:, :3], before, weight, dilation=5, backend=backend)
    with torch.no_grad():
        _, state = gated_conv1d_step(x[:, 3:6], state, weight, dilation=5, backend=backend)
    factor = torch.ones(4, requires_grad=True)
    product = (state * factor).sum()
    with torch.no_grad():
        _, last = gated_conv1d_step(x[:, 6:], state, weight, dilation=5, backend=backend)
    assert torch.equal(last, torch.cat([before, x], 1)[:, -10:])
    (gradient,) = torch.autograd.grad(product, factor)
    assert torch.allclose(gradient, state.sum((0, 1)))
    copied = copy.deepcopy(last)
    _, after = gated_conv1d_step(x[:, :1], copied, weight, dilation=5, backend=backend)
    assert torch.equal(after, torch.cat([before, x, x[:, :1]], 1)[:, -10:])


def test_step_compiles_whole() -> None:
    x, weight, before = torch.randn(2, 3, 4), torch.randn(8, 4, 3), torch.randn(2, 10, 4)
    compiled = torch.compile(gated_conv1d_step, fullgraph=True, backend="aot_eager")
    state = expected_state = before
    for _ in range(3):
        y, state = compiled(x, state, weight, dilation=5)
        expected, expected_state = gated_conv1d_step(x, expected_state, weight, dilation=5)
        assert torch.equal(y, expected) and torch.equal(state, expected_state)


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

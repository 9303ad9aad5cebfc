"""gated_conv1d: equal bits over runs and threads, backward twice, checkpointing, flat memory. `#n` names a line of the
project's failure checklist."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pykernels import GatedConv1d, gated_conv1d
from tests.gated_conv_cases import Case, evaluate, problem
from tests.helpers import (
    FLOATS,
    assert_equal_from_several_threads,
    assert_equal_over_runs_and_threads,
    assert_memory_stays_flat,
)

# Enough rows for several blocks, and sums over rows that any change of their order would alter.
CASES = [
    Case(B=1, L=700, C_in=33, C_out=33, cond="one"),
    Case(B=9, L=61, C_in=24, C_out=24, rows="lengths", cond="one", padding="causal"),
    Case(B=40, L=30, C_in=17, C_out=17, rows="packed", cond="all", gate_dropout=0.2),
    Case(B=6, L=150, C_in=40, C_out=64, rows="mask", residual="none", value_act="tanh", two_weights=True),
    Case(B=3, L=200, C_in=130, C_out=130, padding="valid", residual="add", gate_noise=0.3),
    Case(B=300, L=1, C_in=24, C_out=24, K=2, dilation=64),
    Case(B=1, L=5, C_in=260, C_out=260, K=1),
    # Weights that one thread packs in several groups: its rows are prepared before, those of several threads by each.
    Case(B=2, L=40, C_in=300, C_out=300, K=7, rows="mask", cond="one", gate_dropout=0.1),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_twenty_runs_and_all_numbers_of_threads_are_equal(index: int, dtype: str, kernels: str) -> None:
    """#14, #27, acceptance 11: outputs and gradients bit for bit."""
    p = problem(CASES[index], FLOATS[dtype])
    p.check(evaluate(p.inputs, p.case.dy, **p.options, backend=kernels))
    assert_equal_over_runs_and_threads(
        lambda: evaluate(p.inputs, p.case.dy, **p.options, backend=kernels),
        lambda: evaluate(p.inputs, None, **p.options, backend=kernels),
        runs=20 if index < 3 and dtype in ("fp32", "bf16") else 2,
    )


def test_calls_from_several_threads_at_once(kernels: str) -> None:
    """#27: a server calls from its own threads."""
    problems = [problem(case, torch.float32) for case in CASES]
    assert_equal_from_several_threads(
        [partial(evaluate, p.inputs, p.case.dy, **p.options, backend=kernels) for p in problems]
    )


def test_backward_twice(kernels: str) -> None:
    """#15: nothing that backward needs is overwritten by it."""
    for case in (CASES[2], CASES[3]):
        p = problem(case, torch.float32)
        leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
        y = gated_conv1d(**leaves, **p.options, backend=kernels)
        first = torch.autograd.grad(y, list(leaves.values()), case.dy(y), retain_graph=True)
        second = torch.autograd.grad(y, list(leaves.values()), case.dy(y))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changed_inputs_are_noticed(kernels: str) -> None:
    """#15: an input that was written between forward and backward raises instead of giving wrong gradients."""
    p = problem(Case(), torch.float32)
    leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
    y = gated_conv1d(**leaves, **p.options, backend=kernels)
    with torch.no_grad():
        leaves["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_random_bits(reentrant: bool, backend: str) -> None:
    """#15: a checkpointed stack gives the outputs and gradients of the plain one, its dropout included."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(GatedConv1d(8, 8, 3, gate_dropout=0.5, backend=backend) for _ in range(3))
    x = torch.randn(2, 20, 8)
    results = []
    for use in (False, True):
        torch.manual_seed(5)
        leaf, h = x.clone().requires_grad_(), None
        layers.zero_grad()
        h = leaf
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=reentrant) if use else layer(h)
        h.square().sum().backward()
        results.append([h, leaf.grad, *(p.grad.clone() for p in layers.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inference_mode(backend: str) -> None:
    p = problem(Case(rows="lengths"), torch.float32)
    with torch.inference_mode():
        y = gated_conv1d(**p.inputs, **p.options, backend=backend)
    assert y.is_inference() and torch.equal(y, evaluate(p.inputs, None, **p.options, backend=backend)["y"])


def test_memory_stays_flat_over_lengths(extension: object) -> None:
    """#28, acceptance 9."""
    assert_memory_stays_flat(GatedConv1d(32, 32, 3), batch=1)


def test_weights_are_read_at_every_call(kernels: str) -> None:
    """Acceptance 9: no cache of packed weights, so changes that no version counter shows are seen."""
    module = GatedConv1d(8, 8, 3, backend=kernels).eval()
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        before = module(x)
        module.weight.data = module.weight.data.flip(0).contiguous()
        changed = module(x)
        assert not torch.equal(before, changed)
        module.weight.data.mul_(0)
        module.bias.data.mul_(0)
        assert torch.equal(module(x), x * 0.5)

"""attention_pool: equal bits over runs and threads, backward twice, checkpointing, flat memory. `#n` names a line of
the project's failure checklist."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pykernels import AttentionPool, attention_pool
from tests.attention_pool_cases import PoolCase, evaluate, problem
from tests.helpers import (
    FLOATS,
    assert_equal,
    assert_equal_from_several_threads,
    assert_equal_over_runs_and_threads,
    assert_memory_stays_flat,
)

# Enough rows for several chunks and units of work, and sums over rows that any change of their order would alter.
CASES = [
    PoolCase(B=1, L=1700, D=33, H=33, returned="raw"),
    PoolCase(B=9, L=161, D=24, H=24, rows="lengths", gated=True, returned="softmax"),
    PoolCase(B=40, L=30, D=17, H=17, rows="packed", J=3),
    PoolCase(B=6, L=350, D=40, H=64, rows="mask", activation="gelu", J=2, gated=True),
    PoolCase(B=300, L=1, D=24, H=24),
    PoolCase(B=2, L=200, D=520, H=40, activation="swish", rows="lengths"),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_twenty_runs_and_all_numbers_of_threads_are_equal(index: int, dtype: str, kernels: str) -> None:
    """#14, #27, acceptance 11: outputs, scores and gradients bit for bit."""
    p = problem(CASES[index], FLOATS[dtype])
    p.check(evaluate(p.inputs, p.case.gradients, **p.options, backend=kernels))
    assert_equal_over_runs_and_threads(
        lambda: evaluate(p.inputs, p.case.gradients, **p.options, backend=kernels),
        lambda: evaluate(p.inputs, None, **p.options, backend=kernels),
        runs=20 if index < 3 and dtype in ("fp32", "bf16") else 2,
    )


def test_waves_of_rows_do_not_depend_on_threads(extension: object) -> None:
    """#14: more rows than backward holds dh of at a time, in three waves of unequal size."""
    case = PoolCase(B=1, L=90_000, D=8, H=160)
    p = problem(case, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(p.inputs, case.gradients, **p.options, backend="cpu"))
    for result in results[1:]:
        assert_equal(results[0], result)
    p.check(results[0])


def test_calls_from_several_threads_at_once(kernels: str) -> None:
    """#27: a server calls from its own threads."""
    problems = [problem(case, torch.float32) for case in CASES]
    assert_equal_from_several_threads(
        [partial(evaluate, p.inputs, p.case.gradients, **p.options, backend=kernels) for p in problems]
    )


def test_backward_twice(kernels: str) -> None:
    """#15: nothing that backward needs is overwritten by it."""
    for case in (CASES[1], CASES[2]):
        p = problem(case, torch.float32)
        leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
        got = attention_pool(**leaves, **p.options, backend=kernels)
        results = {"out": got} if isinstance(got, torch.Tensor) else dict(zip(("out", "scores"), got, strict=True))
        incoming = case.gradients(results)
        arguments = (list(results.values()), list(leaves.values()), [incoming[n] for n in results])
        first = torch.autograd.grad(*arguments, retain_graph=True)
        second = torch.autograd.grad(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("changed", ["weight", "scores"])
def test_changed_tensors_are_noticed(changed: str, kernels: str) -> None:
    """#15: an input or a saved score that is written between forward and backward raises: no wrong gradients."""
    p = problem(PoolCase(returned="raw"), torch.float32)
    leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
    out, scores = attention_pool(**leaves, **p.options, backend=kernels)
    with torch.no_grad():
        (leaves["weight"] if changed == "weight" else scores).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    """#15: a checkpointed module gives the outputs and gradients of the plain one."""
    torch.manual_seed(0)
    pool = AttentionPool(8, 16, 2, bias=True, gated=True, backend=backend)
    x, results = torch.randn(3, 20, 8), []
    for use in (False, True):
        leaf = x.clone().requires_grad_()
        pool.zero_grad()
        out = checkpoint(pool, leaf, use_reentrant=reentrant) if use else pool(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad.clone() for p in pool.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inference_mode(backend: str) -> None:
    p = problem(PoolCase(rows="lengths"), torch.float32)
    with torch.inference_mode():
        out = attention_pool(**p.inputs, **p.options, backend=backend)
    assert out.is_inference() and torch.equal(out, evaluate(p.inputs, None, **p.options, backend=backend)["out"])


def test_memory_stays_flat_over_lengths(extension: object) -> None:
    """#28, acceptance 9."""
    assert_memory_stays_flat(AttentionPool(32, 32), batch=2)

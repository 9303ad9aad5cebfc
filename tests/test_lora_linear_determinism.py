"""lora_linear: equal bits over runs and threads, backward twice, flat memory. `#n` names a line of the project's
failure checklist."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pykernels import lora_linear
from tests.helpers import (
    FLOATS,
    assert_equal,
    assert_equal_from_several_threads,
    assert_equal_over_runs_and_threads,
    assert_memory_stays_flat,
)
from tests.lora_linear_cases import LoraCase, call_of, evaluate, problem

# Enough rows for several units and partial sums that any change of their order would alter; products by rows, by
# columns and of few rows, which threads share in different ways.
CASES = [
    LoraCase(leading=(600,), K=40, N=33, R=8, dropout=0.1),
    LoraCase(leading=(9, 61), K=33, N=130, R=5, E=3, scales=True),
    LoraCase(leading=(5,), K=300, N=700, R=4, float_adapters=True, transposed=True),
    LoraCase(leading=(1100,), K=520, N=24, R=3, float_adapters=True),
    LoraCase(leading=(1,), K=600, N=200, R=16, dropout=0.5),
    LoraCase(leading=(70,), K=1024, N=700, R=2, transposed=True),
    LoraCase(leading=(1200,), K=24, N=24, R=20, E=2),
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
    for case in CASES[:3]:
        p = problem(case, torch.float32)
        leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
        y = call_of(p.options)(**leaves, **p.options, backend=kernels)
        first = torch.autograd.grad(y, list(leaves.values()), case.dy(y), retain_graph=True)
        second = torch.autograd.grad(y, list(leaves.values()), case.dy(y))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("changed", ["x", "weight", "lora_a", "lora_b", "adapter_index", "scale"])
def test_changed_inputs_are_noticed(changed: str, kernels: str) -> None:
    """#15: an input that was written between forward and backward raises instead of giving wrong gradients."""
    p = problem(LoraCase(E=2, scales=True), torch.float32)
    leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
    options = {n: t.clone() for n, t in p.options.items()}
    y = call_of(options)(**leaves, **options, backend=kernels)
    with torch.no_grad():
        (leaves | options)[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode(backend: str) -> None:
    for case in (LoraCase(dropout=0.2), LoraCase(E=2)):
        p = problem(case, torch.float32)
        with torch.inference_mode():
            y = call_of(p.options)(**p.inputs, **p.options, backend=backend)
        assert y.is_inference() and torch.equal(y, evaluate(p.inputs, None, **p.options, backend=backend)["y"])


def test_weights_and_adapters_are_read_at_every_call(kernels: str) -> None:
    """Acceptance 9: no cache, so changes that no version counter shows are seen."""
    inputs = {name: nn.Parameter(t) for name, t in LoraCase(leading=(40,)).inputs(torch.float32).items()}
    for name in inputs:
        before = lora_linear(**inputs, backend=kernels)
        inputs[name].data = inputs[name].data.flip(0).contiguous()
        assert not torch.equal(lora_linear(**inputs, backend=kernels), before), name
    for name in ("x", "bias"):
        inputs[name].data.mul_(0)
    assert lora_linear(**inputs, backend=kernels).eq(0).all()


class Layer(nn.Module):
    """32 inputs, 32 outputs, rank 4, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(32))
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(
            x, self.weight, self.lora_a, self.lora_b, bias=self.bias, dropout=0.1, training=self.training
        )


def test_memory_stays_flat_over_lengths(extension: object) -> None:
    """#28, acceptance 9."""
    assert_memory_stays_flat(Layer(), batch=2)


def test_equal_rows_of_a_batch_give_equal_rows(kernels: str) -> None:
    """A row's y and dx do not depend on where it is, nor on how many rows share the product's path with it."""
    p = problem(LoraCase(leading=(40,), K=65, N=47), torch.float32)
    dy = p.case.dy(p.same["y"])
    alone = evaluate(p.inputs, dy, **p.options, backend=kernels)
    inputs = p.inputs | {"x": p.inputs["x"].repeat(30, 1)}
    repeated = evaluate(inputs, dy.repeat(30, 1), **p.options, backend=kernels)
    for name in ("y", "dx"):
        assert_equal({name: repeated[name]}, {name: alone[name].repeat(30, 1)})

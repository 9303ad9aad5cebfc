"""Runs an operator's CUDA kernels, built for ThreadSanitizer by tests/emulated_cuda, on tensors of a few rows.

python -m tests.cuda_races OPERATOR LAUNCHERS GLUE, started with the sanitizer's library by test_cuda_races.py, which
builds both files: compilers are slow under a sanitizer.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

import pykernels
from tests import ptx_on_cpu
from tests.emulated_cuda import namespace_of

DTYPES = ("float32", "tf32", "bfloat16", "float16")
# Of each operator: the attributes that call raw operators, by module.
CALLS = {
    "gated_conv": {"gated_conv": {"_fwd": "_gated_conv_fwd", "_bwd": "_gated_conv_bwd"}},
    "attention_pool": {"attention_pool": {"_fwd": "_attention_pool_fwd", "_bwd": "_attention_pool_bwd"}},
    "lora_linear": {
        "lora_linear": {"_fwd": "_lora_linear_fwd", "_bwd": "_lora_linear_bwd"},
        "lora_linear_stacked": {"_fwd": "_lora_linear_stacked_fwd", "_bwd": "_lora_linear_stacked_bwd"},
    },
    "child_update": {"child_update": {name: f"_child{name}" for name in ("_adamw_", "_sgd_", "_square_sum")}},
}
Normal = Callable[..., torch.Tensor]


def _differentiate(out: torch.Tensor, *leaves: torch.Tensor) -> None:
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def gated_conv(normal: Normal) -> None:
    """A mask, a row of cond for each sequence, random bits."""
    x, weight, bias, cond = normal(2, 20, 40), normal(80, 40, 2), normal(80), normal(2, 1, 80)
    mask = torch.arange(20) < torch.tensor([[20], [10]])
    y = pykernels.gated_conv1d(
        x, weight, bias, cond=cond, mask=mask, gate_dropout=0.2, training=True, seed=1, backend="cpu"
    )
    _differentiate(y, x, weight, bias, cond)


def attention_pool(normal: Normal) -> None:
    """Gated, with several heads and scores, of padded rows, with and without recomputation; and of packed rows."""
    x, weight, query, bias = normal(2, 20, 40), normal(24, 40), normal(3, 24), normal(24)
    gate_weight, gate_bias = normal(24, 40), normal(24)
    for recompute in (True, False):
        out, scores = pykernels.attention_pool(
            x, weight, query, bias=bias, gate_weight=gate_weight, gate_bias=gate_bias, lengths=torch.tensor([20, 7]),
            return_scores="softmax", recompute=recompute, backend="cpu",
        )  # fmt: skip
        leaves = (x, weight, query, bias, gate_weight, gate_bias)
        torch.autograd.grad((out, scores), leaves, (torch.ones_like(out), torch.ones_like(scores)))
    bounds = torch.tensor([0, 150, 160], dtype=torch.int32)
    rows = normal(160, 40)
    _differentiate(pykernels.attention_pool(rows, weight, query[0], cu_seqlens=bounds, backend="cpu"), rows, weight)


def lora_linear(normal: Normal) -> None:
    """Dropout and adapters of float32; several adapters; stacked weights; few rows."""
    x, weight, bias = normal(40, 72), normal(80, 72), normal(80)
    a, b = normal(4, 72).float().detach().requires_grad_(), normal(80, 4).float().detach().requires_grad_()
    y = pykernels.lora_linear(x, weight, a, b, bias=bias, dropout=0.2, training=True, seed=1, backend="cpu")
    _differentiate(y, x, weight, a, b, bias)
    adapters, index = (normal(3, 4, 72), normal(3, 80, 4)), torch.arange(40) % 4 - 1
    _differentiate(pykernels.lora_linear_multi(x, weight, *adapters, adapter_index=index, backend="cpu"), x, *adapters)
    pairs = [(normal(n, 72), normal(4, 72), normal(n, 4)) for n in (24, 40)]
    stacked = pykernels.lora_linear_stacked(x, *(list(part) for part in zip(*pairs, strict=True)), backend="cpu")
    _differentiate(torch.cat(list(stacked), -1), x, *(t for pair in pairs for t in pair))
    with torch.no_grad():
        pykernels.lora_linear(x[:3], weight, normal(4, 72), normal(80, 4), backend="cpu")


def child_update(normal: Normal) -> None:
    """Both optimizers, drawn and stored masks with compact moments, several tensors, the norm of the gradients."""
    for make in (pykernels.ChildTuningAdamW, pykernels.ChildTuningSGD):
        for mode in ("F", "D"):
            parameters = {f"p{i}": normal(*size) for i, size in enumerate([(3000,), (7, 11), (1,)])}
            masks = {name: torch.arange(p.numel()).view_as(p) % 3 == 0 for name, p in parameters.items()}
            options = {"masks": masks} if mode == "D" else {}
            optimizer = make(parameters.items(), lr=0.1, mode=mode, max_grad_norm=1.0, backend="cpu", **options)
            for _ in range(2):
                for p in parameters.values():
                    p.grad = torch.ones_like(p)
                optimizer.step()


RUNS = {run.__name__: run for run in (gated_conv, attention_pool, lora_linear, child_update)}


def main(operator: str, launchers: str, glue: str) -> None:
    library = ptx_on_cpu.Library(Path(launchers), ptx_on_cpu.runtime("thread"))
    ctypes.CDLL(glue)
    operators = getattr(torch.ops, namespace_of(operator, "80", "thread"))
    torch.set_num_threads(1)
    with ExitStack() as stack:
        for module, names in CALLS[operator].items():
            found = {name: getattr(operators, raw).default for name, raw in names.items()}
            stack.enter_context(mock.patch.multiple(importlib.import_module(f"pykernels.{module}"), **found))
        for name in DTYPES:
            generator = torch.Generator().manual_seed(7)
            dtype = torch.float32 if name == "tf32" else getattr(torch, name)

            def normal(*sizes: int, generator: torch.Generator = generator, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(*sizes, generator=generator).to(dtype).requires_grad_()

            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            # Few processors get the large tiles, many the small ones. Blocks of a launch are not ordered either.
            for processors in (1, 1000):
                with library.runtime.options(processors=processors, order_blocks=0):
                    RUNS[operator](normal)
            print(f"{operator} {name}: done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

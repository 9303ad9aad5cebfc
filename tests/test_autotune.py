"""The measured choice of a backend, on the CPU: its kernels against plain PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pykernels
from pykernels import _autotune, _backend, _extension

pytestmark = pytest.mark.skipif(_extension._C is None, reason="one backend alone without the extension")
CPU = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kept" / "autotune.json"
    monkeypatch.setenv("PYKERNELS_AUTOTUNE_CACHE", str(path))
    monkeypatch.setattr(_autotune, "answers", _autotune.Answers())
    monkeypatch.setattr(_backend, "_default", "auto")
    return path


class Operator:
    """Stands for an operator: notes what it is called with, and takes as long as told."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.calls = seconds, []

    def __call__(self) -> Callable[..., Any]:
        def operator(x: torch.Tensor, *, dilation: int = 1, seed: int | None = None, backend: str | None = None) -> Any:
            self.calls.append((backend, seed))
            seconds = self.seconds.get(str(backend), 0.0)
            if seconds < 0:
                raise RuntimeError("out of memory")
            end = _autotune.time.perf_counter() + seconds
            while _autotune.time.perf_counter() < end:
                pass
            return x * 2

        return _autotune.choosing("gated_conv1d", operator)

    def taken(self) -> str | None:
        """The backend of the last call, and forget all."""
        last = self.calls[-1][0]
        self.calls.clear()
        return last


def test_the_fastest_is_taken_and_kept(cache: Path) -> None:
    operator = Operator(cpu=3e-3, reference=1e-4)
    call = operator()
    call(torch.ones(2, 7, 4))
    assert {name for name, _ in operator.calls} == set(CPU) and len(operator.calls) == 2 * (_autotune.ROUNDS + 1) + 1
    assert operator.taken() == "reference"
    ((key, kept),) = json.loads(cache.read_text()).items()
    assert kept == "reference" and key.startswith("operator(float32[<=2, <=8, <=4], grad) on pykernels ")
    call(torch.ones(2, 5, 4))  # the same powers of two
    assert operator.calls == [("reference", None)]
    other = Operator(cpu=0.0, reference=1e-3)
    _autotune.answers = _autotune.Answers()  # as in another process
    other()(torch.ones(2, 8, 4))
    assert other.calls == [("reference", None)]


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: ((x[:1],), {}), lambda x: ((x.transpose(1, 2).contiguous().transpose(1, 2),), {}),
        lambda x: ((x.bfloat16(),), {}), lambda x: ((x,), {"dilation": 2}),
        lambda x: ((x.clone().requires_grad_(),), {}),
    ],
)  # fmt: skip
def test_other_calls_are_measured_anew(changed: Callable[[torch.Tensor], Any], cache: Path) -> None:
    operator = Operator()
    call, x = operator(), torch.ones(2, 7, 4)
    call(x)
    operator.calls.clear()
    args, options = changed(x)
    call(*args, **options)
    assert len(operator.calls) > 1 and len(json.loads(cache.read_text())) == 2


def test_named_backends_and_defaults_are_not_measured() -> None:
    operator = Operator(cpu=1e-3)
    call, x = operator(), torch.ones(2, 7, 4)
    call(x, backend="cpu")
    assert operator.taken() == "cpu"
    pykernels.set_backend("cpu")
    call(x)
    assert operator.calls == [(None, None)]
    operator.calls.clear()
    call(x, backend="auto")
    assert operator.taken() == "reference"


def test_a_backend_that_fails_is_left_out() -> None:
    operator = Operator(reference=-1)
    operator()(torch.ones(2, 7, 4))
    assert operator.taken() == "cpu"
    hopeless = Operator(cpu=-1, reference=-1)
    hopeless()(torch.ones(20, 7, 4))  # as it would be without
    assert hopeless.calls[-1] == (None, None)


def test_random_bits_are_those_without_measuring(cache: Path) -> None:
    measured = _autotune.choosing("gated_conv1d", pykernels.gated_conv1d)
    x, weight = torch.randn(2, 9, 8), torch.randn(16, 8, 3)
    options = {"gate_dropout": 0.3, "training": True}
    torch.manual_seed(3)
    expected = pykernels.gated_conv1d(x, weight, **options)
    torch.manual_seed(3)
    measured(x, weight, **options)
    torch.manual_seed(3)
    again = measured(x, weight, **options, backend="cpu")
    assert torch.equal(again, expected)
    torch.manual_seed(3)
    torch.testing.assert_close(measured(x, weight, **options), expected)
    (name,) = json.loads(cache.read_text()).values()
    assert name in CPU


@pytest.mark.parametrize("operator", ["attention_pool", "lora_linear", "lora_linear_multi", "lora_linear_stacked"])
def test_operators_and_their_gradients(operator: str, cache: Path) -> None:
    def leaf(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes).requires_grad_()

    x = leaf(2, 9, 8)
    options: dict[str, Any] = {}
    if operator == "attention_pool":
        args: tuple[Any, ...] = (x, leaf(5, 8), leaf(5))
        options = {"mask": torch.arange(9) < torch.tensor([[9], [4]]), "return_scores": "softmax"}
    elif operator == "lora_linear":
        args, options = (x, leaf(6, 8), leaf(2, 8), leaf(6, 2)), {"dropout": 0.2, "training": True, "seed": 5}
    elif operator == "lora_linear_multi":
        args = (x, leaf(6, 8), leaf(3, 2, 8), leaf(3, 6, 2), torch.tensor([2, -1]))
    else:
        args = (x, [leaf(6, 8), leaf(4, 8)], [leaf(2, 8), leaf(2, 8)], [leaf(6, 2), leaf(4, 2)])
    function = getattr(pykernels, operator)
    table = "attention_pool" if operator == "attention_pool" else "lora_linear"
    results = [f(*args, **options) for f in (_autotune.choosing(table, function), function)]
    results = [r if isinstance(r, torch.Tensor) else torch.cat([t.flatten() for t in r]) for r in results]
    torch.testing.assert_close(*results)
    (gradient,), (expected,) = (torch.autograd.grad(r.sum(), x) for r in results)
    torch.testing.assert_close(gradient, expected)
    assert len(json.loads(cache.read_text())) == 1


def test_compiled_calls_are_not_measured(cache: Path) -> None:
    measured = _autotune.choosing("gated_conv1d", pykernels.gated_conv1d)
    x, weight = torch.randn(2, 9, 8), torch.randn(16, 8, 3)
    compiled = torch.compile(lambda x, weight: measured(x, weight), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), pykernels.gated_conv1d(x, weight))
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"operator": "gpu"}', '{"x": "cpu"'])
def test_files_that_are_none_of_ours(text: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    Operator()()(torch.ones(2, 7, 4))
    assert len(json.loads(cache.read_text())) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYKERNELS_AUTOTUNE_CACHE", str(tmp_path / "file" / "autotune.json"))
    operator = Operator(cpu=1e-3)
    call = operator()
    with pytest.warns(UserWarning, match="cannot keep measured choices in "):
        call(torch.ones(2, 7, 4))
    operator.calls.clear()
    call(torch.ones(2, 7, 4))  # known all the same
    assert operator.calls == [("reference", None)]


def test_the_environment_variable(cache: Path) -> None:
    program = "import torch, pykernels; pykernels.gated_conv1d(torch.randn(1, 4, 4), torch.randn(8, 4, 3))"
    for value, wrong, kept in (("0", False, False), ("1", False, True), ("yes", True, False)):
        cache.unlink(missing_ok=True)
        environment = os.environ | {"PYKERNELS_AUTOTUNE": value}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) == wrong and cache.exists() == kept, done.stderr
    assert "ValueError: PYKERNELS_AUTOTUNE: expected 0 or 1, got 'yes'" in done.stderr

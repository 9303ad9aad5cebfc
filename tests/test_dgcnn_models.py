"""What the readers and the extractor must all do: shapes, gradients, files, bfloat16, compilation, errors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pykernels.models import DGCNNExtractor, DGCNNReader, DGCNNReader2018
from pykernels.models.dgcnn_extractor import extractor_loss
from pykernels.models.dgcnn_reader import reader_loss
from pykernels.models.dgcnn_reader_2018 import reader_2018_loss
from tests import test_dgcnn_extractor as extractor
from tests import test_dgcnn_reader as reader
from tests import test_dgcnn_reader_2018 as reader_2018

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """loss(outputs, inputs); size: of all outputs; whole: whether torch.compile makes one graph of it."""

    cls: type[nn.Module]
    config: Any
    inputs: Inputs
    loss: Callable[[Any, Inputs], Tensor]
    shapes: list[tuple[int, ...]]
    whole: bool = True

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.cls(self.config)


def reader_case() -> Case:
    def loss(outputs: Any, inputs: Inputs) -> Tensor:
        target = (torch.arange(33) % 5 == 0).float().expand(3, 33)
        return reader_loss(*outputs, target, target, inputs["passage"])

    return Case(DGCNNReader, reader.SMALL, reader.batch(reader.SMALL), loss, [(3, 33)] * 2)


def reader_2018_case() -> Case:
    def loss(outputs: Any, inputs: Inputs) -> Tensor:
        target = (torch.arange(21) % 4 == 0).float().expand(2, 21)
        return reader_2018_loss(*outputs, target, target, inputs["passage_mask"])

    return Case(DGCNNReader2018, reader_2018.SMALL, reader_2018.batch(reader_2018.SMALL), loss, [(2, 21)] * 2)


def extractor_case(config: Any) -> Case:
    def loss(outputs: Any, inputs: Inputs) -> Tensor:
        mask = inputs["characters"] > 0
        return extractor_loss(*outputs, extractor.some_targets(config, *mask.shape), mask)

    shapes = [(3, 23)] * 2 + [(3, 23, config.predicates)] * 2
    whole = config.subject_encoding != "gru"  # torch.compile leaves a GRU to eager PyTorch
    return Case(DGCNNExtractor, config, extractor.batch(config), loss, shapes, whole)


CASES = {
    "reader": reader_case(),
    "reader-2018": reader_2018_case(),
    "extractor": extractor_case(extractor.SMALL),
    "extractor-known": extractor_case(extractor.SMALL_KNOWN),
    "extractor-reduced": extractor_case(extractor.SMALL_REDUCED),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for part in outputs for t in flat(part)]


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def test_shapes_and_gradients(case: Case) -> None:
    model = case.make()
    outputs = model(**case.inputs)
    found = flat(outputs)
    assert [tuple(t.shape) for t in found] == case.shapes and all(t.dtype == torch.float32 for t in found)
    assert all(((t >= 0) & (t <= 1)).all() for t in found)
    case.loss(outputs, case.inputs).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


def test_weights_and_configuration_round_trip(case: Case, tmp_path: Path) -> None:
    model = case.make().eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = case.cls(type(case.config)(**asdict(case.config)))
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    for a, b in zip(flat(model(**case.inputs)), flat(other.eval()(**case.inputs)), strict=True):
        assert torch.equal(a, b)


def test_bfloat16(case: Case) -> None:
    """Weights in bfloat16, and autocast over float32 ones: probabilities in float32 near the exact ones."""
    model = case.make().eval()
    exact = flat(model(**case.inputs))
    low = copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**case.inputs)
    rounded = low(**in_dtype(case.inputs, torch.bfloat16))
    for outputs in (rounded, mixed):
        for got, expected in zip(flat(outputs), exact, strict=True):
            assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=2e-2)
    case.loss(mixed, case.inputs).backward()
    case.loss(rounded, case.inputs).backward()
    for name, p in [*model.named_parameters(), *low.named_parameters()]:
        assert p.grad is not None and p.grad.dtype == p.dtype and torch.isfinite(p.grad).all(), name


def check_compiled(case: Case, backend: str) -> None:
    """Outputs and gradients are those of eager, with the dropout and the noise of training."""
    model, results = case.make(), []
    compiled = torch.compile(model, fullgraph=case.whole, backend=backend)
    for call in (model, compiled):
        model.zero_grad()
        torch.manual_seed(7)
        outputs = call(**case.inputs)
        case.loss(outputs, case.inputs).backward()
        results.append([*(t.detach() for t in flat(outputs)), *(p.grad.clone() for p in model.parameters())])
    for plain, ours in zip(*results, strict=True):
        assert torch.allclose(plain, ours, rtol=1e-4, atol=1e-5 * max(1.0, plain.abs().max().item()))


def test_compiled(case: Case, forget_compiled: None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")
        check_compiled(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reader", "reader-2018", "extractor", "extractor-reduced"])
def test_compiled_by_inductor(name: str, forget_compiled: None) -> None:
    """In evaluation mode: inductor draws other bits for nn.Dropout."""
    case = CASES[name]
    model = case.make().eval()
    expected = flat(model(**case.inputs))
    for a, b in zip(expected, flat(torch.compile(model, fullgraph=case.whole)(**case.inputs)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_readers_name_the_wrong_input() -> None:
    model, inputs = CASES["reader"].make(), CASES["reader"].inputs
    wrong: list[tuple[type[Exception], str, Inputs]] = [
        (TypeError, r"question: expected integers \[B, L\], got torch.float32",
         {"question": inputs["question"].float()}),
        (ValueError, r"question: expected \[B, L\], got \[7\]", {"question": inputs["question"][0]}),
        (ValueError, r"passage: expected \[3, L\], got \[1, 33\]", {"passage": inputs["passage"][:1]}),
        (ValueError, r"question_words: expected \[3, 7, 6\], got \[3, 7, 5\]",
         {"question_words": inputs["question_words"][..., :5]}),
        # Of length one, which broadcasting would repeat.
        (ValueError, r"passage_words: expected \[3, 33, 6\], got \[3, 1, 6\]",
         {"passage_words": inputs["passage_words"][:, :1]}),
        (ValueError, r"question_words: expected word vectors \[B, L, 6\], got none", {"question_words": None}),
    ]  # fmt: skip
    for error, message, other in wrong:
        with pytest.raises(error, match=message):
            model(**{**inputs, **other})
    model, inputs = CASES["reader-2018"].make(), CASES["reader-2018"].inputs
    with pytest.raises(ValueError, match=r"question_mask: expected \[2, L\], got \[5\]"):
        model(**{**inputs, "question_mask": inputs["question_mask"][0]})
    with pytest.raises(ValueError, match=r"passage_mask: expected \[2, L\], got \[1, 21\]"):
        model(**{**inputs, "passage_mask": inputs["passage_mask"][:1]})


def test_the_extractor_names_the_wrong_input() -> None:
    model, inputs = CASES["extractor"].make(), CASES["extractor"].inputs
    wrong: list[tuple[type[Exception], str, Inputs]] = [
        (TypeError, r"characters: expected integers \[B, L\], got torch.float32",
         {"characters": inputs["characters"].float()}),
        (ValueError, r"words: expected \[3, 23, 6\], got \[3, 1, 6\]", {"words": inputs["words"][:, :1]}),
        (ValueError, r"words: expected \[3, 23, 6\], got \[3, 23, 3\]", {"words": inputs["words"][..., :3]}),
        (TypeError, "start: expected int64, got torch.float32", {"start": inputs["start"].float()}),
    ]  # fmt: skip
    for error, message, other in wrong:
        with pytest.raises(error, match=message):
            model(**{**inputs, **other})

"""How each article draws its tokens: which it can draw, with what probability, and when it stops."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.recorded import recorded

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pykernels.models import GPT2ML, GPT2MLConfig, sampling  # noqa: E402
from pykernels.models.sampling import EndsFrom, NucleusWithoutCrossing  # noqa: E402


def model(**more: object) -> GPT2ML:
    torch.manual_seed(1)
    sizes = {"vocab_size": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "eos_token_id": None}
    return GPT2ML(GPT2MLConfig(**(sizes | more))).eval()


def distribution(probabilities: list[float], options: dict[str, object]) -> dict[int, float]:
    """What generate draws from, given what the model says."""
    gpt = model(vocab_size=len(probabilities))

    class Say(transformers.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.tensor([probabilities], dtype=torch.float64).log().float()

    first = transformers.LogitsProcessorList([Say(), *options.pop("logits_processor", [])])  # type: ignore[misc]
    once = {"max_new_tokens": 1, "max_length": None, "output_scores": True, "return_dict_in_generate": True}
    got = gpt.generate(torch.tensor([[1]]), logits_processor=first, **(options | once))
    seen = got.scores[0][0].softmax(-1)
    return {i: p for i, p in enumerate(seen.tolist()) if p > 0}


def test_nucleus_of_bert4keras() -> None:
    cases = json.loads(recorded("golden", "sampling.json").read_text())["bert4keras"]["cases"]
    for case in cases:
        options = sampling.gpt2_ml_bert4keras(1, top_k=case["top_k"] or 0, top_p=case["top_p"] or 1.0)
        got = distribution(case["probs"], options)
        assert got == pytest.approx({int(i): p for i, p in case["result"].items()}, abs=1e-6)


def test_nucleus_of_gpt2_ml() -> None:
    recorded_ids = json.loads(recorded("golden", "sampling.json").read_text())["gpt2_ml"]
    for p, ids in recorded_ids["drawable_ids_by_p"].items():
        options = sampling.gpt2_ml_demo(float(p)) | {"suppress_tokens": None}
        assert sorted(distribution(recorded_ids["probs"], options)) == ids


@pytest.mark.parametrize(("p", "kept"), [(0.3, [1]), (0.5, [1]), (0.71, [1, 3]), (0.9, [1, 3, 4]), (1.0, [0, 1, 3, 4])])
def test_the_crossing_token_is_left_out(p: float, kept: list[int]) -> None:
    """With p = 1 only what floating point takes for it; the last sum is 1 and crosses."""
    scores = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log().expand(3, -1)
    got = NucleusWithoutCrossing(p)(torch.zeros(3, 1), scores)
    assert all(row.isfinite().nonzero().flatten().tolist() == kept for row in got)
    assert torch.equal(got[got.isfinite()], scores[got.isfinite()])
    with pytest.raises(ValueError, match="p: expected 0 < p <= 1, got 0"):
        NucleusWithoutCrossing(0)


def test_nucleus_keeps_the_crossing_token_elsewhere() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]
    options = sampling.cdial_gpt([2]) | {"temperature": 1.0, "top_p": 0.6, "min_new_tokens": 0}
    assert distribution(probabilities, options) == pytest.approx({1: 4 / 7, 3: 3 / 7})
    sharper = distribution(probabilities, sampling.cdial_gpt([2]) | {"top_p": 1.0, "min_new_tokens": 0})
    total = sum(p ** (1 / 0.7) for p in probabilities)
    assert sharper == pytest.approx({i: p ** (1 / 0.7) / total for i, p in enumerate(probabilities)}, rel=1e-4)


def test_the_dialogue_model_draws_of_five() -> None:
    probabilities = [0.05, 0.4, 0.06, 0.2, 0.15, 0.1, 0.04]
    assert sorted(distribution(probabilities, sampling.nezha_dialog())) == [1, 2, 3, 4, 5]


def test_end_tokens_end_a_text_from_a_length_on() -> None:
    rows = torch.tensor([[5, 9, 9], [9, 5, 5]])
    assert EndsFrom(9, 3)(rows, None).tolist() == [True, False]
    assert EndsFrom(9, 4)(rows, None).tolist() == EndsFrom(9, 2, prompt=2)(rows, None).tolist() == [False, False]


def test_texts_go_on_over_early_ends() -> None:
    """A text that ends has its end token once more than its length allows; what follows is padding."""
    gpt, prompt = model(), torch.tensor([[4, 5], [6, 7], [8, 9]])
    torch.manual_seed(2)
    options = sampling.gpt2_ml_bert4keras(2, eos=3, min_new=6, max_new=40)
    early = False
    for row in gpt.generate(prompt, **options)[:, 2:].tolist():
        end = next((i for i, token in enumerate(row) if token == 3 and i >= 5), None)
        early |= 3 in row[:5]
        assert end is None or set(row[end + 1 :]) <= {0}
    assert early
    for row in gpt.generate(prompt, **sampling.gpt2_ml_demo(eos=3, min_length=9, max_length=30)).tolist():
        end = next((i for i, token in enumerate(row) if token == 3 and i >= 9), len(row) - 1)
        assert 0 not in row[: end + 1] and set(row[end + 1 :]) <= {0}

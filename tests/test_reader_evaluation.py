"""Normalisation, accuracy and character F1 of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykernels.models.reader_evaluation import accuracy, character_f1, evaluate, normalize

TEXT = st.text(alphabet="甲乙丙丁ab1 ，。Ａ", max_size=8)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Ａｂｃ１２３", "abc123"),
        ("《红楼梦》", "红楼梦"),
        (" 1998 年　１月，", "1998年1月"),
        ("U.S.A.", "usa"),
        ("C++", "c++"),
        ("。，！", ""),
        ("", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    "answer, accepted, expected",
    [
        ("纣王", ["帝辛", "纣王"], 1),
        ("《纣王》", ["纣王"], 1),
        ("纣", ["纣王"], 0),
        ("李四、张三", ["张三，李四"], 1),  # an enumeration in another order
        ("上海", ["海上"], 0),  # characters in another order are another word
        ("", ["纣王"], 0),
        ("。", ["，"], 0),
        ("纣王", [], 0),
    ],
)
def test_accuracy(answer: str, accepted: list[str], expected: int) -> None:
    assert accuracy(answer, accepted) == expected


@pytest.mark.parametrize(
    "answer, accepted, expected",
    [
        ("纣王", ["纣王"], 1.0),
        ("纣王帝辛", ["纣王"], 2 * 0.5 * 1 / 1.5),
        ("纣", ["帝辛", "纣王"], 2 / 3),
        ("人人", ["人"], 2 / 3),  # counted as often as it occurs
        ("甲", ["乙"], 0.0),
        ("", ["乙"], 0.0),
        ("甲", [], 0.0),
    ],
)
def test_character_f1(answer: str, accepted: list[str], expected: float) -> None:
    assert character_f1(answer, accepted) == pytest.approx(expected)


def test_final_score_is_the_mean_of_means() -> None:
    scores = evaluate(["纣王", None, "纣"], [["纣王"], ["甲"], ["纣王"]])
    assert scores.accuracy == pytest.approx(1 / 3) and scores.f1 == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert scores.final == pytest.approx((scores.accuracy + scores.f1) / 2)
    with pytest.raises(ValueError, match="answers: expected one for each of 2 questions, at least one, got 1"):
        evaluate(["a"], [["a"], ["b"]])


@given(TEXT, st.lists(TEXT, max_size=3))
def test_properties(answer: str, accepted: list[str]) -> None:
    f1 = character_f1(answer, accepted)
    assert 0 <= f1 <= 1 and f1 >= accuracy(answer, accepted) * (f1 > 0)
    assert accuracy(answer, [*accepted, answer]) == (normalize(answer) != "")
    assert normalize(normalize(answer)) == normalize(answer)
    assert character_f1(normalize(answer), accepted) == f1

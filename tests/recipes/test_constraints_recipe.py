"""The rewards of the constraints recipe."""

import pytest

from recipes.constraints.rewards import question_at_the_end, two_sentences, words_without_e


@pytest.mark.parametrize(
    ("text", "expected"),
    [("One. Two.", 1.0), ("One. Two, cut", 1.0), ("One.", 0.0), ("One. Two. Three", 0.0), ("", 0.0)],
)
def test_two_sentences_whole_or_cut(text, expected):
    assert two_sentences(["p"], [text]) == [expected]


def test_a_question_mark_counts_at_the_end_alone():
    assert question_at_the_end(["p"] * 3, ["Is it?", "Is it? No.", "It is"]) == [1.0, 0.0, 0.0]


def test_words_without_e_are_counted():
    assert words_without_e(["p"] * 3, ["a tree stood", "", "rain"]) == [pytest.approx(2 / 3), 0.0, 1.0]

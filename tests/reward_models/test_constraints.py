"""Constraints: what keeps them and what does not, by hand."""

from __future__ import annotations

import pytest

from reward_models import constraints
from reward_models.functions import call_function, load_function
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ConfigError


def kept(name, responses, **limits):
    """Call a constraint with the same limits for every response."""
    count = len(responses)
    return getattr(constraints, name)([""] * count, responses, **{key: [one] * count for key, one in limits.items()})


def test_words_within_limits():
    assert kept("words_within", ["a b", "a b c", "don't well-known 3", "", "..."], at_least=2, at_most=3) == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert kept("words_within", ["", "a b c"], at_most=2) == [1, 0]
    assert kept("words_within", ["a"]) == [1]


def test_tokens_within_limits_of_a_models_tokenizer(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    responses = ["the sea", "the sea is red", ""]
    assert kept("tokens_within", responses, tokenizer=str(tmp_path), at_least=1, at_most=3) == [1, 0, 0]


def test_json_with_keys():
    responses = ['{"a": 1, "b": [2]}', '```json\n{"a": null}\n```', "[1]", '{"a": 1} and more', "", "[" * 100_000]
    assert kept("valid_json", responses, keys=["a"]) == [1, 1, 0, 0, 0, 0]
    assert kept("valid_json", ['{"a": 1}', "{}"], keys=["a", "b"]) == [0, 0]
    assert constraints.valid_json([""], ["{}"]) == [1]


def test_banned_words_are_whole_words_in_any_case():
    assert kept("without_words", ["The Sea.", "The season", "deep sea fish"], banned="sea") == [0, 1, 0]
    assert kept("without_words", ["A deep, dark sea", "deep. dark"], banned=["red", "deep dark"]) == [0, 0]
    assert kept("without_words", ["anything"], banned=[]) == [1]


def test_sentences():
    text = 'It is 3.14 deep. Is it? "Yes!" And on'
    assert constraints.sentences_of(text) == ["It is 3.14 deep.", "Is it?", '"Yes!"', "And on"]
    assert constraints.sentences_of("... ! Hm...") == ["Hm..."]
    assert kept("sentences_exactly", [text, "One.", ""], number=1) == [0, 1, 0]


def test_the_end_is_a_question():
    assert constraints.ends_with_question([""] * 4, ["Is it?", 'He said "is it?" ', "Is it? No.", ""]) == [1, 1, 0, 0]


def test_a_word_in_the_second_half():
    """Five words: the halves are the first two and the last three."""
    responses = ["one two sea four five", "one Sea three four five", "Sea", ""]
    assert kept("word_in_second_half", responses, word="sea") == [1, 0, 1, 0]


def test_a_letter_that_must_not_occur():
    assert kept("without_letter", ["A dog", "Eel", "the", ""], letter="e") == [1, 0, 0, 0]
    assert kept("without_letter", ["dog", "cat"], letter="do") == [0, 1]


def test_a_limit_of_null_is_not_asked_for():
    for name, key in (
        ("without_letter", "letter"), ("word_in_second_half", "word"), ("sentences_exactly", "number"),
        ("without_words", "banned"), ("words_within", "at_most"),
    ):  # fmt: skip
        assert kept(name, ["The sea is deep.", ""], **{key: None}) == [1, 1]


def test_limits_come_from_columns_and_a_single_value_is_refused():
    prompts = [PromptText("a", {"at_most": 1}), PromptText("b", {"at_most": 2})]
    assert call_function(load_function("words_within"), prompts, ["x y", "x y"]) == [0, 1]
    with pytest.raises(ConfigError, match="without_letter: the letter limit must be a list with one value for each"):
        constraints.without_letter([""], ["a"], "e")

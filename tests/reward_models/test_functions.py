"""Python reward functions: signs, loading by name, and faults that name the response."""

from __future__ import annotations

import pytest

from reward_models.composed import Remembered
from reward_models.functions import (
    brevity,
    call_function,
    length_words,
    load_function,
    vader_compound,
)
from vgf_llm.errors import ConfigError, ModelError


def test_vader_puts_good_above_neutral_above_bad():
    good, neutral, bad = vader_compound([""] * 3, ["I love this!", "It is a table.", "I hate this awful day."])
    assert 1 >= good > neutral == 0 > bad >= -1


def test_lengths():
    assert length_words(["", ""], ["one two  three", ""]) == [3, 0]
    assert brevity([""], ["one two"]) == [-2]


def test_functions_load_by_short_and_full_name():
    assert load_function("vader_compound") is vader_compound
    assert load_function("reward_models.functions:length_words") is length_words


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vader", "does not exist; use vader_compound"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported"),
        ("reward_models.functions:nothing", "does not exist; use the functions of reward_models.functions"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        load_function(name)


def test_a_function_that_raises_is_named_with_what_it_raised():
    def broken(prompts, responses):
        raise KeyError("tone")

    with pytest.raises(ModelError, match="reward function broken raised KeyError on 1 responses: 'tone'"):
        call_function(broken, ["p"], ["r"])
    with pytest.raises(ModelError, match="raised TypeError"):
        call_function(lambda p, r: None, ["p"], ["r"])


def test_wrong_counts_and_non_finite_rewards_are_refused():
    assert call_function(lambda p, r: [1] * len(r), ["p"], ["r"]) == [1.0]
    with pytest.raises(ModelError, match="returned 1 rewards for 2 responses"):
        call_function(lambda p, r: [1.0], ["p", "p"], ["a", "b"])
    with pytest.raises(ModelError, match="returned nan for response 1 \\('b'\\)"):
        call_function(lambda p, r: [1.0, float("nan")], ["p", "p"], ["a", "b"])
    with pytest.raises(ModelError, match="returned None for response 0"):
        call_function(lambda p, r: [None], ["p"], ["a"])


def test_a_remembered_function_is_called_once_for_each_prompt_and_response():
    calls = []

    def count(prompts, responses):
        calls.extend(zip(prompts, responses, strict=True))
        return [float(len(prompt) + len(response)) for prompt, response in zip(prompts, responses, strict=True)]

    scored = Remembered(count)
    assert scored(["a", "a", "b"], ["x", "x", "xy"]) == [2.0, 2.0, 3.0]
    assert scored(["b", "a"], ["xy", "z"]) == [3.0, 2.0]
    assert calls == [("a", "x"), ("b", "xy"), ("a", "z")]


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ("def f(:\n", "SyntaxError"),
        ("x = undefined\n", "NameError"),
        ("from math import nothere\n", "ImportError"),
        ("import sys\nsys.exit(3)\n", "SystemExit"),
    ],
)
def test_a_module_that_raises_when_it_is_read_is_named(tmp_path, monkeypatch, text, raised):
    name = f"broken_{raised.lower()}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"reward function '{name}:f': reading the module '{name}' raised {raised}: "):
        load_function(f"{name}:f")


def test_rewards_by_name_are_refused_and_what_a_function_does_to_its_lists_stays_there():
    def sorts(prompts, responses):
        responses.sort()
        return {0: 1.0, 1: 2.0}

    responses = ["b", "a"]
    with pytest.raises(ModelError, match="it returned a dict, where one number per response is expected"):
        call_function(sorts, ["p", "q"], responses)
    assert responses == ["b", "a"]
    with pytest.raises(ModelError, match="every reward must be a finite number"):
        call_function(lambda prompts, responses: [10**400], ["p"], ["r"])

"""Composed rewards: their grammar, their arithmetic by hand, and running statistics that do not depend on the cut."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from reward_models.composed import ComposedReward, Remembered
from reward_models.foreign import text_reward
from reward_models.functions import load_function
from reward_models.grammar import read_composed, reward_contents
from reward_models.inputs import called_part, check_rewards
from reward_models.running import Running, RunningRewards
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ConfigError, ModelError

ASKED: list[str] = []


def paid(prompts, responses, answer):
    """A reward that is asked for, and says for what."""
    ASKED.extend(responses)
    return [float(response == right) for response, right in zip(responses, answer, strict=True)]


PAID = f'"{__name__}:paid"'


def composed(folder: Path, text: str) -> ComposedReward:
    path = folder / "reward.yaml"
    path.write_text(text)
    reward = text_reward(str(path))
    assert isinstance(reward, ComposedReward)
    return reward


# Arithmetic --------------------------------------------------------------------------------------------------------


def test_a_sum_of_weighted_and_clipped_parts(tmp_path):
    """Words: 1, 3, 6. Clipped to [2, 5] and weighted: 1, 1.5, 2.5. Minus words times 0.1."""
    reward = composed(
        tmp_path, "sum: [{reward: length_words, clip: [2, 5], weight: 0.5}, {reward: brevity, weight: 0.1}]"
    )
    values, parts = reward.scored([""] * 3, ["a", "a b c", "a b c d e f"])
    assert values == pytest.approx([1 - 0.1, 1.5 - 0.3, 2.5 - 0.6])
    assert parts == {"length_words": [1, 3, 6], "brevity": [-1, -3, -6]}


def test_a_product_and_a_fixed_standardisation(tmp_path):
    """(words - 2) / 4, times 1 where the response ends with a question, else 0; the whole times -2."""
    text = "product: [{reward: length_words, standardise: {mean: 2, deviation: 4}}, {reward: ends_with_question}]\n"
    reward = composed(tmp_path, text + "weight: -2\nname: total\n")
    values, parts = reward.scored([""] * 2, ["Is it red now?", "It is."])
    assert values == [-2 * 0.5, 0.0]
    assert parts["total"] == [0.5, 0.0]


def test_a_broken_constraint_gives_its_own_value_and_saves_the_call(tmp_path):
    required = "{reward: words_within, arguments: {at_most: 2}}, {reward: ends_with_question}"
    reward = composed(tmp_path, f"reward: {PAID}\nrequire: [{required}]\notherwise: -1.0\nweight: 2.0\n")
    ASKED.clear()
    prompts = [PromptText("p", {"answer": "now?"})] * 3
    values, parts = reward.scored(prompts, ["now?", "a b c?", "now"])
    assert values == [2.0, -2.0, -2.0]
    assert ASKED == ["now?"]
    assert parts["words_within"] == [1, 0, 1] and parts["ends_with_question"][::2] == [1, 0]
    assert math.isnan(parts["ends_with_question"][1]) and math.isnan(parts["paid"][1])
    ASKED.clear()
    remembered = Remembered(reward)
    assert (
        remembered(prompts, ["now?", "now", "now?"]) == remembered(prompts, ["now?", "now", "now?"]) == [2.0, -2.0, 2.0]
    )
    assert ASKED == ["now?"]


def test_every_reward_of_a_file_is_a_reward_alone(tmp_path):
    assert composed(tmp_path, "reward: length_words")(["p"], ["a b"]) == [2.0]


# Running statistics ------------------------------------------------------------------------------------------------


def test_running_statistics_are_those_of_all_values_however_they_are_cut():
    """Against the whole list: three steps, their values split over two processes at another place each time."""
    steps = [[3.0, 1e6 + 1, 2.0, 5.0], [1e6, 1e6 + 2], [0.0, 1.0, 7.0]]
    running = Running()
    for cut, values in enumerate(steps):
        sums = [running.sums(part) for part in (values[:cut], values[cut:])]
        running.add([sum(column) for column in zip(*sums, strict=True)])
    every = [value for values in steps for value in values]
    assert running.count == len(every)
    assert running.mean == pytest.approx(statistics.fmean(every), rel=1e-12)
    assert running.deviation == pytest.approx(statistics.pstdev(every), rel=1e-12)


def test_statistics_hold_still_within_a_step_and_are_unit_before_the_first(tmp_path):
    """Values 1 and 3: mean 2, deviation 1. Their second step is standardised by the first alone."""
    reward = composed(tmp_path, "sum: [{reward: length_words, standardise: true, clip: [-10, 10]}]")
    running = RunningRewards(reward.running_labels)

    def step(texts):
        return reward.scored([""] * len(texts), texts, running.by_name, running.see)[0]

    assert step(["a", "a b c"]) == [1.0, 3.0] == step(["a", "a b c"])
    running.end_step(lambda table: table)
    assert step(["a", "a b c", "a b c d"]) == [-1.0, 1.0, 2.0]
    before = running.seen
    step(["a " * 9])
    running.forget(before)  # prompts that were repeated to fill a batch
    again = RunningRewards(reward.running_labels)
    again.load_state_dict(running.state_dict())
    running.end_step(lambda table: table)
    assert running.by_name["length_words"].mean == pytest.approx((1 + 3 + 1 + 3 + 1 + 3 + 4) / 7)
    assert again.by_name["length_words"].state == (4.0, 2.0, 4.0)


def test_equal_values_are_not_blown_up():
    running = Running()
    running.add(running.sums([0.1] * 10))
    assert running.standardised([0.1, 0.6]) == pytest.approx([0.0, 0.5])


def test_outside_training_statistics_must_be_fixed(tmp_path):
    reward = composed(tmp_path, "sum: [{reward: length_words, standardise: true}]")
    with pytest.raises(ConfigError, match="'length_words' has standardise: true, .* reward_statistics.json"):
        reward([""], ["a"])
    with pytest.raises(ConfigError, match="standardise: true"):
        check_rewards([], str(tmp_path / "reward.yaml"))
    check_rewards([str(tmp_path / "reward.yaml")])


# Grammar -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "{}": "the root: a part needs one of reward, endpoint, sum, product, got none",
    "reward: a\nsum: [{reward: b}]": "got reward, sum",
    "sum: []": "key 'sum': expected at least one part",
    "sum: [{weight: 1}]": r"key 'sum\[0\]': a part needs one of",
    "sum: [length_words]": r"key 'sum\[0\]': expected a block of reward",
    "reward: length_words\nwieght: 2": "unknown key 'wieght'.*weight",
    "reward: length_words\nweight: heavy": "key 'weight': expected a finite number, got 'heavy'",
    "reward: length_words\nweight: .nan": "key 'weight': expected a finite number, got nan",
    "reward: length_words\nclip: [1]": "key 'clip': expected two numbers",
    "reward: length_words\nclip: [a, null]": "key 'clip",
    "reward: length_words\nclip: [1, 0]": "key 'clip': expected the least number first",
    "reward: length_words\nstandardise: {mean: 0}": "key 'standardise': expected true, false, or",
    "reward: length_words\nstandardise: {mean: 0, deviation: 0}": "key 'standardise': expected true, false, or",
    "reward: other.yaml": "key 'reward': expected a function or a folder",
    "reward: nowhere/model": "reward: 'nowhere/model' is not a folder",
    "reward: no_such": "reward function 'no_such' does not exist; use vader_compound",
    "reward: length_words\nname: a/b": "key 'name': expected a name without a slash",
    "sum: [{reward: length_words}, {reward: length_words}]": "two parts are called 'length_words'; give each a name",
    "product: [{reward: length_words}]\nstandardise: true": "with standardise: true needs a name",
    "reward: words_within\narguments: {atmost: 3}": "words_within does not take 'atmost'; it takes at_least, at_most",
    "sum: [{reward: length_words}]\narguments: {a: 1}": "key 'arguments': expected none",
    "reward: without_letter": "without_letter takes 'letter', and the prompts' rows have no such column",
    "endpoint: {kind: guess, model: m}": "key 'endpoint.kind': expected one of judge, classify, pooling, score, got",
    "endpoint: {kind: classify}": "key 'endpoint.model': expected the model's name",
    "endpoint: {kind: classify, model: m, outputs: {good: 1}}": "key 'endpoint.outputs': expected weights by",
    "endpoint: {kind: classify, model: m, outputs: {\u00b2: 1}}": "key 'endpoint.outputs': expected weights by",
    "endpoint: {kind: score, model: m, outputs: {0: 1}}": "'endpoint.outputs': expected none: an endpoint of kind",
    "endpoint: {kind: pooling, model: m, template: t}": "'endpoint.template': expected none: an endpoint of kind pool",
    "endpoint: {kind: classify, model: m, url_variable: NO_SUCH_URL}": "environment variable NO_SUCH_URL is not set",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_name_the_file_and_the_key(tmp_path, text):
    path = tmp_path / "reward.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=FAULTS[text]) as raised:
        check_rewards([str(path)], prompts=[PromptText("p", {"answer": "4"})])
    assert str(raised.value).startswith(str(path)) or "reward.yaml" in str(raised.value)


def test_a_file_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="config file 'nowhere.yaml' does not exist"):
        check_rewards(["nowhere.yaml"])


def test_a_part_that_fails_says_so(tmp_path):
    reward = composed(tmp_path, f"sum: [{{reward: {PAID}}}]")
    with pytest.raises(ConfigError, match="paid takes 'answer'"):
        reward([""], ["a"])
    broken = ComposedReward(read_composed(str(tmp_path / "reward.yaml")), lambda part: lambda p, r: [math.nan], "r")
    with pytest.raises(ModelError, match="returned nan for response 0"):
        broken([""], ["a"])


OVERFLOWS = {
    "reward: length_words\nweight: 1.0e308": "reward part length_words is inf after standardise, clip and weight, for",
    "reward: length_words\nname: long\nstandardise: {mean: 0, deviation: 1.0e-308}": "part long is inf",
    "product: [{reward: length_words, weight: 5.0e307}, {reward: length_words, name: b}]": "part a product is inf",
    "sum: [{reward: length_words, weight: 8.0e307}, {reward: length_words, name: b, weight: 8.0e307}]": "a sum is inf",
}


@pytest.mark.parametrize("text", OVERFLOWS)
def test_a_part_that_overflows_is_named_with_prompt_and_response(tmp_path, text):
    reward = composed(tmp_path, text)
    prompt = PromptText("p", {}, "a.jsonl, row 3")
    with pytest.raises(ModelError, match=f"{OVERFLOWS[text]}.* a.jsonl, row 3: the prompt 'p', response 'a b'"):
        reward([prompt], ["a b"])


def test_a_clip_mends_an_overflow(tmp_path):
    text = "reward: length_words\nstandardise: {mean: 0, deviation: 1.0e-308}\nclip: [null, 3]\n"
    assert composed(tmp_path, text)([""], ["a b"]) == [3.0]
    assert composed(tmp_path, "reward: brevity\nclip: [-2, null]")([""] * 2, ["a", "a b c"]) == [-1.0, -2.0]


def test_prompts_of_one_text_are_remembered_apart():
    def turns(messages, responses):
        return [float(len(one)) for one in messages]

    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    prompts = [PromptText([{"role": "user", "content": str(PromptText(talk))}]), PromptText(talk)]
    assert prompts[0] == prompts[1]
    assert Remembered(turns)(prompts, ["r", "r"]) == [1.0, 3.0]


def test_what_a_file_is_does_not_depend_on_how_it_is_written(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("sum: [{reward: length_words, weight: 2.0}]")
    other.write_text("# the same\nsum:\n  - weight: 2.0\n    reward: length_words\n")
    assert reward_contents(str(one)) == reward_contents(str(other))
    other.write_text("sum: [{reward: length_words, weight: 2.5}]")
    assert reward_contents(str(one)) != reward_contents(str(other))
    assert reward_contents("length_words") == "length_words"


def test_arguments_reach_the_function(tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text("reward: without_words\narguments: {banned: [sea, red]}")
    called = called_part(read_composed(str(path)), None)
    assert called.function is load_function("without_words")
    assert called([""] * 2, ["the sea", "the dog"]) == [0.0, 1.0]

"""Recipes and flags become dataclasses, and every mistake in them names its place."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from vgf_llm.errors import ConfigError, require
from vgf_llm.settings.parse import dump, parse


@dataclass(frozen=True)
class Budget:
    steps: int = 1
    """Flow steps (count, >= 0)."""
    step: Literal["sgd", "adam"] = "sgd"
    """Step rule."""
    nats: float = 4.0
    """Budget of a response in nats (>= 0)."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "steps", self.steps, ">= 0")


@dataclass
class Script:
    model: str = "default"
    """Model name or folder."""
    resume: bool = False
    """Go on where a run was stopped."""
    limit: int | None = None
    """Rows read (count); all when not set."""
    budget: Budget = field(default_factory=Budget)
    """Transport budget."""
    arms: list[Budget] = field(default_factory=list)
    """Budgets compared."""
    names: list[str] = field(default_factory=list)
    """Names."""
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    """Sizes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights by name."""


@dataclass
class Training:
    learning_rate: float = 1e-3
    """Learning rate (> 0)."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")


@dataclass
class Needs:
    output: str
    """Folder."""


def read(tmp_path, text: str, *flags: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return parse(Script, Training, argv=["--config", str(path), *flags])


def refused(tmp_path, text: str, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *flags)
    return str(caught.value)


def test_defaults_and_order_of_instances():
    script, training = parse(Script, Training, argv=[])
    assert script == Script() and training == Training()


def test_yaml_types(tmp_path):
    text = "learning_rate: 1e-5\nmodel: 'no'\nresume: no\nlimit: 3\nbudget:\n  steps: 2\n  nats: 1e-2\n"
    text += "arms:\n- steps: 0\n- step: adam\n  nats: 8\nnames: [a, b]\nweights: {x: 1}\n"
    script, training = read(tmp_path, text)
    assert training.learning_rate == 1e-5
    assert script.model == "no" and script.resume is False and script.limit == 3
    assert script.budget == Budget(steps=2, nats=0.01)
    assert script.arms == [Budget(steps=0), Budget(step="adam", nats=8.0)]
    assert script.names == ["a", "b"] and script.weights == {"x": 1.0}


def test_later_values_override_earlier_ones(tmp_path):
    script, training = read(
        tmp_path, "budget:\n  steps: 2\n  step: adam\n", "--budget.steps", "5", "--learning_rate=2e-4"
    )
    assert script.budget == Budget(steps=5, step="adam") and training.learning_rate == 2e-4
    second = tmp_path / "second.yaml"
    second.write_text("budget:\n  steps: 9\n")
    script, _ = read(tmp_path, "budget:\n  step: adam\n", "--config", str(second))
    assert script.budget == Budget(steps=9, step="adam")


def test_a_file_of_comments_or_nulls_changes_nothing(tmp_path):
    assert read(tmp_path, "# nothing\n") == (Script(), Training())
    assert read(tmp_path, "limit:\n") == (Script(), Training())


def test_numbers_inside_a_free_mapping_are_numbers(tmp_path):
    script, _ = read(tmp_path, "extra: {rate: 1e-5, name: a b, flag: true}\n")
    assert script.extra == {"rate": 1e-5, "name": "a b", "flag": True}


def test_dotted_keys_and_a_block_are_folded(tmp_path):
    assert read(tmp_path, "budget.steps: 4\nbudget:\n  nats: 2\n")[0].budget == Budget(steps=4, nats=2.0)


def test_points_in_the_names_of_a_free_mapping_stay(tmp_path):
    lines = 'weights: {"gpt4.honesty": 1.5, 0: 2}\nextra:\n  a.b: {c.d: 1}\n'
    script, _ = read(tmp_path, lines)
    assert script.weights == {"gpt4.honesty": 1.5, "0": 2} and script.extra == {"a.b": {"c.d": 1}}
    assert read(tmp_path, "weights.gpt4.honesty: 1.5\n")[0].weights == {"gpt4.honesty": 1.5}


def test_a_list_of_blocks_on_the_command_line():
    argv = ["--arms", "{steps: 4}", "--arms", "[{steps: 5}, {nats: 1e-3}]"]
    assert parse(Script, argv=argv)[0].arms == [Budget(steps=4), Budget(steps=5), Budget(nats=1e-3)]


def test_dotted_keys_in_yaml(tmp_path):
    assert read(tmp_path, "budget.steps: 4\n")[0].budget.steps == 4
    assert "unknown key 'budget.stpes' (nearest: 'budget.steps')" in refused(tmp_path, "budget.stpes: 4\n")


@pytest.mark.parametrize("argv", [["--resume"], ["--resume", "true"], ["--resume", "--model", "x"], ["--resume=yes"]])
def test_boolean_flag_needs_no_value(argv):
    assert parse(Script, argv=argv)[0].resume is True


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--names", "one: two, #3"], ["one: two, #3"]),
        (["--names=a", "--names", "b c"], ["a", "b c"]),
        (["--names+", "a", "--names+=b"], ["a", "b"]),
        (["--names", "[a, b]"], ["a", "b"]),
        (["--names", "[INST] a [/INST]"], ["[INST] a [/INST]"]),
        (["--names", 'é "quoted" \n\U0001f600'], ['é "quoted" \n\U0001f600']),
        (["--names", "true", "--names", "1e-5"], ["true", "1e-5"]),
        (["--names", "--not a flag"], ["--not a flag"]),
    ],
)
def test_a_list_of_texts_is_given_item_by_item(argv, names):
    assert parse(Script, argv=argv)[0].names == names


def test_a_list_of_numbers_needs_no_brackets():
    assert parse(Script, argv=["--sizes", "8"])[0].sizes == [8]
    assert parse(Script, argv=["--sizes", "8, 16", "--sizes", "[32]"])[0].sizes == [8, 16, 32]


def test_optional_is_unset_with_null(tmp_path):
    assert read(tmp_path, "limit: 3\n", "--limit", "null")[0].limit is None


def test_text_that_looks_like_a_number_or_flag():
    assert parse(Script, argv=["--model", "1e-5"])[0].model == "1e-5"
    assert parse(Script, argv=["--model=--x y"])[0].model == "--x y"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1\n", "unknown key 'lerning_rate' (nearest: 'learning_rate'); valid keys: model, resume"),
        (
            "budget:\n  stpes: 2\n",
            "unknown key 'budget.stpes' (nearest: 'budget.steps'); valid keys of budget: steps, ",
        ),
        ("arms:\n- steps: 1\n- stpes: 2\n", "unknown key 'arms[1].stpes' (nearest: 'arms[1].steps')"),
        ("zzz: 1\n", "unknown key 'zzz'; valid keys: model"),
        ("3: 1\n", "unknown key '3'"),
        ("limit: abc\n", "key 'limit': expected int or null, got 'abc'"),
        ("budget:\n  steps: 1.5\n", "key 'budget.steps': expected int, got '1.5'"),
        ("budget:\n  step: foo\n", "key 'budget.step': expected one of 'sgd', 'adam', got 'foo'"),
        ("model: no\n", "quote the word"),
        ("budget:\n  steps: -1\n", "key 'budget.steps': steps must be >= 0, got -1"),
        ("arms:\n- steps: 1\n- steps: -3\n", "key 'arms[1].steps': steps must be >= 0, got -3"),
        ("learning_rate: 0\n", "key 'learning_rate': learning_rate must be > 0, got 0.0"),
        ("limit: 1\nlimit: 2\n", "'limit' is given twice"),
        ("arms:\n- steps: abc\n", "key 'arms', 'steps' of an item: expected int, got 'abc'"),
        ("budget: 3\n", "key 'budget': expected a block of steps, step, nats, got 3"),
        ("budget:\n", "key 'budget': expected a block of steps, step, nats, got nothing (null)"),
        ("model:\n", "key 'model': expected str, got nothing (null)"),
        ("arms: 5\n", "key 'arms': expected a list, each item a block of steps, step, nats, got 5"),
        ("arms:\n- 3\n", "key 'arms[0]': expected a block of steps, step, nats, got 3"),
        ("sizes: 8\n", "key 'sizes': expected a list, each item int, got 8"),
        ("weights:\n  a: x\n", "key 'weights': expected dict[str, float], got 'x'"),
        ("a: [\n", "not valid YAML"),
        ("- a\n", "expected 'key: value' lines, got list"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(tmp_path, text, expected):
    message = refused(tmp_path, text)
    assert "recipe.yaml: " in message
    assert expected in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--budget.stpes", "2"], "unknown flag '--budget.stpes' (nearest: '--budget.steps')"),
        (["--modle=x"], "unknown flag '--modle' (nearest: '--model')"),
        (["--mod", "x"], "unknown flag '--mod'"),
        (["--model.size", "3"], "unknown flag '--model.size'"),
        (["--budget.steps", "abc"], "--budget.steps: expected int, got 'abc'"),
        (["--budget.steps=-1"], "--budget.steps: steps must be >= 0, got -1"),
        (["--learning_rate", "0"], "--learning_rate: learning_rate must be > 0"),
        (["--budget", "{stpes: 4}"], "--budget: unknown key 'budget.stpes' (nearest: 'budget.steps')"),
        (["--arms", "[{steps: -4}]"], "--arms: key 'arms[0].steps': steps must be >= 0, got -4"),
        (["--arms", "{a: ["], "--arms: not valid YAML"),
        (["word"], "unrecognized arguments: word"),
        (["--config"], "--config needs a path"),
        (["--config", "nowhere.yaml"], "config file 'nowhere.yaml' does not exist"),
        (["--model"], "expected one argument"),
    ],
)
def test_a_mistake_in_a_flag_names_it(tmp_path, flags, expected):
    assert expected in refused(tmp_path, "", *flags)


def test_a_missing_required_key_is_named(tmp_path):
    with pytest.raises(ConfigError, match="required: output; set each in the recipe or with its --key"):
        parse(Needs, argv=[])
    assert parse(Needs, argv=["--output", "x"])[0].output == "x"
    (tmp_path / "recipe.yaml").write_text("output: y\n")
    assert parse(Needs, argv=["--config", str(tmp_path / "recipe.yaml")])[0].output == "y"


def test_dump_reads_back_as_the_same(tmp_path):
    first = read(tmp_path, "arms:\n- steps: 2\nweights: {x: 1}\nlearning_rate: 1e-5\n")
    again = read(tmp_path, yaml.safe_dump(json.loads(json.dumps(dump(*first)))))
    assert again == first


def test_help_shows_the_field_texts_without_torch():
    code = (
        "import sys; from vgf_llm.settings.parse import parse; from tests.settings.test_parse import Script\n"
        "try: parse(Script, argv=['--help'], prog='x', description='Does y.')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Flow steps (count, >= 0)." in run.stdout and "--budget.steps" in run.stdout and "Does y." in run.stdout

"""`reward-check` of composed rewards: by their file, and by a recipe that names one."""

from __future__ import annotations

import json

import pytest

from reward_models import check
from tests.reward_models.checked import pairs_of, write_pairs
from tests.reward_models.test_check import lines_of, spoken
from vgf_llm.errors import ConfigError

SOUND = """
sum:
  - {reward: "composed_mine:good", weight: 4.0}
  - {reward: brevity, weight: 0.01}
require:
  - {reward: without_words, arguments: {banned: [sorry]}}
"""


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """A reward of good words, and the file that composes it."""
    (tmp_path / "composed_mine.py").write_text(
        "def good(prompts, responses): return [float(one.split()[0].strip('.') in GOOD) for one in responses]\n"
        "def asks(prompts, responses, answer): return [0.0 for _ in responses]\n"
        "GOOD = 'bright lamp sentence write one'.split()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text=SOUND):
        (tmp_path / "reward.yaml").write_text(text)
        return str(tmp_path / "reward.yaml")

    return write


def test_a_composed_reward_is_checked_as_a_function(reward, tmp_path, capsys):
    code, lines = lines_of(reward(), tmp_path, capsys)
    assert spoken(lines) == {} and code == 0, {name: lines[name] for name in spoken(lines)}
    assert lines["weights"]["value"] == "none" and lines["padding"]["verdict"] == "skip"
    assert lines["parts"]["value"].startswith("mean of without_words 1 on 60, good 0.5 on 60, brevity -")
    assert {lines[name]["verdict"] for name in ("numbers", "spread", "accuracy", "length", "calibration")} == {"pass"}


def test_parts_that_no_response_reaches_are_named(reward, tmp_path, capsys):
    path = reward("reward: brevity\nrequire: [{reward: words_within, arguments: {at_least: 99}}]\n")
    code, lines = lines_of(path, tmp_path, capsys)
    assert code == 1 and spoken(lines) == {"parts": "warn", "spread": "fail"}
    assert lines["parts"]["value"] == "mean of words_within 0 on 60, brevity on 0 responses"
    assert "no response keeps the constraints before brevity" in lines["parts"]["advice"]


@pytest.mark.parametrize(
    "recipe",
    [
        "reward: brevity\nweight: 0.5",  # composed itself
        "rewards: [{path}]\noutput_dir: outputs/none\nvalue: learned",
        "kind: table\nreward: {path}\noutput_dir: outputs/none",
        "reward_function: {path}\noutput_dir: outputs/none",
        "gold: {path}\nprompts: a.jsonl",
        "reward_model: {path}\ngold: vader_compound",
    ],
)
def test_a_recipe_that_names_one(reward, tmp_path, capsys, recipe):
    path, file = reward(), tmp_path / "recipe.yaml"
    file.write_text(recipe.replace("{path}", path))
    data = write_pairs(tmp_path / "pairs.jsonl", pairs_of(10))
    check.main([str(file), "--dataset", str(data), "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["reward_model"] == (path if "{path}" in recipe else str(file))
    assert "parts" in [line["check"] for line in found["lines"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sum: [{reward: brevity, wieght: 2}]", "reward.yaml.*wieght"),
        ("reward: brevity\nstandardise: true", "'brevity' has standardise: true.*give fixed ones"),
        ('reward: "composed_mine:asks"', "asks takes 'answer', and the prompts' rows have no such column"),
        ("rewards: [brevity, length_words]", r"names 2 rewards \(brevity, length_words\); name one of them"),
    ],
)
def test_faults_come_before_anything_is_scored(reward, text, message):
    with pytest.raises(ConfigError, match=message):
        check.main([reward(text)])

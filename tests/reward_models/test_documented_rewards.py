"""The examples of docs/reward_models.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reward_models import constraints
from reward_models.foreign import text_reward
from reward_models.functions import load_function
from reward_models.inputs import check_rewards
from tests.reward_models.test_endpoint import Server, says
from vgf_llm.data.dialogue import PromptText
from vgf_llm.settings import RewardCallSettings

PAGE = (Path(__file__).parents[2] / "docs" / "reward_models.md").read_text()
PROMPTS = [PromptText("2 + 2?", {"answer": "4", "longest": 3}), PromptText("3 + 3?", {"answer": "6", "longest": 3})]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with every example that names its file, from which the commands are called."""
    named = re.findall(r"```\w+\n(?:\{?# (\S+\.(?:py|yaml|txt))(?: #\})?)\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in named] == ["my_rewards.py", "judge.yaml", "judge.txt", "reward.yaml"]
    for name, text in named:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_functions(folder):
    assert text_reward("my_rewards:correct")(PROMPTS, ["4", "5"]) == [1.0, 0.0]
    assert text_reward("my_rewards:follows")(PROMPTS, ["4", "five"]) == [1.0, 0.0]


def test_a_composed_reward(folder):
    """Right, 1 word: 2 - 0.02. Two words, friendly and a question: -0.04 + compound. A banned word: -1."""
    check_rewards(["reward.yaml"], "reward.yaml", PROMPTS)
    texts = ["4", "Great, right?", "sorry"]
    values, parts = text_reward("reward.yaml").scored([*PROMPTS, PROMPTS[0]], texts)
    compound = load_function("vader_compound")([""], ["Great, right?"])[0]
    assert values == pytest.approx([2 - 0.02, -0.04 + compound, -1.0])
    assert parts["friendly_question"][:2] == pytest.approx([0.0, compound])
    leaves = {"correct", "brevity", "vader_compound", "ends_with_question", "words_within", "without_words"}
    assert set(parts) == leaves | {"friendly_question"}


def test_a_judge(folder, monkeypatch):
    server = Server()
    monkeypatch.setenv("REWARD_URL", server.url)
    server.answer = says("It is right. Score: 9")
    check_rewards(["judge.yaml"], prompts=PROMPTS)
    assert text_reward("judge.yaml", calls=RewardCallSettings())(PROMPTS, ["4", "6"]) == pytest.approx([0.9, 0.9])
    asked = sorted(body["messages"][0]["content"].split("\n")[2] for _, _, body in server.asked)
    assert asked == ["Answer of the student: 4", "Answer of the student: 6"]
    server.http.shutdown()
    server.http.server_close()


def test_tables_are_complete():
    for name in RewardCallSettings.__dataclass_fields__:
        assert f"| `{name}` |" in PAGE
    for name, one in vars(constraints).items():
        if callable(one) and one.__module__ == constraints.__name__ and not name.startswith("_"):
            assert name.endswith("_of") or f"| `{name}` |" in PAGE, name

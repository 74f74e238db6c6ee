"""A composed gold in `evaluate`, and as what fills rewards of logged responses."""

from __future__ import annotations

import json

import pytest

from reward_models.logged import load_logged
from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_tokenizer
from vgf_llm import evaluate
from vgf_llm.errors import ConfigError
from vgf_llm.runs.files import read_jsonl
from vgf_llm.settings import RewardCallSettings

CALLS: list[str] = []


def right(prompts, responses, answer):
    CALLS.extend(responses)
    return [float(response.split()[:1] == [word]) for response, word in zip(responses, answer, strict=True)]


right.version = "1"
GOLD = f"""
sum: [{{reward: "{__name__}:right"}}, {{reward: length_words, weight: 0.5}}]
require: [{{reward: ends_with_question, weight: -1}}, {{reward: words_within, arguments: {{at_least: 1}}}}]
"""


def test_components_of_a_gold_are_in_every_row_and_in_the_summary(tmp_path):
    """No response of the tiny model ends with a question, so the first constraint is broken, and nothing is scored."""
    base = build_llama()
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    RewardModel.from_base(base, num_layers=1).save_pretrained(tmp_path / "reward")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "the sea", "answer": "blue"}) + "\n")
    arguments = ["--model_name_or_path", str(tmp_path / "base"), "--reward_model", str(tmp_path / "reward")]
    arguments += ["--prompts", str(tmp_path / "p.jsonl"), "--best_of", "[2]", "--budgets", "[{nats: 1}]"]
    arguments += ["--num_particles", "2", "--draws", "1", "--max_new_tokens", "5"]
    arguments += ["--gold", str(tmp_path / "gold.yaml"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "gold.yaml").write_text(GOLD.replace("weight: -1", "weight: 1"))
    assert evaluate.main(arguments) == 0
    rows = list(read_jsonl(tmp_path / "out" / "rows.jsonl"))
    assert all(row["gold_parts"]["right"] == [None] * (len(row["gold"]) + 1) for row in rows)
    assert all(row["gold_parts"]["ends_with_question"] == [0.0] * (len(row["gold"]) + 1) for row in rows)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["arms"]
    assert all(arm["gold"]["mean"] == 0 == arm["gold.ends_with_question"]["mean"] for arm in summary.values())
    assert all(arm["gold.right"] is None for arm in summary.values())
    (tmp_path / "gold.yaml").write_text(GOLD)  # another gold, so another run
    with pytest.raises(ConfigError, match="started with other settings .gold_contents;"):
        evaluate.main([*arguments, "--resume"])


def test_logged_responses_are_scored_once_and_kept(tmp_path):
    (tmp_path / "gold.yaml").write_text(GOLD.split("require")[0])
    rows = [{"prompt": "the sea", "response": text, "answer": "blue"} for text in ("blue it is", "red")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = RewardCallSettings(reward_cache=str(tmp_path / "cache.sqlite"))
    CALLS.clear()
    for _ in range(2):
        found = load_logged(str(tmp_path / "r.jsonl"), reward_function=str(tmp_path / "gold.yaml"), calls=calls)
        assert [row.reward for row in found] == [2.5, 0.5]
    assert CALLS == ["blue it is", "red"]

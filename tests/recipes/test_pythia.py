"""Every stage of the Pythia recipes for two steps, on a two-layer GPT-NeoX and local data of the hub's columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reward_models.train import main as reward
from tests.conftest import build_neox, build_tokenizer
from vgf_llm.evaluate import main as evaluate
from vgf_llm.generate import main as generate
from vgf_llm.runs.files import read_jsonl

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "bf16": "false",
    "fidelity_responses": 2,
    "fidelity_substitutions": 9,
    "fidelity_shortlist": 4,
}
NOUNS = ("dog", "cat", "sea", "tea", "tree", "house", "rain", "train")


def dialogue(noun: str, answer: str) -> str:
    return f"\n\nHuman: write about the {noun}\n\nAssistant: this {noun} is old\n\nHuman: and ?\n\nAssistant: {answer}"


def tldr_rows() -> tuple[list[dict], list[dict]]:
    posts = [f"SUBREDDIT: r/{noun} TITLE: {noun} POST: my {noun} is old TL;DR:" for noun in NOUNS]
    pairs = [{"prompt": post, "chosen": " a happy day", "rejected": " a sad night", "info": {}} for post in posts]
    return pairs, [{"prompt": post, "completion": " a day"} for post in posts]


def hh_rows() -> tuple[list[dict], list[dict]]:
    pairs = [{"chosen": dialogue(n, "a good day"), "rejected": dialogue(n, "a bad night")} for n in NOUNS]
    return pairs, pairs


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flags(recipe: Path, **values: object) -> list[str]:
    return ["--config", str(recipe), *(token for key, value in values.items() for token in (f"--{key}", str(value)))]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "rows"), [("tldr", tldr_rows), ("hh", hh_rows)])
def test_two_steps_of_every_stage(task, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the recipes' own output folders, but here
    recipe = RECIPES / f"pythia_{task}"
    pairs, prompts = rows()
    pairs_file, prompts_file = write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "prompts.jsonl", prompts)
    base = tmp_path / "base"
    build_neox().save_pretrained(base)
    build_tokenizer(chat=False).save_pretrained(base)
    model = {"model_name_or_path": base, "pad_token": "<pad>"}

    training = {**model, **SMALL, "train_dataset": pairs_file, "eval_dataset": pairs_file, "max_length": 96}
    assert reward(flags(recipe / "reward.yaml", **training)) == 0
    held_out = {**training, "seed": 1, "output_dir": f"outputs/pythia_{task}/held_out"}
    assert reward(flags(recipe / "reward.yaml", **held_out)) == 0
    card = json.loads((tmp_path / "outputs" / f"pythia_{task}" / "reward" / "reward_card.json").read_text())
    assert card["train_pairs"] == len(pairs) and not card["chat_template"]

    sizes = {"num_prompts": 2, "max_new_tokens": 6, "best_of": "[2, 4]", "num_particles": 2, "dtype": "float32"}
    capsys.readouterr()
    assert evaluate(flags(recipe / "evaluate.yaml", **model, **sizes, prompts=prompts_file)) == 0
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert {"base", "best-of-2", "best-of-4"} < set(json.loads(last_line))

    sizes.pop("best_of")
    assert generate(flags(recipe / "generate.yaml", **model, **sizes, prompts=prompts_file)) == 0
    answers = read_jsonl(tmp_path / "outputs" / f"pythia_{task}" / "responses.jsonl")
    assert len(answers) == 2 and all(answer["value"] >= answer["original_value"] for answer in answers)

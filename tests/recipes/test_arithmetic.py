"""The recipe of additions: its data are right and disjoint, its reward reads the answer, and both stages run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from recipes.arithmetic import make_data
from recipes.arithmetic.correct import closeness, exact_match
from tests.conftest import build_llama, build_tokenizer
from vgf_llm.evaluate import main as evaluate
from vgf_llm.runs.files import read_jsonl
from vgf_llm.train import main as train

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "arithmetic"


def test_problems_are_right_disjoint_and_those_of_the_repository(tmp_path):
    make_data.main(["--output", str(tmp_path)])
    seen: set[tuple[int, ...]] = set()
    for name, size in make_data.PAIRS.items():
        file = f"problems_{name}.jsonl"
        assert (tmp_path / file).read_text() == (RECIPE / "data" / file).read_text()
        rows = list(read_jsonl(tmp_path / file))
        numbers = [tuple(map(int, re.findall(r"\d+", row["prompt"]))) for row in rows]
        assert [sum(pair) for pair in numbers] == [int(row["answer"]) for row in rows]
        pairs = {tuple(sorted(pair)) for pair in numbers}
        assert len(pairs) == size and len(numbers) == sum(2 - (a == b) for a, b in pairs)  # both orders
        assert not seen & pairs
        seen |= pairs
    assert len(seen) == sum(make_data.PAIRS.values())


def test_the_last_number_of_a_response_is_its_answer():
    responses = ["4", "2 + 2 is 4.", "4 or 5", "four", "-4", "1,004", "4" * 5000]
    answers = ["4"] * 5 + ["1004", "4"]
    assert exact_match([""] * 7, responses, answers) == [1, 1, 0, 0, 0, 1, 0]
    assert closeness([""] * 5, responses[:5], answers[:5]) == [1, 1, 0.5, 0, 1 / 9]


def test_two_steps_and_an_evaluation_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipe's data and composed rewards
    build_llama().save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    common = ["--model_name_or_path", str(tmp_path / "base"), "--num_prompts", "4", "--num_particles", "2"]
    arguments = ["--output_dir", str(tmp_path / "vgf"), "--reward_cache", str(tmp_path / "rewards.sqlite")]
    arguments += ["--max_steps", "2", "--lora_r", "2", "--per_device_train_batch_size", "2"]
    assert train(["--config", str(RECIPE / "vgf.yaml"), *common, *arguments]) == 0
    line = list(read_jsonl(tmp_path / "vgf" / "metrics.jsonl"))[-1]
    assert line["gold/original"] == 0 == line["reward_training.exact_match/original"]  # the tiny model has no digits
    assert (tmp_path / "rewards.sqlite").is_file()
    arguments = ["--output_dir", str(tmp_path / "evaluation"), "--reward_model", str(tmp_path / "vgf" / "value")]
    assert evaluate(["--config", str(RECIPE / "evaluate.yaml"), *common, *arguments, "--best_of", "[2]"]) == 0
    assert "gold.exact_match" in json.loads((tmp_path / "evaluation" / "summary.json").read_text())["arms"]["base"]

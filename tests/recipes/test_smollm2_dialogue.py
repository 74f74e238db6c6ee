"""The dialogue recipe's data: no first turn in two files, nothing dropped uncounted; its gold function's scale."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from recipes import held_out
from recipes.smollm2_dialogue import gold, make_data
from reward_models.train import main as reward
from tests.conftest import build_llama, build_tokenizer
from vgf_llm.answering.pipeline import prompt_text
from vgf_llm.data.dialogue import HUMAN
from vgf_llm.data.prompts import PreferencePair, load_preferences, load_prompts
from vgf_llm.errors import DataError, ModelError
from vgf_llm.evaluate import main as evaluate
from vgf_llm.generate import main as generate
from vgf_llm.runs.files import read_jsonl

ROOT = Path(__file__).parents[2]
SOURCE = ROOT.parent / "shared" / "data" / "hh_harmless_base_test_part.jsonl.gz"
SIZES = make_data.Sizes(validation_prompts=3, test_prompts=5, validation_share=0.25)
PAIR_FILES = [f"preferences_{part}{kind}.jsonl" for part in ("reward", "held_out") for kind in ("", "_validation")]
PROMPT_FILES = ["prompts_validation.jsonl", "prompts_test.jsonl"]


def dialogue(first: str, answer: str, turns: int = 1) -> str:
    between = "\n\nAssistant: it is old\n\nHuman: and ?" * (turns - 1)
    return f"\n\nHuman: {first}{between}\n\nAssistant: {answer}"


def pair(first: str, turns: int = 1) -> PreferencePair:
    return PreferencePair(dialogue(first, "", turns).rstrip(" "), " good", " bad")


def write(path: Path, rows: list[dict]) -> str:
    with gzip.open(path, "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def turns_of(rows: list[dict]) -> set[str]:
    """First human turns, found without the code under test."""
    texts = [row["prompt"].split("\n\nHuman:")[1].split("\n\nAssistant:")[0] for row in rows]
    return {" ".join(text.lower().split()) for text in texts}


def check_disjoint(files: dict[str, list[dict]]) -> None:
    turns = {name: turns_of(rows) for name, rows in files.items()}
    assert sorted(files) == sorted(PAIR_FILES + PROMPT_FILES) and all(turns.values())
    assert len(set().union(*turns.values())) == sum(map(len, turns.values()))


def test_a_first_turn_is_in_one_file_whatever_its_case_and_spaces():
    """20 first turns: 8 are prompts; of the other 12 each part has 6, round(0.25 * 6) = 2 of them for validation."""
    firsts = [f"turn {number}" for number in range(20)]
    pairs = [pair(first) for first in firsts] + [pair(f" TURN  {number}", turns=2) for number in range(20)]
    files, unused = make_data.split(pairs, SIZES)
    check_disjoint(files)
    assert {name: len(rows) for name, rows in files.items()} == {
        "preferences_reward.jsonl": 8,  # 4 first turns, two pairs each
        "preferences_reward_validation.jsonl": 4,
        "preferences_held_out.jsonl": 8,
        "preferences_held_out_validation.jsonl": 4,
        "prompts_validation.jsonl": 3,  # one prompt a first turn
        "prompts_test.jsonl": 5,
    }
    assert unused == 16


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_source():
    pairs = [pair(f"turn {number}") for number in range(20)]
    assert make_data.split(pairs, SIZES) == make_data.split(pairs[::-1], SIZES)
    assert make_data.split(pairs, SIZES) != make_data.split(pairs, SIZES, seed=1)


def test_too_few_dialogues_are_refused():
    with pytest.raises(DataError, match="9 different first turns are too few: 8 become prompts"):
        make_data.split([pair(f"turn {number}") for number in range(9)], SIZES)


def test_equal_long_and_early_diverging_pairs_are_dropped_and_counted(tmp_path):
    good = [{"chosen": dialogue(f"the {n}", "good"), "rejected": dialogue(f"the {n}", "bad")} for n in range(20)]
    equal = {"chosen": dialogue("equal", "same"), "rejected": dialogue("equal", " same")}
    long = {"chosen": dialogue("long", "good", turns=9), "rejected": dialogue("long", "bad", turns=9)}
    early = {"chosen": dialogue("early", "a\n\nHuman: b\n\nAssistant: c"), "rejected": dialogue("early", "d")}
    source = write(tmp_path / "hh.jsonl.gz", [*good, equal, long, early])
    pairs, dropped = make_data.read_pairs(source, build_tokenizer(), max_prompt_tokens=40)
    assert len(pairs) == 20 and {make_data.first_turn(p) for p in pairs} == {f"the {n}" for n in range(20)}
    assert {reason: count for reason, count in dropped.items() if count} == {
        "with chosen == rejected": 1,
        "that diverge before the last turn": 1,
        "with a prompt over 40 tokens": 1,
    }
    with pytest.raises(DataError, match="are longer than 2 tokens; raise --max_prompt_tokens"):
        make_data.read_pairs(source, build_tokenizer(), max_prompt_tokens=2)


def test_files_are_whole_and_the_same_again_and_faults_leave_them_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_data, "load_tokenizer", build_tokenizer)
    rows = [{"chosen": dialogue(f"é {n}", "good", 2), "rejected": dialogue(f"é {n}", "bad", 2)} for n in range(130)]
    arguments = ["--source", write(tmp_path / "hh.jsonl.gz", rows), "--output", str(tmp_path / "data")]
    assert make_data.main(arguments) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line == {name: len(content.splitlines()) for name, content in files.items()}
    assert last_line["prompts_validation.jsonl"] == 30 and last_line["prompts_test.jsonl"] == 80

    write(tmp_path / "no_column.jsonl.gz", [{"chosen": rows[0]["chosen"]}])
    for name, message in (("missing.jsonl.gz", "does not exist"), ("no_column.jsonl.gz", "no column 'rejected'")):
        with pytest.raises(DataError, match=message):
            make_data.main(["--source", str(tmp_path / name), *arguments[2:]])
    make_data.main(arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == files


def test_loaders_and_the_gold_function_see_the_whole_dialogue(tmp_path):
    files, _ = make_data.split([pair(f"the turn {number}", turns=3) for number in range(20)], SIZES)
    for name in (PAIR_FILES[0], PROMPT_FILES[0]):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in files[name]))
    prompts = load_prompts(str(tmp_path / PROMPT_FILES[0]))
    assert [prompt_text(prompt) for prompt in prompts] == [row["prompt"] for row in files[PROMPT_FILES[0]]]
    assert all(prompt_text(prompt).count(HUMAN) == 3 for prompt in prompts)
    kept = load_preferences(str(tmp_path / PAIR_FILES[0]))
    assert [p.prompt for p in kept.pairs] == [row["prompt"] for row in files[PAIR_FILES[0]]]


@pytest.mark.skipif(not SOURCE.is_file(), reason=f"the dialogues are no part of the project: no {SOURCE.name}")
def test_the_real_dialogues_are_cut_without_leaks(tmp_path, capsys):
    assert make_data.main(["--source", str(SOURCE), "--output", str(tmp_path)]) == 0
    files = {path.name: read_jsonl(path) for path in tmp_path.iterdir()}
    check_disjoint(files)
    assert {name: len(rows) for name, rows in files.items()} == json.loads(capsys.readouterr().out)
    assert len(files["prompts_validation.jsonl"]) == 30 and len(files["prompts_test.jsonl"]) == 80
    assert all(len(files[name]) > (100 if "validation" in name else 500) for name in PAIR_FILES)


def test_gold_is_standardised_by_the_card_and_says_what_is_missing(tmp_path, monkeypatch):
    gold._scale.cache_clear()
    monkeypatch.setattr(gold, "FOLDER", tmp_path)
    monkeypatch.setattr(gold, "score", lambda folder, prompts, responses, room: [3.0, 0.0])
    with pytest.raises(ModelError, match="train the model again with reward_held_out.yaml"):
        gold.held_out(["a", "b"], ["c", "d"])
    (tmp_path / "reward_card.json").write_text('{"score_mean": 1.0, "score_std": 0.5}')
    assert gold.held_out(["a", "b"], ["c", "d"]) == [4.0, -2.0]
    gold._scale.cache_clear()


def test_the_room_of_a_response_is_the_same_in_every_recipe():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in Path(gold.__file__).parent.glob("*.yaml")}
    assert {recipes[name]["max_new_tokens"] for name in ("evaluate", "generate")} == {gold.MAX_NEW_TOKENS}
    held_out = recipes["reward_held_out"]
    assert held_out["output_dir"] == str(gold.FOLDER) and held_out["max_response_length"] == gold.MAX_NEW_TOKENS
    assert recipes["reward"]["train_dataset"] != held_out["train_dataset"]


@pytest.mark.slow
def test_two_steps_of_every_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the recipes' own output folders, but here
    monkeypatch.setattr(make_data, "load_tokenizer", build_tokenizer)
    held_out._load.cache_clear()
    gold._scale.cache_clear()
    good, bad = "a good day and a blue sea", "a bad night and the old rain"
    rows = [{"chosen": dialogue(f"the {n}", good, 2), "rejected": dialogue(f"the {n}", bad, 2)} for n in range(130)]
    assert make_data.main(["--source", write(tmp_path / "hh.jsonl.gz", rows)]) == 0
    build_llama().save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    model = {"model_name_or_path": tmp_path / "base"}
    small = {"max_steps": 2, "gradient_accumulation_steps": 1, "bf16": "false", "max_length": 96}
    fidelity = {"fidelity_responses": 2, "fidelity_substitutions": 9, "fidelity_shortlist": 4}
    assert reward(flags("reward", **model, **small, **fidelity, num_layers=1)) == 0
    assert reward(flags("reward_held_out", **model, **small, num_layers=2)) == 0

    sizes = {"num_prompts": 2, "max_new_tokens": 6, "num_particles": 2, "dtype": "float32"}
    capsys.readouterr()
    arms = {"best_of": "[2, 4]", "baselines": "[base, best-of-2]"}
    assert evaluate(flags("evaluate", **model, **sizes, **arms)) == 0
    assert {"base", "best-of-2", "best-of-4"} < set(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    assert generate(flags("generate", **model, **sizes)) == 0
    answers = read_jsonl(tmp_path / "outputs" / "smollm2_dialogue" / "responses.jsonl")
    assert len(answers) == 2 and all(answer["prompt"].count(HUMAN) == 2 for answer in answers)


def flags(recipe: str, **values: object) -> list[str]:
    path = Path(gold.__file__).parent / f"{recipe}.yaml"
    return ["--config", str(path), *(token for key, value in values.items() for token in (f"--{key}", str(value)))]

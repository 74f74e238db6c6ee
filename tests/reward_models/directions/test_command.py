"""`vgf-llm direction` on a Python function and on a reward model, and its faults by name."""

from __future__ import annotations

import json

import pytest
import torch

from reward_models.directions.saving import load_direction
from reward_models.directions.settings import DirectionScript, DirectionTraining
from reward_models.directions.targets import BonusTargets
from reward_models.loading import save_reward_model
from reward_models.modelling import RewardModel
from reward_models.train_direction import main
from tests.reward_models.test_secant import value_model
from vgf_llm.cli import run_main


def likes_cats(prompts, responses, bonus=1.0):
    """Reward cats, by as much as the row says."""
    return [float(response.split().count("cat")) + 0.1 * len(response.split()) for response in responses]


def never(prompts, responses):
    """Fail where anything is scored."""
    raise AssertionError("asked")


@pytest.fixture
def command(tmp_path, tiny_lm, tiny_tokenizer):
    """A base, a reward model, prompts, and the flags of a quick fit."""
    for part in ("base", "value"):
        tiny_tokenizer.save_pretrained(tmp_path / part)
    tiny_lm.save_pretrained(tmp_path / "base")
    save_reward_model(value_model(tiny_lm), tmp_path / "value")
    for name, words in (("fit", ["dog", "cat", "sea", "train", "house"]), ("unseen", ["rain", "tea"])):
        rows = "".join(json.dumps({"prompt": f"write about the {word}"}) + "\n" for word in words)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    values = {
        "kind": "causal",
        "model_name_or_path": tmp_path / "base",
        "prompts": tmp_path / "fit.jsonl",
        "validation_prompts": tmp_path / "unseen.jsonl",
        "max_new_tokens": 5,
        "top_k": 20,
        "shortlist": 12,
        "substitutions": 10,
        "validation_substitutions": 24,
        "steps": 5,
        "hidden": 8,
    }
    return lambda **changes: [str(part) for key, value in (values | changes).items() for part in (f"--{key}", value)]


@pytest.mark.parametrize("kind", ["table", "constant", "causal"])
def test_on_a_function(kind, command, tmp_path, capsys, tiny_lm, tiny_tokenizer):
    folder = tmp_path / "out"
    reward = "tests.reward_models.directions.test_command:likes_cats"
    assert main(command(kind=kind, reward=reward, output_dir=folder, gold="length_words", contexts=2)) == 0
    out, told = capsys.readouterr()
    figures = json.loads(out)
    facts = json.loads((folder / "direction.json").read_text())
    assert facts["fidelity"] == figures["fidelity"] and "weighted correlation" in told
    expected = {"causal", "constant"} if kind == "causal" else {kind}
    assert set(figures["fidelity"]) == {"reward", "gold"} and set(figures["fidelity"]["gold"]) == expected
    found = figures["fidelity"]["reward"][kind]
    assert found["weighted_correlation_low"] <= found["weighted_correlation"] <= found["weighted_correlation_high"]
    assert found["prompts"] == 2 and figures["calls"]["fit"] > 0 and figures["calls"]["measure"] > 0
    assert set(facts["seconds"]) == {"sample", "score", "fit", "measure"}
    assert facts["fitted_to"]["reward"] == reward and facts["settings"]["seed"] == 0
    load_direction(folder, tiny_lm, tiny_tokenizer, reward=reward)


@pytest.mark.parametrize("target", ["swap", "regrow"])
def test_on_a_reward_model_it_is_saved_beside_it(target, command, tmp_path, capsys, tiny_lm, tiny_tokenizer):
    assert main(command(reward=tmp_path / "value", target=target)) == 0
    capsys.readouterr()
    load_direction(tmp_path / "value" / "directions" / "causal", tiny_lm, tiny_tokenizer)


def test_the_weights_of_objectives_are_kept(command, tmp_path, capsys, tiny_lm, tiny_tokenizer):
    model = RewardModel.from_base(tiny_lm, num_layers=1, objectives=["good", "long"])
    torch.nn.init.normal_(model.head.weight)
    save_reward_model(model, tmp_path / "value")
    assert main(command(reward=tmp_path / "value", kind="constant", reward_outputs="{'1': 0.5}")) == 0
    capsys.readouterr()
    folder = tmp_path / "value" / "directions" / "constant"
    assert json.loads((folder / "direction.json").read_text())["fitted_to"]["reward_outputs"] == {"long": 0.5}


def test_a_secant_head_is_the_secant_commands(command, tmp_path, capsys):
    assert main(command(kind="secant", reward=tmp_path / "value")) == 0
    assert "spearman_after" in json.loads(capsys.readouterr().out)
    assert (tmp_path / "value" / "secant.json").is_file()


@pytest.mark.parametrize("kind", ["table", "causal"])
def test_guided_responses_are_fitted_too(kind, command, tmp_path, capsys):
    rows = [{"prompt": "write about the tree", "response": "the cat is good and my cat is great"}] * 2
    (tmp_path / "guided.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward, found = "tests.reward_models.directions.test_command:likes_cats", {}
    for name, more in (("alone", {}), ("guided", {"guided": tmp_path / "guided.jsonl"})):
        assert main(command(kind=kind, reward=reward, output_dir=tmp_path / "out", **more)) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["guided"]["calls"]["fit"] > found["alone"]["calls"]["fit"]
    (tmp_path / "guided.jsonl").write_text(json.dumps({"prompt": "write about the tree", "answer": "cat"}) + "\n")
    assert run_main(main, command(reward=reward, output_dir=tmp_path / "out", guided=tmp_path / "guided.jsonl")) == 2
    assert "no text in column 'response', got None; columns: answer" in capsys.readouterr().err
    (tmp_path / "guided.jsonl").write_text(json.dumps({"prompt": "write about the tea", "response": "cat"}) + "\n")
    assert run_main(main, command(reward=reward, output_dir=tmp_path / "out", guided=tmp_path / "guided.jsonl")) == 2
    assert "row 0: the prompt is in" in capsys.readouterr().err
    talk = {"prompt": [{"role": "user", "content": "write about the tea"}], "response": "cat"}
    (tmp_path / "guided.jsonl").write_text(json.dumps(talk) + "\n")
    assert run_main(main, command(reward=reward, output_dir=tmp_path / "out", guided=tmp_path / "guided.jsonl")) == 2
    assert "row 0: the prompt is in" in capsys.readouterr().err


def test_guided_responses_to_prompts_of_the_fit_are_held_back_with_them(command, tmp_path, capsys, monkeypatch):
    """The fifth prompt is held back: its guided response is not fitted to."""
    rows = [{"prompt": f"write about the {word}", "response": "my cat is great"} for word in ("house", "tree", "dog")]
    (tmp_path / "guided.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held, split = [], BonusTargets.split

    def seen(targets):
        parts = split(targets)
        held.append([sorted(part.prompt_X.unique().tolist()) for part in parts])
        return parts

    monkeypatch.setattr(BonusTargets, "split", seen)
    reward = "tests.reward_models.directions.test_command:likes_cats"
    flags = command(kind="constant", reward=reward, output_dir=tmp_path / "out", guided=tmp_path / "guided.jsonl")
    assert main(flags) == 0
    assert held[0] == [[0, 1, 2, 3, 5], [4]]
    assert "2 of 3 responses are to prompts of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "target"), [("table", "swap"), ("constant", "swap"), ("causal", "regrow"), ("constant", "lookahead")]
)
def test_what_nothing_can_be_fitted_to_is_refused_before_the_reward_is_asked(kind, target, command, tmp_path, capsys):
    reward = tmp_path / "value" if target == "lookahead" else "tests.reward_models.directions.test_command:never"
    flags = {"kind": kind, "target": target, "reward": reward, "output_dir": tmp_path / "out"}
    assert run_main(main, command(**flags, top_p=1e-6)) == 2
    assert "unseen.jsonl: no response of the base has a token that could be replaced (0 of" in capsys.readouterr().err
    if kind != "table":
        (tmp_path / "fit.jsonl").write_text(json.dumps({"prompt": "write about the dog"}) + "\n")
        assert run_main(main, command(**flags)) == 2
        assert "two prompts at least" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(command, tmp_path, capsys):
    def told(**changes):
        assert run_main(main, command(**changes)) == 2
        return capsys.readouterr().err

    assert "which has no folder; set output_dir" in told(reward="length_words")
    assert "reward function 'lenght' does not exist" in told(reward="lenght", output_dir=tmp_path / "out")
    assert "prompt 0 is in" in told(reward=tmp_path / "value", validation_prompts=tmp_path / "fit.jsonl")
    assert "set target to swap" in told(reward=tmp_path / "value", kind="table", target="regrow")
    assert "is not a folder" in told(reward="length_words", kind="secant")
    assert "drop gold" in told(reward=tmp_path / "value", kind="secant", gold="length_words")
    assert "table_calls must be at least contexts" in told(reward=tmp_path / "value", table_calls=2)
    (tmp_path / "fit.jsonl").write_text(json.dumps({"prompt": "write about the dog"}) + "\n")
    assert "give more prompts" in told(reward=tmp_path / "value")


def test_settings_name_the_key():
    for key, seen in (("contexts", 0), ("target", "other"), ("table_calls", 3), ("steps", 0)):
        with pytest.raises(ValueError, match=key):
            DirectionTraining(**{key: seen})
    with pytest.raises(ValueError, match="kind must be table"):
        DirectionScript(kind="other", reward="r", prompts="p", validation_prompts="v")

"""Reward and value trainings that are cut: what was published is whole, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from transformers import Trainer

from reward_models import train, train_value
from reward_models.card import read_card
from reward_models.loading import load_reward_model
from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining
from reward_models.value_settings import ValueScript, ValueTraining
from tests.reward_models.test_train_value import toy_rows as logged_rows
from tests.reward_models.test_training import toy_rows
from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.runs.compare import compare_checkpoints
from vgf_llm.runs.files import read_jsonl
from vgf_llm.runs.manifest import verify

STEPS = 6
OBJECTIVES = {"better": "margin", "brief": "brevity"}
KINDS = {
    "reward, all weights, noise, a log line over a checkpoint": ("reward", 0, {"embedding_noise": 0.2}),
    "reward, LoRA with dropout": ("reward", 4, {}),
    "objectives, all weights, uneven": ("objectives", 0, {"gradient_accumulation_steps": 2}),
    "objectives, LoRA with dropout": ("objectives", 4, {}),
    "value, all weights": ("value", 0, {"gradient_accumulation_steps": 2}),
    "value, LoRA with dropout": ("value", 4, {"target_tau": 0.3}),
}


class Killed(BaseException):
    """Ends a run where a kill would."""


@pytest.fixture
def workplace(tmp_path, tiny_lm, tiny_tokenizer, monkeypatch):
    """A base model and rows; returns a function that trains, killed before the step that is given."""
    tiny_lm.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    pairs = [{**row, "brevity": number % 3 - 1} for number, row in enumerate(toy_rows(24))]
    for name, rows in (("pairs", pairs), ("logged", logged_rows(24))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(output="out", kind="reward", lora_r=0, killed=None, **training):
        source = str(tmp_path / ("logged.jsonl" if kind == "value" else "pairs.jsonl"))
        common = {"max_length": 64, "fidelity_responses": 0}
        settings = RewardModelSettings(
            str(tmp_path / "base"), num_layers=1, lora_r=lora_r, lora_dropout=0.2 if lora_r else 0.0
        )
        keys = {
            "max_steps": STEPS,
            "save_steps": 2,
            "logging_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
        } | training
        step = Trainer.training_step

        def dies(trainer, *args, **kwargs):
            if killed is not None and trainer.state.global_step >= killed:
                raise Killed
            return step(trainer, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "training_step", dies)
            if kind != "value":
                objectives = OBJECTIVES if kind == "objectives" else {}
                script = RewardScript(source, str(tmp_path / output), source, **common, objectives=objectives)
                return train.run(script, settings, RewardTraining(**keys))
            value = ValueScript(source, str(tmp_path / output), eval_dataset=source, **common)
            return train_value.run(value, settings, ValueTraining(**keys))

    return run


def results(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_run_that_is_resumed_is_the_uninterrupted_one_bit_for_bit(workplace, tmp_path, kind):
    name, lora_r, changes = KINDS[kind]
    workplace("whole", name, lora_r, **changes)
    with pytest.raises(Killed):
        workplace("cut", name, lora_r, killed=3, **changes)
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(Killed):  # with another seed of the process's own random numbers: the checkpoint brings its own
        workplace("cut", name, lora_r, killed=5, resume=True, **changes)
    workplace("cut", name, lora_r, resume=True, **changes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for step in (4, 6):
        assert compare_checkpoints(whole / f"checkpoint-{step}", cut / f"checkpoint-{step}") == []
    assert results(whole) == results(cut) and results(cut)
    steps = [[row["step"] for row in read_jsonl(folder / "metrics.jsonl")] for folder in (whole, cut)]
    assert steps[0] == steps[1]
    assert verify(cut / "checkpoint-6").identity == verify(whole / "checkpoint-6").identity


def test_resume_true_in_an_empty_folder_starts_anew_and_says_so(workplace, tmp_path, capsys):
    workplace(max_steps=2, resume=True)
    assert "holds no whole checkpoint: starting anew" in capsys.readouterr().err
    load_reward_model(tmp_path / "out")


def test_a_checkpoint_of_another_run_is_refused_by_name_unless_allowed(workplace, tmp_path, capsys):
    workplace(max_steps=2)
    before = results(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"optimisation.learning_rate 0.01 -> 0.02; set them back, .*allow_changes"):
        workplace(max_steps=4, learning_rate=0.02, resume=True)
    with pytest.raises(ConfigError, match=r"loss.centring 0.01 -> 0.5.*optimisation.seed 0 -> 1"):
        workplace(max_steps=4, centring=0.5, seed=1, resume=True)
    assert results(tmp_path / "out") == before
    workplace(max_steps=4, learning_rate=0.02, resume=True, allow_changes=["optimisation.learning_rate"])
    assert "changed since the checkpoint: optimisation.max_steps 2 -> 4" in capsys.readouterr().err
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(toy_rows(1, seed=5)[0]) + "\n")
    with pytest.raises(ConfigError, match="dataset .* -> "):
        workplace(max_steps=6, learning_rate=0.02, resume=True)


def test_a_checkpoint_of_other_objectives_is_refused(workplace, tmp_path, monkeypatch):
    workplace(kind="objectives", max_steps=2)
    config = json.loads((tmp_path / "out" / "checkpoint-2" / "config.json").read_text())
    assert config["objectives"] == list(OBJECTIVES)
    monkeypatch.setitem(OBJECTIVES, "brief", "margin")
    with pytest.raises(ConfigError, match="dataset .* -> "):
        workplace(kind="objectives", max_steps=4, resume=True)
    with pytest.raises(ConfigError, match="objectives"):
        workplace(max_steps=4, resume=True)


def test_a_broken_checkpoint_is_passed_over_and_refused_when_it_is_named(workplace, tmp_path, capsys):
    workplace()
    broken = tmp_path / "out" / "checkpoint-6"
    os.truncate(broken / "optimizer.pt", 100)
    with pytest.raises(CheckpointError, match="resume: checkpoint '.*checkpoint-6': optimizer.pt: size 100 instead of"):
        workplace(resume=str(broken))
    workplace(resume=True)
    assert "checkpoint-6 is skipped" in capsys.readouterr().err
    verify(broken)


def test_going_back_sets_later_checkpoints_aside_and_another_folder_is_not_mixed(workplace, tmp_path):
    workplace()
    out = tmp_path / "out"
    with pytest.raises(Killed):
        workplace(resume=str(out / "checkpoint-2"), killed=3)
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == [
        ".checkpoint-4.superseded",
        ".checkpoint-6.superseded",
        "checkpoint-2",
    ]
    workplace("other", max_steps=2)
    with pytest.raises(ConfigError, match="holds checkpoint-2 of another run"):
        workplace("other", resume=str(out / "checkpoint-2"))


def test_only_so_many_checkpoints_are_kept_and_the_best_one(workplace, tmp_path):
    workplace("few", save_total_limit=1)
    assert [path.name for path in (tmp_path / "few").glob("checkpoint-*")] == ["checkpoint-6"]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    workplace("best", save_total_limit=2, eval_steps=2, trainer_arguments=best)
    kept = sorted(path.name for path in (tmp_path / "best").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-6"]  # the loss was largest at first
    state = json.loads((tmp_path / "best" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "best" / "checkpoint-2")
    assert results(tmp_path / "best") == {
        name: content for name, content in results(tmp_path / "best" / "checkpoint-2").items() if "state" not in name
    }


def test_a_finished_run_that_is_resumed_keeps_its_best_model(workplace, tmp_path, capsys):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = {"save_total_limit": 2, "eval_steps": 2, "trainer_arguments": best}
    workplace(**run)
    out = tmp_path / "out"
    before = results(out)
    assert before["model.safetensors"] == (out / "checkpoint-2" / "model.safetensors").read_bytes()
    workplace(**run, resume=True, killed=0)
    assert "checkpoint-2', the best); raise max_steps" in capsys.readouterr().err
    assert results(out) == before
    shutil.rmtree(out / "checkpoint-2")
    workplace(**run, resume=True, killed=0)
    assert "is not there any more: the result is the last one's" in capsys.readouterr().err
    assert results(out)["model.safetensors"] == (out / "checkpoint-6" / "model.safetensors").read_bytes()


def test_a_run_is_finished_by_the_steps_that_its_settings_ask_for(workplace, tmp_path):
    """24 pairs in batches of 4 are 6 steps per epoch, 3 where two batches make a step."""
    workplace(max_steps=2)
    workplace(max_steps=-1, num_train_epochs=1.0, resume=True)
    assert read_card(tmp_path / "out").training["steps"] == 6
    workplace(max_steps=-1, num_train_epochs=1.0, resume=True, killed=0)
    before = results(tmp_path / "out")
    with pytest.raises(ConfigError, match="checkpoint-6' has 6 steps, and max_steps is 4: name an earlier checkpoint"):
        workplace(max_steps=4, resume=True)
    with pytest.raises(ConfigError, match="has 6 steps, and num_train_epochs asks for 3: name an earlier"):
        workplace(max_steps=-1, num_train_epochs=0.5, resume=True)
    assert results(tmp_path / "out") == before


def test_the_card_adds_up_the_seconds_of_every_leg(workplace, tmp_path):
    workplace(max_steps=2)
    card = tmp_path / "out" / "reward_card.json"
    state = tmp_path / "out" / "checkpoint-2" / "log_state_0.json"
    saved = json.loads(state.read_text())
    assert 0 < saved["figures"]["train_sec"] <= read_card(tmp_path / "out").training["seconds"] + 0.1
    for path in (tmp_path / "out").glob("checkpoint-2/manifest.json"):  # so that the seconds can be set
        path.unlink()
    saved["figures"]["train_sec"] = 1000.0
    state.write_text(json.dumps(saved))
    workplace(max_steps=2, resume=True, killed=0)
    assert read_card(tmp_path / "out").training["seconds"] == 1000.0
    del saved["figures"]["train_sec"]
    state.write_text(json.dumps(saved))
    workplace(max_steps=2, resume=True, killed=0)  # as an earlier version wrote it: the card knows
    assert json.loads(card.read_text())["training"]["seconds"] == 1000.0
    saved["figures"]["train_sec"] = 500.0
    state.write_text(json.dumps(saved))
    workplace(max_steps=4, resume=True)
    assert 500.0 < read_card(tmp_path / "out").training["seconds"] < 900.0


def test_a_checkpoint_of_weights_alone_says_why_it_cannot_be_continued(workplace, tmp_path):
    weights_only = {"trainer_arguments": {"save_only_model": True}}
    workplace(max_steps=2, **weights_only)
    with pytest.raises(CheckpointError, match="holds no optimiser state, as under trainer_arguments: {save_only_model"):
        workplace(max_steps=4, resume=True, **weights_only)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_run_that_was_stopped_after_its_last_step_is_only_finished(workplace, tmp_path, monkeypatch, capsys, lora_r):
    workplace("whole", lora_r=lora_r)
    with monkeypatch.context() as patched:
        patched.setattr(train, "finish", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            workplace(lora_r=lora_r)
    out = tmp_path / "out"
    assert not (out / "reward_card.json").exists()
    for path in out.glob("*.safetensors"):
        path.unlink()
    workplace(lora_r=lora_r, resume=True, killed=0)
    assert "is of the last step: nothing is left to train" in capsys.readouterr().err
    assert results(out) == results(tmp_path / "whole")
    assert read_card(out).accuracy == read_card(tmp_path / "whole").accuracy
    assert read_card(out).training["steps"] == STEPS


def test_the_result_of_a_resumed_run_stays_until_the_new_one_stands(workplace, tmp_path):
    workplace(max_steps=2)
    before = results(tmp_path / "out")
    with pytest.raises(Killed):
        workplace(max_steps=6, killed=3, resume=True)
    assert results(tmp_path / "out") == before
    load_reward_model(tmp_path / "out")


def test_a_checkpoint_without_a_manifest_is_taken_and_said_to_be_unverified(workplace, tmp_path, capsys):
    """As earlier versions wrote them; `true` prefers one that is verified."""
    workplace(max_steps=4)
    (tmp_path / "out" / "checkpoint-4" / "manifest.json").unlink()
    workplace(max_steps=6, resume=True)
    assert "checkpoint-4 is skipped" in capsys.readouterr().err
    for step in (2, 4, 6):
        (tmp_path / "out" / f"checkpoint-{step}" / "manifest.json").unlink()
    workplace(max_steps=8, resume=True)
    said = capsys.readouterr().err
    assert "checkpoint-6' has no manifest.json (of an earlier version): taken without being verified" in said


@pytest.mark.slow
@pytest.mark.parametrize("module", ["reward_models.train", "reward_models.train_value"])
def test_two_processes_resume_bit_for_bit(workplace, tmp_path, module):
    """The newest checkpoints are broken on the way: the first process finds out and tells the other."""
    from tests.training.launch import ROOT, launch

    keys = {
        "train_dataset": tmp_path / ("logged.jsonl" if module.endswith("value") else "pairs.jsonl"),
        "model_name_or_path": tmp_path / "base",
        "output_dir": tmp_path / "out",
        "eval_share": 0.2,
        "max_length": 64,
        "num_layers": 1,
        "max_steps": 5,
        "save_steps": 2,
        "logging_steps": 3,
        "per_device_train_batch_size": 2,
        "embedding_noise": 0.1,
        "fidelity_responses": 0,
        "resume": "true",
    }
    flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
    config = ROOT / "recipes" / "accelerate_configs" / "ddp.yaml"
    launch(config, "--mixed_precision", "no", "-m", module, *flags, timeout=400)
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out, whole)
    (out / "model.safetensors").unlink()
    for step in (4, 5):
        os.truncate(out / f"checkpoint-{step}" / "optimizer.pt", 100)
    launch(config, "--mixed_precision", "no", "-m", module, *flags, timeout=400)
    for step in (4, 5):
        assert compare_checkpoints(whole / f"checkpoint-{step}", out / f"checkpoint-{step}") == []
    assert results(whole) == results(out) and results(out)
    assert len(list((out / "checkpoint-4").glob("noise_state_*"))) == 2

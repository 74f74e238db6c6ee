"""A run that was cut and resumed is the run that was not."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from tests.training.tiny import tiny_run
from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.training.compare import compare_checkpoints

KINDS = {
    "LoRA and value": {},
    "LoRA": {"value": "reward", "rewards": None},
    "full and value": {"lora_r": 0},
    "shared value, accumulation, dropout": {
        "learned": {"lora_r": 2, "num_layers": 2},
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.1,
        "particles_from": "policy",
    },
}


class StopAt(TrainerCallback):
    """Ends a run after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


@pytest.fixture
def reward_folder(tmp_path):
    """A reward model cut from the tiny model, untrained but not zero."""
    from reward_models import RewardModel, save_reward_model
    from tests.conftest import build_llama, build_tokenizer

    folder = tmp_path / "reward"
    save_reward_model(RewardModel.from_base(build_llama(), 1, pooling="mean", input_skip=True), folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_n_steps_are_k_and_then_the_rest_bit_for_bit(tmp_path, kind, reward_folder):
    changes = dict(KINDS[kind]) | {"max_steps": 6, "save_steps": 3}
    if "rewards" in changes:
        changes["rewards"] = [reward_folder]
    tiny_run(tmp_path, output_dir=str(tmp_path / "whole"), **changes)
    tiny_run(tmp_path, output_dir=str(tmp_path / "cut"), callbacks=(StopAt(4),), **changes)
    assert not (tmp_path / "cut" / "checkpoint-6").exists()
    tiny_run(tmp_path, output_dir=str(tmp_path / "cut"), resume_from_checkpoint=True, **changes)
    assert compare_checkpoints(tmp_path / "whole" / "checkpoint-6", tmp_path / "cut" / "checkpoint-6") == []


def test_a_checkpoint_of_another_budget_is_refused_unless_allowed(tmp_path):
    tiny_run(tmp_path, max_steps=2, save_steps=2)
    changed = {"budget": TransportBudget(nats=3.0), "max_steps": 3, "resume_from_checkpoint": True}
    with pytest.raises(ConfigError, match=r"budget.nats.*2.0.*3.0"):
        tiny_run(tmp_path, **changed)
    assert tiny_run(tmp_path, allow_changes=["budget"], **changed)["steps"] == 3


def test_a_changed_byte_is_named_and_the_older_checkpoint_is_used(tmp_path, capsys):
    tiny_run(tmp_path, max_steps=4, save_steps=2)
    path = tmp_path / "out" / "checkpoint-4" / "trained.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    tiny_run(tmp_path, max_steps=4, save_steps=2, resume_from_checkpoint=True)
    assert "checkpoint-4 is skipped" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"trained\.safetensors"):
        path.write_bytes(bytes(content))
        tiny_run(tmp_path, max_steps=4, resume_from_checkpoint=str(path.parent))


def test_metrics_hold_each_step_once_after_a_resume(tmp_path):
    import json

    tiny_run(tmp_path, max_steps=6, save_steps=3, callbacks=(StopAt(5),))
    tiny_run(tmp_path, max_steps=6, save_steps=3, resume_from_checkpoint=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_resuming_where_nothing_is_yet_starts_anew(tmp_path, capsys):
    assert tiny_run(tmp_path, max_steps=1, resume_from_checkpoint=True)["steps"] == 1
    assert "starting anew" in capsys.readouterr().err


def test_verify_resume_goes_on_twice_and_leaves_the_run_as_it_was(tmp_path, capsys):
    from vgf_llm.verify_resume import main

    tiny_run(tmp_path, max_steps=6, save_steps=3, callbacks=(StopAt(3),))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert main(["--checkpoint", str(tmp_path / "out" / "checkpoint-3"), "--steps", "2"]) == 0
    assert '"differences": 0' in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    with pytest.raises(ConfigError, match="ends at step 6"):
        main(["--checkpoint", str(tmp_path / "out" / "checkpoint-3"), "--steps", "9"])

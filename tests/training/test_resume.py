"""A run that was cut and resumed is the run that was not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from reward_models import load_reward_model
from tests.training.tiny import settings, tiny_run, tiny_trainer
from vgf_llm.distributed.shards import require_state, without_frozen
from vgf_llm.errors import CheckpointError, ConfigError, OutputError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.compare import compare_checkpoints
from vgf_llm.train import build_trainer
from vgf_llm.training.identity import weights_digest
from vgf_llm.training.resume import checkpoint_to_resume
from vgf_llm.training.settings import DirectionOptions

RUN = {"max_steps": 1, "save_steps": 1}
KINDS = {
    "LoRA and value": {},
    "LoRA": {"value": "reward", "rewards": None},
    "full and value": {"lora_r": 0},
    "full without a value": {"lora_r": 0, "value": "reward", "rewards": None},
    "constant": {"value": "reward", "direction": "constant"},
    "table, every other step": {
        "value": "reward",
        "direction": "table",
        "direction_options": DirectionOptions(substitutions=4, refit_steps=2, replay=200),
    },
    "causal, accumulation, dropout": {
        "value": "reward",
        "direction": "causal",
        "direction_options": DirectionOptions(substitutions=8, steps=10),
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.1,
    },
    "shared value, accumulation, dropout": {
        "learned": {"lora_r": 2, "num_layers": 2},
        "gradient_accumulation_steps": 2,
        "logging_steps": 4,  # a log line is half done when a checkpoint is written
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
    tiny_run(tmp_path, output_dir=str(tmp_path / "cut"), resume=True, **changes)
    assert compare_checkpoints(tmp_path / "whole" / "checkpoint-6", tmp_path / "cut" / "checkpoint-6") == []


def test_a_checkpoint_of_another_budget_is_refused_unless_allowed(tmp_path):
    tiny_run(tmp_path, max_steps=2, save_steps=2)
    changed = {"budget": TransportBudget(nats=3.0), "max_steps": 3, "resume": True}
    with pytest.raises(ConfigError, match=r"budget.nats.*2.0.*3.0; set them back, .*'\[\"budget.nats\"\]'"):
        tiny_run(tmp_path, **changed)
    assert tiny_run(tmp_path, allow_changes=["budget"], **changed)["steps"] == 3


def test_a_finished_run_takes_more_steps_without_being_allowed_to(tmp_path, capsys):
    tiny_run(tmp_path, max_steps=2, save_steps=2)
    assert tiny_run(tmp_path, max_steps=4, save_steps=2, resume=True)["steps"] == 4
    assert "changed since the checkpoint: optimisation.max_steps 2 -> 4" in capsys.readouterr().err


def refused(folder, **changed):
    """What resuming the run of a folder with other settings is refused with, before any training."""
    parts = settings(folder, **RUN | {"resume": True} | changed)
    with pytest.raises(ConfigError) as caught:
        checkpoint_to_resume(build_trainer(*parts).checkpoints, parts[3])
    return str(caught.value)


def test_what_changes_the_run_is_refused_by_name(tmp_path, reward_folder):
    run = RUN | {"value": "reward", "rewards": [reward_folder]}
    tiny_run(tmp_path, **run)
    optim = {"trainer_arguments": {"disable_tqdm": True, "optim": "sgd"}}
    assert "trainer_arguments.optim (absent) -> sgd" in refused(tmp_path, **run | optim)
    assert "optimisation.warmup_ratio 0.05 -> 0.5" in refused(tmp_path, **run | {"warmup_ratio": 0.5})
    assert "mixed_precision no -> bf16" in refused(tmp_path, **run | {"bf16": True})
    config = Path(reward_folder) / "config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1,', 1))
    assert "rewards [" in refused(tmp_path, **run)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_same_path_with_other_weights_is_refused(tmp_path, lora_r):
    from safetensors.torch import load_file, save_file

    tiny_run(tmp_path, **RUN, lora_r=lora_r)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[-1] += 1e-4
    save_file(tensors, path, metadata={"format": "pt"})
    assert re.search(r"another run: weights [0-9a-f]{64} -> [0-9a-f]{64}; set", refused(tmp_path, lora_r=lora_r))


def test_the_digest_of_weights_sees_every_bit_and_no_order_of_sums():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = torch.nn.Parameter(torch.randn(300, 70, generator=generator).to(dtype))
        digest = weights_digest([("a", weight)])
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        assert weights_digest([("a", weight)]) == digest
        torch.set_num_threads(threads)
        assert weights_digest([("b", weight)]) != digest
        with torch.no_grad():
            weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9, dtype=dtype))
        assert weights_digest([("a", weight)]) != digest


def test_a_checkpoint_without_what_the_engine_reads_is_refused(tmp_path):
    (tmp_path / "global_step2").mkdir()
    require_state(tmp_path, "ZeRO-2")
    with pytest.raises(CheckpointError, match=r"DDP \(DDP\) reads \(optimizer.pt\); it holds the state of DeepSpeed"):
        require_state(tmp_path, "DDP")
    with pytest.raises(CheckpointError, match=r"FSDP \(FSDP2\) reads .*the state of DeepSpeed: resume under that"):
        require_state(tmp_path, "FSDP2")
    run = RUN | {"trainer_arguments": {"disable_tqdm": True, "save_only_model": True}}
    tiny_run(tmp_path, **run)
    parts = settings(tmp_path, **run, resume=True)
    with pytest.raises(CheckpointError, match="holds no optimiser state, as under .*save_only_model: true"):
        checkpoint_to_resume(build_trainer(*parts).checkpoints, parts[3])


def names(folder, pattern="checkpoint-*"):
    return sorted(path.name for path in folder.glob(pattern))


def test_a_new_run_does_not_begin_among_the_checkpoints_of_another(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other" / "checkpoint-4"
    tiny_run(tmp_path, max_steps=4, save_steps=2)
    before = (out / "metrics.jsonl").read_text(), (out / "vgf_config.json").read_text()
    with pytest.raises(ConfigError, match=r"holds checkpoint-2, checkpoint-4 of another run.*set resume: true"):
        tiny_run(tmp_path, max_steps=8, save_steps=1)
    shutil.copytree(out / "checkpoint-4", other)
    with pytest.raises(ConfigError, match="of another run"):
        tiny_run(tmp_path, max_steps=4, resume=str(other))
    assert ((out / "metrics.jsonl").read_text(), (out / "vgf_config.json").read_text()) == before
    assert names(out) == ["checkpoint-2", "checkpoint-4"]


def test_going_on_from_an_earlier_checkpoint_sets_later_ones_aside(tmp_path, capsys):
    """None of the new ones is then taken for the oldest, and those set aside go when the run has come as far."""
    out, run = tmp_path / "out", {"max_steps": 6, "save_steps": 1, "save_total_limit": 4}
    tiny_run(tmp_path, **run)
    assert names(out) == ["checkpoint-3", "checkpoint-4", "checkpoint-5", "checkpoint-6"]
    again = run | {"save_total_limit": 2, "resume": str(out / "checkpoint-3")}
    tiny_run(tmp_path, **again, callbacks=(StopAt(5),))
    assert "set aside as .<name>.superseded: checkpoint-4, checkpoint-5, checkpoint-6" in capsys.readouterr().err
    assert names(out) == ["checkpoint-4", "checkpoint-5"]
    assert names(out, ".checkpoint-*") == [".checkpoint-6.superseded"]
    tiny_run(tmp_path, **run | {"resume": True})
    assert names(out, ".checkpoint-*") == []


def test_an_earlier_log_is_kept_where_a_run_starts_anew(tmp_path):
    tiny_run(tmp_path, max_steps=2)
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    tiny_run(tmp_path, max_steps=1)
    assert (tmp_path / "out" / "metrics.earlier.jsonl").read_text() == before
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


def test_engines_leave_out_what_is_frozen_under_every_name(tmp_path):
    """The base is shared: its weights have a name under the policy and one under the value."""
    model = tiny_trainer(tmp_path, learned={"lora_r": 2, "num_layers": 2}).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = model.state_dict()
    with without_frozen(model):
        state = model.state_dict()
        assert set(state) == trained
        model.load_state_dict(state)
        del state[min(trained)]
        with pytest.raises(RuntimeError, match=re.escape(min(trained))):
            model.load_state_dict(state)
    assert set(model.state_dict()) == set(whole) > trained


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: File too large")]
)
def test_a_result_that_cannot_be_written_is_named(tmp_path, monkeypatch, error):
    trainer = tiny_trainer(tmp_path)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer.models.policy, "save_pretrained", full)
    with pytest.raises(OutputError, match=r"result '.*out' cannot be written: .*(left on|File too).* GB are free"):
        trainer.save_model()
    assert (tmp_path / "out").is_dir()


def test_a_process_that_sees_several_gpus_is_refused(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="sees 2 GPUs.*accelerate launch --num_processes 2"):
        tiny_trainer(tmp_path)


def test_a_changed_byte_is_named_and_the_older_checkpoint_is_used(tmp_path, capsys):
    tiny_run(tmp_path, max_steps=4, save_steps=2)
    path = tmp_path / "out" / "checkpoint-4" / "trained.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    tiny_run(tmp_path, max_steps=4, save_steps=2, resume=True)
    said = capsys.readouterr().err
    assert "checkpoint-4 is skipped" in said and "set aside as .<name>.superseded: checkpoint-4" in said
    assert not (tmp_path / "out" / ".checkpoint-4.superseded").exists()
    with pytest.raises(CheckpointError, match=r"trained\.safetensors"):
        path.write_bytes(bytes(content))
        tiny_run(tmp_path, max_steps=4, resume=str(path.parent))


def test_metrics_hold_each_step_once_after_a_resume(tmp_path):
    import json

    tiny_run(tmp_path, max_steps=6, save_steps=3, callbacks=(StopAt(5),))
    tiny_run(tmp_path, max_steps=6, save_steps=3, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_resuming_where_nothing_is_yet_starts_anew(tmp_path, capsys):
    assert tiny_run(tmp_path, max_steps=1, resume=True)["steps"] == 1
    assert "starting anew" in capsys.readouterr().err


def test_verify_resume_goes_on_twice_and_leaves_the_run_as_it_was(tmp_path, capsys):
    from vgf_llm.verify_resume import main

    tiny_run(tmp_path, max_steps=6, save_steps=3, callbacks=(StopAt(3),))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    for number in (1, 2):  # left by a call that was killed
        stale = tmp_path / "out" / f".verify-resume-{number}"
        shutil.copytree(tmp_path / "out" / "checkpoint-3", stale / "checkpoint-3")
    assert main(["--checkpoint", str(tmp_path / "out" / "checkpoint-3"), "--steps", "2"]) == 0
    assert '"differences": 0' in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    with pytest.raises(ConfigError, match="ends at step 6"):
        main(["--checkpoint", str(tmp_path / "out" / "checkpoint-3"), "--steps", "9"])


def test_a_run_stopped_after_its_last_step_is_finished_and_takes_no_step_more(tmp_path):
    tiny_run(tmp_path, max_steps=3, save_steps=1)
    out = tmp_path / "out"
    expected = (out / "adapter_model.safetensors").read_bytes()
    lines = (out / "metrics.jsonl").read_text()
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if "checkpoint" not in str(path)}
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "value")
    last = tiny_run(tmp_path, max_steps=3, save_steps=1, resume=True)
    assert last["steps"] == 3
    assert (out / "adapter_model.safetensors").read_bytes() == expected
    assert names == {path.relative_to(out).as_posix() for path in out.rglob("*") if "checkpoint" not in str(path)}
    assert load_reward_model(out / "value").config.num_layers == 1
    assert (out / "metrics.jsonl").read_text() == lines
    assert not (out / "checkpoint-4").exists()


def test_a_result_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """A second run into the folder is killed while it writes; then it replaces folders, too."""
    from vgf_llm.training.policy_models import PolicyModels

    tiny_run(tmp_path, max_steps=1)
    out = tmp_path / "out"

    def held():
        paths = [*out.glob("adapter_*"), *out.glob("tokenizer*"), *(out / "value").rglob("*")]
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = held()
    save = PolicyModels.save_policy

    def half(models, folder, tensors):
        save(models, folder, tensors)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PolicyModels, "save_policy", half)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tmp_path, max_steps=2)
    assert held() == before
    tiny_run(tmp_path, max_steps=2)
    assert held().keys() == before.keys() and held() != before
    reward = shutil.copytree(out / "value", tmp_path / "reward")
    tiny_run(tmp_path, max_steps=1, lora_r=0, value="reward", rewards=[str(reward)])
    assert not list(out.glob("adapter_*")) and not (out / "value").exists()
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_resume_true_does_not_train_a_finished_result_anew(tmp_path):
    tiny_run(tmp_path, max_steps=1)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds the result of a run and no whole checkpoint"):
        tiny_run(tmp_path, max_steps=1, learning_rate=0.1, resume=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_a_run_is_finished_by_the_steps_that_its_settings_ask_for(tmp_path):
    """Eight prompts in batches of two are four steps per epoch."""
    tiny_run(tmp_path, max_steps=2, save_steps=2)
    assert tiny_run(tmp_path, max_steps=-1, num_train_epochs=1.0, save_steps=2, resume=True)["steps"] == 4
    with pytest.raises(ConfigError, match="checkpoint-4' has 4 steps, and max_steps is 3: name an earlier checkpoint"):
        tiny_run(tmp_path, max_steps=3, save_steps=2, resume=True)


def test_a_resumed_run_logs_as_it_is_asked_to_now(tmp_path):
    tiny_run(tmp_path, max_steps=5, save_steps=2, callbacks=(StopAt(2),))
    tiny_run(tmp_path, max_steps=5, save_steps=2, logging_steps=2, resume=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 4, 5]

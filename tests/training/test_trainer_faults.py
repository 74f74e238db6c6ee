"""What stops a run or leaves it unharmed: diverging, non-finite rewards, equal names, shared weights, a short batch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward_models import load_reward_model
from reward_models.foreign import foreign_reward
from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_tokenizer
from tests.training.tiny import tiny_run, tiny_trainer, write_inputs
from vgf_llm.data.prompts import encode_prompt, encode_response
from vgf_llm.errors import ConfigError, DivergedError, ModelError
from vgf_llm.models.loading import load_tokenizer
from vgf_llm.training.distributions import sample
from vgf_llm.training.rewards import load_rewards


def numpy_scores(prompts, responses):
    import numpy

    return numpy.array([len(text) / 10 for text in responses], dtype=numpy.float32)


def reward_folder(folder, scale=1.0, chat=True):
    model = RewardModel.from_base(build_llama(), num_layers=1, pooling="mean")
    with torch.no_grad():
        model.head.weight.mul_(scale)
    model.save_pretrained(folder)
    build_tokenizer(chat=chat).save_pretrained(folder)
    return str(folder)


def test_a_run_that_diverges_stops_and_saves_nothing(tmp_path):
    with pytest.raises(DivergedError, match=r"step \d: the (loss|gradient's norm) is (nan|inf); lower learning_rate"):
        tiny_run(tmp_path, learning_rate=1e20, lr_scheduler_type="constant", warmup_ratio=0.0, max_steps=6)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_gradient_checkpointing_takes_the_same_steps(tmp_path):
    for name, flag in (("off", False), ("on", True)):
        tiny_run(tmp_path, output_dir=str(tmp_path / name), max_steps=2, gradient_checkpointing=flag)
    off, on = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("off", "on"))
    assert all(torch.allclose(off[key], on[key], atol=1e-6) for key in off)


def test_autocast_from_the_launch_configuration_is_the_runs_own(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = tiny_trainer(tmp_path, max_steps=2)
    assert trainer.args.bf16
    trainer.train()


def test_a_value_beside_a_policy_trained_in_full_has_weights_of_its_own_and_is_saved_as_it_is(tmp_path):
    trainer = tiny_trainer(tmp_path, lora_r=0, learned={"lora_r": 2, "num_layers": 1})
    policy = {p.data_ptr() for p in trainer.models.policy.parameters()}
    assert not any(p.data_ptr() in policy for p in trainer.learned.model.parameters())
    trainer.train()
    trainer.save_model()
    rows = {"input_ids": torch.tensor([[5, 9, 12, 20, 31]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    rows["response_mask"] = torch.tensor([[False, False, True, True, True]])
    saved = load_reward_model(tmp_path / "out" / "value")
    trainer.learned.model.eval()
    with torch.no_grad():
        live = trainer.learned.model(**rows, token_level=True)
        torch.testing.assert_close(saved(**rows, token_level=True), live, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    tiny_run(tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match="is an adapter.*merge it"):
        tiny_trainer(tmp_path, model_name_or_path=str(tmp_path / "out"), output_dir=str(tmp_path / "second"))


def test_rewards_called_alike_are_all_counted(tmp_path):
    write_inputs(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    names = [reward_folder(tmp_path / part / "reward", scale) for part, scale in (("a", 1.0), ("b", 3.0))]
    trainer = tiny_trainer(tmp_path, rewards=names, value="reward")
    prompts = list(trainer.train_dataset)[:2]
    with trainer.distributions.particles() as distribution:
        responses = sample(distribution, prompts, trainer.distributions.seeds(prompts, 0))
    scores = load_rewards(names, [1.0, 0.5], tokenizer)([p.text for p in prompts], responses)
    assert {"reward_reward_0", "reward_reward_1"} <= set(scores)
    expected = scores["reward_reward_0"] + 0.5 * scores["reward_reward_1"]
    torch.testing.assert_close(scores["reward"], expected)


def test_a_reward_model_that_is_not_finite_is_named(tmp_path):
    folder = reward_folder(tmp_path / "reward")
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    weights["head.bias"] = torch.tensor([math.nan])
    save_file(weights, tmp_path / "reward" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="reward reward .*gave nan to response 0 of the prompt"):
        tiny_run(tmp_path, rewards=[folder])


def test_a_reward_function_may_return_numpy_numbers(tmp_path):
    last = tiny_run(tmp_path, rewards=["tests.training.test_trainer_faults:numpy_scores"], max_steps=1)
    assert last["reward/original"] > 0


def test_a_short_last_batch_rolls_out_all_its_prompts_and_the_last_step_is_logged(tmp_path):
    trainer = tiny_trainer(tmp_path, num_prompts=7, per_device_train_batch_size=4, max_steps=2, logging_steps=10)
    seen = []
    rollout = trainer.rollout
    trainer.rollout = lambda rows: (seen.append([row.index for row in rows]), rollout(rows))[1]
    trainer.train()
    assert sorted(index for rows in seen for index in rows) == list(range(7))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2]
    assert lines[0]["tokens"] > 0 and lines[0]["tokens_per_second"] > 0


def test_a_reward_model_of_another_tokenizer_teaches_a_learned_value_and_cannot_move_particles(tmp_path):
    folder = reward_folder(tmp_path / "reward", chat=False)
    last = tiny_run(tmp_path, rewards=[folder], max_steps=2)
    assert math.isfinite(last["reward/transported"])
    tokenizer = load_tokenizer(folder)
    score = foreign_reward(folder, load_tokenizer(str(tmp_path / "model")), "cpu", torch.float32)
    ids = encode_prompt(tokenizer, "the dog"), encode_response(tokenizer, "a good cat", eos=True)
    model = load_reward_model(folder)
    alone = model.score(model.prefix([ids[0]]), torch.tensor([[ids[1]]]), torch.ones(1, 1, len(ids[1])).bool())
    assert score(["the dog", "x"], ["a good cat", "it is a sea"])[0] == pytest.approx(float(alone), abs=1e-5)
    with pytest.raises(ModelError, match="tokenizer"):
        tiny_run(tmp_path, rewards=[folder], value="reward", output_dir=str(tmp_path / "other"))

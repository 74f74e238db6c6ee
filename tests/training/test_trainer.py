"""The trainer on a tiny model: it learns, moves what it should and nothing else, and says what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.training.tiny import tiny_run, tiny_trainer
from vgf_llm.errors import ConfigError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.training.batch import policy_rows
from vgf_llm.training.distributions import sample
from vgf_llm.training.policy_models import response_logps
from vgf_llm.training.rollout import PromptRow


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"particles_from": "policy"}, {"loss": "dpo", "dpo_beta": 0.5}])
def test_the_policy_learns_a_python_reward(tmp_path, changes):
    tiny_run(tmp_path, max_steps=40, per_device_train_batch_size=8, kept=2, weight_temperature=0.1, **changes)
    rewards = [line["reward/policy"] for line in lines(tmp_path)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:5]) / 5 + 0.1


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("value_lora", [0, 4])
def test_every_trainable_parameter_moves_and_no_frozen_one(tmp_path, lora, value_lora):
    trainer = tiny_trainer(tmp_path, lora_r=lora, learned={"lora_r": value_lora}, kl_coefficient=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    frozen_reference = trainer.models._full_reference
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    wanted = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved == wanted
    assert any("value" in name for name in wanted) and any("policy" in name for name in wanted)
    if frozen_reference is not None:
        for (name, p), now in zip(frozen_reference.named_parameters(), before, strict=False):
            assert not p.requires_grad, name
            assert torch.equal(p, before[f"policy.{name}"]), now


def test_under_lora_one_copy_of_the_base_serves_policy_value_and_reference(tmp_path):
    trainer = tiny_trainer(tmp_path, learned={"lora_r": 2, "num_layers": 2})
    frozen = {p.data_ptr() for p in trainer.models.policy.parameters() if not p.requires_grad}
    shared = [p for p in trainer.learned.model.parameters() if not p.requires_grad and p.dim() == 2]
    in_base = [p for p in shared if p.data_ptr() in frozen]
    assert len(in_base) >= 2 * 7
    with trainer.models.reference() as base:
        assert base is trainer.models.policy_lm


def test_the_reference_is_the_untrained_base_after_training(tmp_path):
    trainer = tiny_trainer(tmp_path)
    ids = torch.tensor([[5, 9, 12, 20, 31]])
    before = trainer.models.policy_lm(ids).logits
    trainer.train()
    trainer.model.eval()
    with trainer.models.reference() as base:
        torch.testing.assert_close(base(ids).logits, before)
    assert not torch.allclose(trainer.models.policy_lm(ids).logits, before)


def test_a_trained_adapter_gives_the_trainers_log_probabilities_in_plain_peft(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    prompts = [PromptRow(0, [5, 9, 12], "x")]
    with trainer.distributions.particles() as distribution:
        responses = sample(distribution, prompts, trainer.distributions.seeds(prompts, trainer.state.global_step))
    rows = policy_rows(responses, torch.ones(1, 4, dtype=torch.bool))
    inputs = rows.policy_inputs
    trainer.model.eval()
    with torch.no_grad():
        ours = response_logps(trainer.models.policy, **inputs).masked_fill(~rows.mask_RT, 0)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        plain = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
        theirs = response_logps(plain, **inputs).masked_fill(~rows.mask_RT, 0)
        merged = response_logps(plain.merge_and_unload(), **inputs).masked_fill(~rows.mask_RT, 0)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged, ours, atol=1e-5, rtol=0)


def test_a_model_trained_in_full_loads_in_plain_transformers(tmp_path):
    trainer = tiny_trainer(tmp_path, lora_r=0)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 9, 12, 20, 31]])
    trainer.model.eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.models.policy(ids).logits, atol=1e-5, rtol=0)


def test_every_step_logs_rewards_distances_likelihoods_and_completions(tmp_path):
    tiny_run(tmp_path, max_steps=2, gold="length_words", rewards=["tests.training.tiny:good_words", "brevity"])
    line = lines(tmp_path)[-1]
    for name in (
        "reward/original reward/transported reward/selected reward/policy gold/policy reward_brevity/original "
        "nats/response nats/token policy/kl policy/kl_samples nll/original nll/transported nll/policy displacement "
        "changed_tokens mmd2 mmd2_bound entropy length/transported eos/transported value/value_error "
        "value/explained_variance seconds/sample seconds/transport seconds/score tokens peak_memory_gib loss"
    ).split():
        assert name in line, name
    assert line["policy/kl_samples"] == 2 * 2  # prompts, samples of each
    assert line["mmd2"] <= line["mmd2_bound"]
    table = pyarrow.parquet.read_table(tmp_path / "out" / "completions" / "step_000002.parquet").to_pylist()
    assert {row["kind"] for row in table} == {"original", "transported"}
    assert len(table) == 2 * (4 + 4)


def test_a_run_in_which_nothing_can_be_learned_says_so(tmp_path, capsys):
    tiny_run(tmp_path, max_steps=1, rewards=["tests.training.test_trainer:always_one"])
    assert "one reward each" in capsys.readouterr().err


def always_one(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


def test_functions_alone_cannot_move_responses_without_a_learned_value(tmp_path):
    with pytest.raises(ConfigError, match="good_words have no gradient"):
        tiny_trainer(tmp_path, value="reward")


def test_an_empty_training_budget_distils_the_best_of_n(tmp_path):
    last = tiny_run(tmp_path, budget=TransportBudget.none())
    assert last["changed_tokens"] == 0


def test_a_trained_adapter_is_loaded_by_its_folder_wherever_a_model_is_named(tmp_path):
    from vgf_llm.models.loading import load_causal_lm, load_tokenizer

    trainer = tiny_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 9, 12, 20, 31]])
    trainer.model.eval()
    loaded = load_causal_lm(str(tmp_path / "out"))
    torch.testing.assert_close(loaded(ids).logits, trainer.models.policy(ids).logits, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(str(tmp_path / "out")).eos_token == "<eos>"


def test_a_secant_head_is_trained_along_and_drives_the_flow_without_a_backward(tmp_path):
    """Its predictions come to follow the exact changes; it moves particles, and is found in the value's folder."""
    from reward_models import load_reward_model
    from vgf_llm.answering.pipeline import load_gradient
    from vgf_llm.text.particles import exact_gradient

    learned = {"gradient": "secant", "secant_substitutions": 32}
    tiny_run(tmp_path, max_steps=40, per_device_train_batch_size=8, kept=2, weight_temperature=0.1, learned=learned)
    found = lines(tmp_path)
    correlations = [line["value/secant_correlation"] for line in found[2:]]  # a value that is 0 has no changes
    assert sum(correlations[-10:]) / 10 > max(0.6, sum(correlations[:5]) / 5)
    assert found[-1]["nats/response"] > 0
    assert (
        sum(line["reward/policy"] for line in found[-10:]) / 10 > sum(line["reward/policy"] for line in found[:5]) / 5
    )
    value = load_reward_model(tmp_path / "out" / "value")
    assert load_gradient(tmp_path / "out" / "value", value) is not exact_gradient

"""A value on a base's own weights, its slow target, and its folder."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from reward_models.loading import load_reward_model
from reward_models.modelling import RewardModel
from reward_models.value_model import EmaTarget, build_value_model, save_value_model
from vgf_llm.errors import ModelError, OutputError

INPUTS = {
    "input_ids": torch.tensor([[0, 5, 6, 12, 13, 2], [7, 8, 9, 14, 2, 0]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
    "response_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]),
}


def build(lm, **changes):
    options = {"num_layers": 1, "pooling": "mean", "input_skip": True, "lora_r": 2, "lora_alpha": 4.0, "seed": 0}
    return build_value_model(lm, **(options | changes))


def stir(model, scale=0.3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def values(model, **changes):
    with torch.no_grad():
        return model(**(INPUTS | changes), token_level=True)


def policy_of(lm):
    return get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("order", ["alone", "value first", "policy first"])
def test_a_lora_value_holds_the_bases_own_parameters_and_trains_nothing_else(any_lm, order):
    base = any_lm.requires_grad_(False)
    plain = {id(parameter) for parameter in base.parameters()}
    expected = values(stir(build(copy.deepcopy(base))))
    value = build(policy_of(base) if order == "policy first" else base)
    if order == "value first":
        policy_of(base)
    trains = {name for name, parameter in value.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_" in name or "head" in name for name in trains)
    assert {"head", "skip_head"} <= {part for name in trains for part in name.split(".")}
    for name, parameter in value.get_base_model().body.named_parameters():
        assert ("lora_" in name) != (id(parameter) in plain), name
    torch.testing.assert_close(values(stir(value)), expected)  # the policy's adapters are not the value's


def test_nothing_of_the_base_is_copied_and_its_scores_stay_the_same(tiny_lm):
    base = tiny_lm.requires_grad_(False)
    before = base(INPUTS["input_ids"]).logits
    value = stir(build(base, num_layers=None))
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    own = [p for p in value.parameters() if p.data_ptr() not in pointers]
    assert sum(p.numel() for p in own) < 0.2 * sum(p.numel() for p in base.parameters())
    assert torch.equal(base(INPUTS["input_ids"]).logits, before)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(2)
    assert value.get_base_model().embed(torch.tensor([5]))[0, 0] == base.get_input_embeddings().weight[5, 0]


def test_without_a_lora_the_body_is_a_copy_that_trains_but_for_its_embeddings(any_lm):
    policy_of(any_lm)
    value = build(any_lm, lora_r=0)
    pointers = {parameter.data_ptr() for parameter in any_lm.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in value.parameters()}
    frozen = [name for name, parameter in value.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 1 and "embed" in frozen[0]
    assert isinstance(value, RewardModel) and values(value).abs().max() == 0  # heads start at zero


def test_a_half_precision_body_keeps_the_bases_rotary_frequencies(tiny_lm, tmp_path):
    """A LoRA's body stays in the base's precision; one that trains in full is float32."""
    tiny_lm.save_pretrained(tmp_path)
    base = type(tiny_lm).from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    for value, dtype in ((build(base).get_base_model(), torch.bfloat16), (build(base, lora_r=0), torch.float32)):
        for name, buffer in value.body.named_buffers():
            assert torch.equal(buffer, dict(base.base_model.named_buffers())[name]), name
        assert value.body.get_input_embeddings().weight.dtype == dtype
        assert value.head.weight.dtype == torch.float32


def test_the_seed_decides_the_adapters_and_leaves_the_generator_alone(tiny_lm):
    tiny_lm.requires_grad_(False)
    torch.manual_seed(1)
    first, number = build(tiny_lm), torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == number
    again, other = build(tiny_lm), build(tiny_lm, seed=1)
    weights = [
        torch.cat([p.flatten() for n, p in m.named_parameters() if "lora_A" in n]) for m in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_base_that_trains_is_not_shared(tiny_lm):
    with pytest.raises(ModelError, match="trains, so a value cannot share it; freeze the base first"):
        build(tiny_lm)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_saved_value_scores_the_same_and_can_be_gone_on_with(tiny_lm, tiny_tokenizer, tmp_path, lora_r):
    tiny_lm.requires_grad_(False)
    tiny_lm.save_pretrained(tmp_path / "base")
    value = stir(build(tiny_lm, lora_r=lora_r, base_name=str(tmp_path / "base")), scale=0.1)
    folder = tmp_path / "value"
    save_value_model(value, folder, tiny_tokenizer)
    expected = values(value)
    again = load_reward_model(folder, tokenizer=tiny_tokenizer)
    torch.testing.assert_close(values(again), expected, atol=1e-5, rtol=0)
    on = build_value_model(tiny_lm, lora_r=lora_r, start_from=folder, tokenizer=tiny_tokenizer)
    torch.testing.assert_close(values(on), expected, atol=1e-5, rtol=0)
    trains = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (value, on)]
    assert trains[0] == trains[1]
    save_value_model(on, folder, tiny_tokenizer)  # over the earlier one
    assert torch.equal(values(load_reward_model(folder, tokenizer=tiny_tokenizer)), values(again))


def test_going_on_with_a_lora_shares_the_base_and_merging_it_does_not_touch_it(tiny_lm, tiny_tokenizer, tmp_path):
    tiny_lm.requires_grad_(False)
    value = stir(build(tiny_lm))
    save_value_model(value, tmp_path, tiny_tokenizer)
    before = {name: weight.clone() for name, weight in tiny_lm.state_dict().items()}
    on = build_value_model(tiny_lm, lora_r=2, start_from=tmp_path)
    assert on.get_base_model().embed(torch.tensor([5])).data_ptr() != 0
    assert on.get_base_model().get_input_embeddings().weight is tiny_lm.get_input_embeddings().weight
    merged = build_value_model(tiny_lm, lora_r=0, start_from=tmp_path)
    assert isinstance(merged, RewardModel) and merged.body.layers[0].mlp.up_proj.weight.requires_grad
    torch.testing.assert_close(values(merged), values(value), atol=1e-5, rtol=0)
    assert all(torch.equal(before[name], weight) for name, weight in tiny_lm.state_dict().items())


def test_faults_of_folders_are_named(tiny_lm, tiny_tokenizer, tiny_plain_tokenizer, tmp_path):
    tiny_lm.requires_grad_(False)
    save_value_model(build(tiny_lm, lora_r=0), tmp_path / "full", tiny_tokenizer)
    with pytest.raises(ModelError, match="start_from: .* holds a full model, but lora_r is 2; set lora_r to 0"):
        build_value_model(tiny_lm, lora_r=2, start_from=tmp_path / "full")
    with pytest.raises(ModelError, match="the chat template differs"):
        build_value_model(tiny_lm, start_from=tmp_path / "full", tokenizer=tiny_plain_tokenizer)
    tiny_lm.save_pretrained(tmp_path / "policy")
    with pytest.raises(OutputError, match="holds a model of type 'llama'"):
        save_value_model(build(tiny_lm), tmp_path / "policy", tiny_tokenizer)


# The target network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_r", [0, 2])
def test_the_target_is_the_exponential_average_of_what_trains(tiny_lm, lora_r):
    """tau 0.25 twice from w0: (1 - tau)^2 w0 + tau (1 - tau) w1 + tau w2."""
    value = build(tiny_lm.requires_grad_(False), lora_r=lora_r)
    target, history = EmaTarget(value), []
    for seed in range(3):
        history.append({n: p.detach().clone() for n, p in value.named_parameters() if p.requires_grad})
        if seed:
            target.update(value, 0.25)
        stir(value, seed=seed)
    assert set(target.weights) == set(history[0])
    for name, weight in target.weights.items():
        expected = 0.5625 * history[0][name] + 0.1875 * history[1][name] + 0.25 * history[2][name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
    assert sum(w.numel() for w in target.weights.values()) <= sum(p.numel() for p in value.parameters())


@pytest.mark.parametrize("lora_r", [0, 2])
def test_calling_the_target_answers_with_its_weights_and_leaves_the_model_as_it_is(tiny_lm, lora_r):
    value = stir(build(tiny_lm.requires_grad_(False), lora_r=lora_r, lora_dropout=0.5 if lora_r else 0.0)).eval()
    expected, target = values(value), EmaTarget(value)
    stir(value, seed=6).train()
    now = {name: parameter.detach().clone() for name, parameter in value.named_parameters()}
    answer = target.call(value, **INPUTS, token_level=True)
    assert torch.equal(answer, expected) and not answer.requires_grad and value.training
    assert all(torch.equal(now[name], parameter) for name, parameter in value.named_parameters())
    assert not torch.equal(values(value.eval()), expected)
    target.update(value, 1.0)
    torch.testing.assert_close(target.call(value, **INPUTS, token_level=True), values(value))


def test_the_target_is_float32_beside_half_precision_weights(tiny_lm):
    """A step of 1e-3 towards 1 + 2^-7 is lost in bfloat16 (eps 2^-8 at 1) and kept in float32."""
    value = RewardModel.from_base(tiny_lm, num_layers=1, dtype=torch.bfloat16)
    norm = value.body.norm.weight
    target = EmaTarget(value)
    with torch.no_grad():
        norm.add_(2**-7)
    target.update(value, 1e-3)
    kept = target.weights["body.norm.weight"]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 + 1e-3 * 2**-7), atol=1e-7, rtol=0)
    assert target.call(value, **INPUTS).dtype == torch.float32 and norm.dtype == torch.bfloat16


def test_the_target_survives_a_file_and_refuses_another_models(tiny_lm, tmp_path):
    tiny_lm.requires_grad_(False)
    value = build(tiny_lm)
    target = EmaTarget(value)
    target.update(stir(value), 0.5)
    save_file(target.state_dict(), tmp_path / "target.safetensors")
    again = EmaTarget(value)
    again.load_state_dict(load_file(tmp_path / "target.safetensors"))
    assert all(torch.equal(again.weights[name], weight) for name, weight in target.weights.items())
    with pytest.raises(ModelError, match="build both with the same settings"):
        EmaTarget(build(tiny_lm, lora_r=3)).load_state_dict(target.state_dict())
    with pytest.raises(ModelError, match="missing"):
        target.update(build(tiny_lm, input_skip=False), 0.5)
    with pytest.raises(ValueError, match=r"tau in \[0, 1\], got 2"):
        target.update(value, 2)

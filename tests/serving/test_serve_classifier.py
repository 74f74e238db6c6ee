"""The server with a classifier of transformers as its reward model, as the other commands take one."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForSequenceClassification

from tests.conftest import build_llama, build_tokenizer
from tests.engines.conftest import WIDTH
from tests.serving.command import client, serve
from tests.serving.conftest import chat
from vgf_llm.settings import ModelSettings


@pytest.mark.slow
def test_a_classifier_with_a_template_of_its_own_is_served(served_models, tmp_path):
    pytest.importorskip("vllm")
    torch.manual_seed(0)
    config = build_llama(width=WIDTH).config
    config.num_labels, config.id2label, config.label2id = 2, {0: "good", 1: "long"}, {"good": 0, "long": 1}
    judge = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(judge.score.weight)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<user>", "<user> this is")
    tokenizer.save_pretrained(tmp_path / "judge")
    models = ModelSettings(served_models.model_name_or_path, reward_model=str(tmp_path / "judge"))
    with serve(models, "--reward_outputs", "{good: 1.0, long: -0.1}") as own, client(own) as http:
        told = http.post("/v1/chat/completions", json=chat(seed=1, transport={"nats": 3}))
        assert told.status_code == 200, told.text
        moved = told.json()["transport"]
        base = http.post("/v1/chat/completions", json=chat(seed=1, transport={"nats": 0})).json()["transport"]
        assert moved["value"] >= base["value"]

"""Our own server as a judge: it takes the request of a called reward, and its answer is read."""

from __future__ import annotations

import pytest

from reward_models.foreign import text_reward
from reward_models.inputs import check_rewards
from tests.serving.conftest import MODEL
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ModelError


def test_our_server_answers_a_judges_request(running, tmp_path, monkeypatch):
    """The tiny model knows no numbers, so its answer is refused, and shown; it ends before four tokens or is cut."""
    monkeypatch.setenv("REWARD_URL", running.url)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.txt").write_text("{{ prompt }} {{ response }} {{ tone }}")
    lines = f"{{kind: judge, model: {MODEL}, template: judge.txt, max_tokens: 4, temperature: 1.0}}"
    (tmp_path / "judge.yaml").write_text(f"endpoint: {lines}")
    prompts = [PromptText("the sea", {"tone": "happy"}, "a.jsonl, row 1")]
    check_rewards(["judge.yaml"], prompts=prompts)
    refused = r"(no number as 'score: <number>' in its answer '\w+|was cut after 4 tokens \('\w+).*a.jsonl, row 1"
    with pytest.raises(ModelError, match=refused):
        text_reward("judge.yaml")(prompts, ["is blue"])

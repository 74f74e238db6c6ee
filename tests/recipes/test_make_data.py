"""The sentiment recipe's data: old files stay whole until all new ones are made."""

from __future__ import annotations

import pytest

from recipes.smollm2_sentiment import make_data
from vgf_llm.runs.files import read_jsonl


def test_files_are_replaced_at_the_end_or_not_at_all(tmp_path, monkeypatch):
    splits = {"test": ["t"], "validation": ["v"], "train": ["a", "b"]}
    monkeypatch.setattr(make_data, "make_prompts", lambda: splits)
    data = tmp_path / "data"
    data.mkdir()
    (data / "prompts_test.jsonl").write_text("old")
    arguments = ["--output", str(data), "--work", str(tmp_path / "work")]

    def killed(prompts, samples_file):
        if "a" in prompts:
            raise KeyboardInterrupt
        return {prompt: ["I love it.", "I hate it."] for prompt in prompts}

    monkeypatch.setattr(make_data, "sample_responses", killed)
    with pytest.raises(KeyboardInterrupt):
        make_data.main(arguments)
    assert [path.name for path in data.iterdir()] == ["prompts_test.jsonl"]
    assert (data / "prompts_test.jsonl").read_text() == "old"
    monkeypatch.setattr(
        make_data, "sample_responses", lambda prompts, _: {prompt: ["I love it.", "I hate it."] for prompt in prompts}
    )
    make_data.main(arguments)
    assert len(list(data.iterdir())) == 5 and read_jsonl(data / "prompts_test.jsonl") == [{"prompt": "t"}]
    assert [row["chosen"] for row in read_jsonl(data / "preferences_train.jsonl")] == ["I love it."] * 2

"""The base model with its tokenizer: ids that every model of a run has, and prompts that it can read."""

from __future__ import annotations

import pytest

from tests.conftest import build_llama, build_tokenizer
from vgf_llm.data.prompts import encode_prompts
from vgf_llm.errors import DataError
from vgf_llm.models.base import LoadedBase, load_base
from vgf_llm.settings import ModelSettings


def test_ids_are_within_the_smaller_of_two_tables() -> None:
    base = LoadedBase(build_llama(), build_tokenizer())
    assert base.vocabulary == min(len(base.tokenizer), base.rows)
    assert base.pad_id == base.tokenizer.pad_token_id
    assert base.tokenizer.eos_token_id in base.eos_ids
    small = base.within(base.pad_id)  # a table that ends before the padding token
    assert (small.rows, small.vocabulary, small.pad_id) == (base.pad_id, min(len(base.tokenizer), base.pad_id), 0)
    assert base.within(10**6).rows == base.rows


def test_it_is_loaded_as_the_settings_say(tmp_path) -> None:
    build_llama().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    base = load_base(ModelSettings(str(tmp_path), dtype="float32", chat_template_kwargs={}))
    assert base.tokenizer.padding_side == "left"
    assert not any(parameter.requires_grad for parameter in base.lm.parameters())
    assert base.max_positions == base.lm.config.max_position_embeddings


def test_a_prompt_that_cannot_be_read_is_named_with_its_file() -> None:
    tokenizer = build_tokenizer(chat=False)

    def encode(prompts: list[str], rows: int = 10**6, limit: int | None = None) -> list[list[int]]:
        return encode_prompts(tokenizer, prompts, rows, limit, 4, source=" of 'p.txt'")

    assert [len(ids) > 0 for ids in encode(["a dog", "tea"])] == [True, True]
    with pytest.raises(DataError, match="prompt 0 of 'p.txt' holds the token"):
        encode(["a dog"], rows=1)
    with pytest.raises(DataError, match="prompt 0: .* exceed the model's 4 positions"):
        encode(["a dog"], limit=4)

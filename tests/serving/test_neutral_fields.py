"""Fields that ask for nothing pass, whoever sends them; what they would ask for is refused by name."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pydantic")

from vgf_llm.serving.errors import RequestError
from vgf_llm.serving.neutral import NEUTRAL, OF_A_MESSAGE, OF_A_PART
from vgf_llm.serving.schema import ChatBody, CompletionBody, parse

USER = {"role": "user", "content": "hello"}


def read_chat(message=None, **fields):
    return parse(ChatBody, json.dumps({"model": "m", "messages": [message or USER], **fields}).encode())


def read_text(**fields):
    return parse(CompletionBody, json.dumps({"model": "m", "prompt": "hello", **fields}).encode())


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_null_passes_for_every_field(name):
    assert read_chat(**{name: None}) == read_chat()
    assert read_text(**{name: None}) == read_text()


@pytest.mark.parametrize(
    "fields",
    [{name: value} for name, values in NEUTRAL.items() for value in values]
    + [
        {"tools": [], "tool_choice": "auto"},
        {"min_p": 0.0, "repetition_penalty": 1.0},
        {"n": 1, "presence_penalty": 0.0},
    ],
    ids=str,
)
def test_a_neutral_value_leaves_no_trace(fields):
    assert read_chat(**fields) == read_chat() and read_text(**fields) == read_text()


def test_notes_of_the_client_are_not_looked_at():
    assert read_chat(user="u", safety_identifier="s", prompt_cache_key="k", metadata={"a": "b"}).messages


@pytest.mark.parametrize("name", sorted(OF_A_MESSAGE))
def test_a_message_may_say_nothing_in_every_field(name):
    for value in (None, *OF_A_MESSAGE[name]):
        assert read_chat({**USER, name: value}).messages[0].plain == USER
    assert read_chat({**USER, "name": "Ann"}).messages[0].plain == USER


@pytest.mark.parametrize("name", sorted(OF_A_PART))
def test_a_part_may_say_nothing_in_every_field(name):
    for value in (None, *OF_A_PART[name]):
        part = {"type": "text", "text": "hello", name: value}
        assert read_chat({**USER, "content": [part]}).messages[0].plain == USER


def test_a_known_field_is_said_to_be_unsupported_and_not_unknown():
    with pytest.raises(RequestError, match="^logit_bias is not supported, got {'5': 1}; leave it out, or send null$"):
        read_chat(logit_bias={"5": 1})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_tokens": False}, "min_tokens"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"suffix": "x"}, "suffix"),
        ({"a_field_of_nobody": None}, "a_field_of_nobody"),
    ],
)
def test_a_value_that_asks_for_something_is_refused_by_name(fields, named):
    for read in (read_chat, read_text):
        with pytest.raises(RequestError, match=named):
            read(**fields)

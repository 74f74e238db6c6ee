"""Texts and conversations to token ids, as training, sampling, scoring and serving all do it.

Chat templates, the beginning and the end of a text are handled here and in :mod:`vgf_llm.data.endings`; files are
read by :mod:`vgf_llm.data.prompts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vgf_llm.data.dialogue import Prompt, PromptText, as_messages, as_text
from vgf_llm.data.endings import answer_opening, check_ids, closed, opened
from vgf_llm.data.rendered import rendered_text
from vgf_llm.errors import DataError, ModelError
from vgf_llm.runs.files import shorten

# what `set_in_template` writes before a template
_FIXED = re.compile(r"""((?:\{% set \w+ = (?:"(?:[^"\\]|\\.)*"|[^"%])* %\})+)\{\{ '' \}\}""")


class EncodedPrompt(list[int]):
    """Token ids of a prompt, with what they were made of: a reward model may read it under a template of its own.

    Attributes:
        prompt: Text or messages.
    """

    prompt: Prompt

    def __init__(self, ids: Iterable[int], prompt: Prompt) -> None:
        """Keep the prompt with its ids."""
        super().__init__(ids)
        self.prompt = prompt

    def __reduce__(self) -> tuple[type[EncodedPrompt], tuple[list[int], Prompt]]:
        """Survive pickling."""
        return EncodedPrompt, (list(self), self.prompt)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> EncodedPrompt:
    """Encode a prompt up to where the model's response begins.

    With a chat template: a string is one user message, a Human/Assistant dialogue its turns, and the generation prompt
    is added. A string that has been through the template already (:mod:`vgf_llm.data.rendered`) is not put into it
    again. Without a template: text as it is with the tokenizer's own BOS, messages as a Human/Assistant dialogue.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text or messages.

    Returns:
        Token ids, at least one.

    Raises:
        DataError: the template refuses the messages or leaves out the system turn, a string that the template wrote
            ends in an answer, or nothing is left to encode.
    """
    if getattr(tokenizer, "chat_template", None):
        rendered = rendered_text(tokenizer, prompt) if isinstance(prompt, str) else None
        if rendered is None:
            ids = _templated(tokenizer, prompt)
        else:
            ids = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    else:
        ids = encode_text(tokenizer, as_text(prompt))
    if not ids:
        raise DataError(f"the prompt {shorten(repr(prompt))} has no tokens")
    return EncodedPrompt(ids, prompt)


def _templated(tokenizer: Any, prompt: Prompt) -> list[int]:
    messages = as_messages(prompt)
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja2 and its sandbox raise several types; all mean a refused conversation
        raise DataError(f"the chat template refuses the messages {shorten(repr(messages), 200)}: {error}") from error
    for message in messages:
        content = message["content"].strip()
        if message["role"] in ("system", "developer") and content not in text:
            raise DataError(
                f"the chat template leaves out the {message['role']} turn {shorten(repr(content))}; write it into the "
                "first user message, or use a template that has a place for it"
            )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def set_in_template(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Fix variables of a tokenizer's chat template, as ``chat_template_kwargs`` of TRL and vLLM pass them at each call.

    They become part of the template: its fingerprint tells a model that was trained with others, and what is saved
    answers with them wherever it is served. Where a template has fixed variables already, new values take their place.

    Args:
        tokenizer: its ``chat_template`` is changed.
        variables: JSON values by name, for example ``{"enable_thinking": False}``.

    Raises:
        ModelError: there is no template, the template lacks the variable, or a value is not JSON.
    """
    if not variables:
        return
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        raise ModelError("chat_template_kwargs are set, and the tokenizer has no single chat template; drop them")
    readable, all_fixed = in_template(tokenizer, variables), template_variables(tokenizer) | dict(variables)
    for name in variables:
        if name not in readable:
            raise ModelError(f"chat_template_kwargs: the chat template has no variable {name!r} to be set; drop it")
    while head := _FIXED.match(template):
        template = template[head.end() :]
    lines = [f"{{% set {name} = {_literal(value, name)} %}}" for name, value in all_fixed.items()]
    tokenizer.chat_template = "".join(lines) + "{{ '' }}" + template  # what is printed keeps the template's line breaks


def in_template(tokenizer: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return those variables that a tokenizer's chat template reads; none without a single template."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return {}
    fixed = ("messages", "tools", "add_generation_prompt")
    return {
        name: value
        for name, value in variables.items()
        if name not in fixed and re.search(rf"\b{re.escape(name)}\b", template)
    }


def template_variables(tokenizer: Any) -> dict[str, Any]:
    """Return the variables that `set_in_template` fixed in a tokenizer's chat template, here or before it was saved."""
    template = getattr(tokenizer, "chat_template", None)
    found: dict[str, Any] = {}
    while isinstance(template, str) and (head := _FIXED.match(template)):
        from jinja2 import Environment, nodes

        statements = Environment(autoescape=False).parse(head[1]).find_all(nodes.Assign)
        found |= {one.target.name: one.node.as_const() for one in statements}  # type: ignore[attr-defined]
        template = template[head.end() :]
    return found


def _literal(value: Any, name: str) -> str:
    """Write a JSON value as Jinja reads it."""
    if value is None:
        return "none"
    if isinstance(value, bool | int | float | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(_literal(one, name) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(key), name)}: {_literal(one, name)}" for key, one in value.items()) + "}"
    raise ModelError(f"chat_template_kwargs: {name} must be a JSON value, got {shorten(repr(value))}")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that is to be continued, as it stands: one BOS of the tokenizer's, no added EOS, no template."""
    return opened(tokenizer, text)


def encode_response(tokenizer: Any, text: str, eos: bool) -> list[int]:
    """Encode a response as it follows an encoded prompt.

    Under a chat template leading white space is the template's: none, or what it writes before an answer.

    Args:
        tokenizer: a transformers tokenizer.
        text: the response.
        eos: close it as the chat template closes the assistant's turn (:func:`vgf_llm.data.endings.closed`).

    Returns:
        Token ids without BOS.

    Raises:
        ModelError: ``eos`` is asked for and the tokenizer has no EOS token.
    """
    if getattr(tokenizer, "chat_template", None):
        text = answer_opening(tokenizer) + text.lstrip()
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return closed(tokenizer, ids) if eos else ids


def check_prompt_fits(
    ids: Sequence[int], max_positions: int | None, new_tokens: int, index: int, reserved: int = 0
) -> None:
    """Refuse a prompt that leaves no room for the response.

    Args:
        ids: encoded prompt.
        max_positions: positions of the model (tokens); None where it has no limit.
        new_tokens: longest response (tokens).
        index: position of the prompt in its list, for the message.
        reserved: positions that neither may take; an engine needs one to read what was written.

    Raises:
        DataError: prompt and response together exceed the model's positions.
    """
    if max_positions is not None and len(ids) + new_tokens + reserved > max_positions:
        kept = f" less the {reserved} that an engine needs to read" if reserved else ""
        raise DataError(
            f"prompt {index}: {len(ids)} tokens and up to {new_tokens} new ones exceed the model's {max_positions} "
            f"positions{kept}; shorten it to {max(max_positions - reserved - new_tokens, 0)} tokens or lower "
            "max_new_tokens"
        )


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt | PromptText],
    rows: int,
    max_positions: int | None,
    new_tokens: int,
    reserved: int = 0,
    source: str = "",
) -> list[list[int]]:
    """Encode prompts for a model, and check that it can read each of them and answer.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: texts or messages; of a `PromptText`, what it was made of.
        rows: ids from there on have no embedding in the model's table.
        max_positions: as for `check_prompt_fits`.
        new_tokens: as for `check_prompt_fits`.
        reserved: as for `check_prompt_fits`.
        source: follows a prompt's number in messages, for example " of 'prompts.jsonl'".

    Returns:
        Token ids of each.

    Raises:
        DataError: naming the prompt that is empty or too long, or holds a token without an embedding.
    """
    encoded: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        where = f"prompt {index}{source}"
        try:
            ids = encode_prompt(tokenizer, prompt.prompt if isinstance(prompt, PromptText) else prompt)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        check_ids(tokenizer, ids, rows, where)
        check_prompt_fits(ids, max_positions, new_tokens, index, reserved)
        encoded.append(ids)
    return encoded

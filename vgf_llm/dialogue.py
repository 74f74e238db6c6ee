"""Shapes of a conversation: message lists, Human/Assistant texts, and pairs of whole dialogues cut into parts."""

from __future__ import annotations

import itertools
import os
from typing import TypeAlias

from vgf_llm.errors import DataError
from vgf_llm.io import shorten

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
Parts: TypeAlias = tuple[Prompt, str | None, str | None]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_pair(given: Prompt | None, chosen: Prompt, rejected: Prompt, where: str) -> Parts:
    """Cut a pair into the prompt and the two responses.

    Args:
        given: the stated prompt; None: the prompt is what chosen and rejected share.
        chosen: the better response, or the dialogue that ends in it, as text or messages.
        rejected: the worse one.
        where: file and row, for messages.

    Returns:
        (prompt, chosen, rejected); a response of several turns comes back as None.

    Raises:
        DataError: there is no prompt to be found, or the stated one does not fit the turns that both share.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        return (given, chosen, rejected) if given is not None else _split_text(chosen, rejected, where)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(f"{where}: one of chosen and rejected is text and the other a message list")
    same = (left == right for left, right in zip(chosen, rejected, strict=False))
    shared = sum(1 for _ in itertools.takewhile(bool, same))
    inside = min(shared, len(chosen) - 1, len(rejected) - 1) if chosen and rejected else 0
    better, worse = (_only_turn(messages[inside:]) for messages in (chosen, rejected))
    if given is None and not inside:
        raise DataError(f"{where}: no column 'prompt', and chosen and rejected share no first message")
    if given is None or better is None or worse is None:
        return given or chosen[:inside], better, worse
    return _joined(given, chosen[:inside], where), better, worse


def _only_turn(messages: list[Message]) -> str | None:
    return "" if not messages else messages[0]["content"] if len(messages) == 1 else None


def _joined(given: Prompt, shared: list[Message], where: str) -> Prompt:
    """Join a stated prompt and the turns that chosen and rejected share, which may repeat it or go on from it."""
    stated = as_messages(given)
    if not shared or _equal(shared, stated):
        return given
    if _equal(shared[: len(stated)], stated) or _equal(shared[-len(stated) :], stated):
        return shared
    if shared[0]["role"] == "assistant":
        return [*stated, *shared]
    raise DataError(
        f"{where}: the prompt {shorten(repr(given))} is no part of the {len(shared)} turns that chosen and rejected "
        f"share, which start {shorten(repr(shared[0]))}; state the whole conversation as the prompt, or leave it out"
    )


def _equal(one: list[Message], other: list[Message]) -> bool:
    return [(turn["role"], turn["content"].strip()) for turn in one] == [
        (turn["role"], turn["content"].strip()) for turn in other
    ]


def _split_text(chosen: str, rejected: str, where: str) -> Parts:
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(ASSISTANT)
    if end < 0:
        raise DataError(
            f"{where}: no column 'prompt', and chosen and rejected share no text up to an "
            f"{ASSISTANT!r}; chosen starts {shorten(repr(chosen))}"
        )
    end += len(ASSISTANT)
    responses = [None if HUMAN in text[end:] or ASSISTANT in text[end:] else text[end:] for text in (chosen, rejected)]
    return chosen[:end], responses[0], responses[1]


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as messages: a Human/Assistant text as its turns, any other text as one user message."""
    if not isinstance(prompt, str):
        return prompt
    if not (prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT.strip())):
        return [{"role": "user", "content": prompt}]
    messages = []
    for turn in prompt.split(HUMAN)[1:]:
        question, *answers = turn.split(ASSISTANT)
        messages.append({"role": "user", "content": question.strip()})
        messages.extend({"role": "assistant", "content": answer.strip()} for answer in answers if answer.strip())
    return messages


def as_text(prompt: Prompt) -> str:
    """Return a prompt as text: messages as a Human/Assistant dialogue that the assistant is to go on with."""
    if isinstance(prompt, str):
        return prompt
    names = {"user": HUMAN, "assistant": ASSISTANT}
    turns = [f"{names.get(turn['role'], '')} {turn['content']}".lstrip(" ") for turn in prompt]
    return "".join(turns) + ASSISTANT

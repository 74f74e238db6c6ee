r"""Shapes of a conversation: message lists, Human/Assistant texts, and pairs of whole dialogues cut into parts.

A Human/Assistant text (Anthropic HH) is read turn by turn. A marker that a quotation mark or punctuation follows is
part of a turn's text, so that a turn may quote ``'\n\nAssistant:'``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vgf_llm.errors import DataError
from vgf_llm.runs.files import shorten

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
Parts: TypeAlias = tuple[Prompt, str, str]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_QUOTED = r"(?![\"'`\u2019\u201d,.;:?!)\]])"
_START = re.compile(r"\s*(Human)[ \t]?:" + _QUOTED)
_MARKER = re.compile(r"(?:\r?\n[ \t]*){2,}(Human|Assistant)[ \t]?:" + _QUOTED)
_CLOSE_MARKER = re.compile(r"\r?\n[ \t]*(Human|Assistant)[ \t]?:" + _QUOTED)
_TEMPLATES_MARK = (
    r"<\|im_start\|>\s*assistant\n*|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>\n*"
    r"|<start_of_turn>\s*model\n*|\[/INST\]|<[|\uff5c]assistant[|\uff5c]>\n?"
)
_TEMPLATED = re.compile(_TEMPLATES_MARK, re.IGNORECASE)
_ANSWER = re.compile(
    r"(?:^|\n)[ \t*]*(?:assistant|chatgpt|gpt|ai|bot|model|response|answer|output|a)[ \t*]*:"
    r"|(?:^|\n)#+ *(?:assistant|response|answer|output)[ \t]*:\n?|" + _TEMPLATES_MARK,
    re.IGNORECASE,
)
"""Marks that an assistant's answer follows, as people and the chat templates of common families write them."""


class UnusableRowError(DataError):
    """A row that cannot be used and need not end the run.

    Args:
        reason: completes "3 rows ..."; rows of one reason are counted together.
        detail: what was seen in this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


EMPTY = "with an empty response"
EMPTY_PROMPT = "with an empty prompt"
SAME = "with chosen == rejected"
DIVERGE = "that diverge before the last turn"
NO_PROMPT = "that share no prompt"
NOT_THE_ASSISTANTS = "whose last turn is not the assistant's"
PROMPT_CONTRADICTED = "whose prompt is not part of the turns that chosen and rejected share"
PROMPT_ENDS_ANSWERED = "whose prompt ends in the assistant's turn"


def check_characters(text: str, where: str) -> str:
    r"""Return a text; refuse one with half of a surrogate pair (``\\ud83d``), which no tokenizer reads.

    Raises:
        DataError: naming where it is.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair ({text[error.start]!r}), so the text was "
            "cut or is not UTF-8; remove it"
        ) from error
    return text


@dataclass(frozen=True)
class Turn:
    """One turn of a Human/Assistant text.

    Attributes:
        role: "user" or "assistant".
        start: where its text starts, after the marker.
        text: as it stands, blanks included.
    """

    role: str
    start: int
    text: str


def turns_of(text: str) -> list[Turn]:
    r"""Return the turns of a Human/Assistant text; none where the text does not start with a human's turn.

    Blanks around markers, Windows line ends and a missing empty line before the first marker are as good as HH's own
    form. Where the first marker has none, an assistant's must follow; it may then stand on the next line.
    """
    start = _START.match(text)
    if start is None:
        return []
    marks = [start, *_MARKER.finditer(text, start.end())]
    if not text.startswith(HUMAN):
        if not any(mark[1] == "Assistant" for mark in marks):
            marks = [start, *_CLOSE_MARKER.finditer(text, start.end())]
        if not any(mark[1] == "Assistant" for mark in marks):
            return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Turn(roles[mark[1]], mark.end(), text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as messages: a Human/Assistant text as its turns, any other text as one user message."""
    if not isinstance(prompt, str):
        return prompt
    turns = turns_of(prompt)
    if not turns:
        return [{"role": "user", "content": prompt}]
    messages = [{"role": turn.role, "content": turn.text.strip()} for turn in turns]
    return [message for message in messages if message["content"] or message["role"] == "user"]


def prompt_key(prompt: Prompt) -> str:
    """Return what tells prompts apart: a text, and the one user message that it stands for, are the same prompt."""
    return json.dumps(as_messages(prompt))


def as_text(prompt: Prompt) -> str:
    """Return a prompt as text: messages as a Human/Assistant dialogue that the assistant is to continue.

    Raises:
        DataError: a message is neither the system's, the user's nor the assistant's.
    """
    if isinstance(prompt, str):
        return open_dialogue(prompt)
    for place, turn in enumerate(prompt):
        if turn["role"] not in _NAMES:
            raise DataError(
                f"message {place} has the role {turn['role']!r}, which has no place in a Human/Assistant text; give "
                "the tokenizer a chat template"
            )
    return _written(prompt) + ASSISTANT


_NAMES = {"user": HUMAN, "assistant": ASSISTANT, "system": "", "developer": ""}


def _written(messages: list[Message]) -> str:
    """Return messages as a Human/Assistant text; a system turn has no marker, other roles have their own name."""
    parts = []
    for place, turn in enumerate(messages):
        name = _NAMES.get(turn["role"], f"\n\n{turn['role'].capitalize()}:")
        parts.append(f"{name} {turn['content']}" if name else "\n\n" * (place > 0) + turn["content"])
    return "".join(parts)


def open_dialogue(text: str) -> str:
    """Return a text that the assistant is to continue: a dialogue that ends in the human's turn gets the marker."""
    turns = turns_of(text)
    return text.rstrip() + ASSISTANT if turns and turns[-1].role == "user" else text


def conversation_text(prompt: Prompt) -> str:
    """Return a prompt as one text that holds all of it, for reports and reward functions.

    A text, and a single user message, is itself; longer conversations are a Human/Assistant text with every turn.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return _written(prompt) + (ASSISTANT if prompt[-1]["role"] != "assistant" else "")


class PromptText(str):
    """A prompt as one text, as reports and reward functions read it.

    Attributes:
        prompt: What the text was made of; reward models of another tokenizer read it under their own chat template.
        columns: The other columns of the prompt's row, by name.
        place: File and row that it was read from; empty where they are not known.
    """

    prompt: Prompt
    columns: Mapping[str, Any]
    place: str

    def __new__(cls, prompt: Prompt, columns: Mapping[str, Any] | None = None, place: str = "") -> PromptText:
        """Write a prompt down; one that is such a text already stays as it is."""
        if isinstance(prompt, PromptText):
            return prompt
        text = super().__new__(cls, conversation_text(prompt))
        text.prompt, text.columns, text.place = prompt, columns or {}, place
        return text


def split_pair(given: Prompt | None, chosen: Prompt, rejected: Prompt, where: str) -> Parts:
    """Cut a pair into the prompt and the two responses.

    Args:
        given: the stated prompt; None: the prompt is what chosen and rejected share.
        chosen: the better response, or the dialogue that ends in it, as text or messages.
        rejected: the worse one.
        where: file and row, for messages.

    Returns:
        (prompt, chosen, rejected), neither response empty.

    Raises:
        UnusableRowError: there is no prompt, or a response is empty, not the assistant's, or several turns.
        DataError: one response is text and the other a message list.
    """
    if not chosen or not rejected:  # null and "" in files whose other cells hold text or messages
        raise UnusableRowError(EMPTY)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{where}: one of chosen and rejected is text and the other a message list")
    if isinstance(chosen, str) and isinstance(rejected, str):
        dialogues = bool(turns_of(chosen)) and bool(turns_of(rejected))
        if given is None or dialogues:
            prompt, better, worse = _split_text(chosen, rejected)
            prompt = prompt if given is None else joined(given, as_messages(prompt))
        else:
            prompt, better, worse = _without_templated_prompt(given, chosen, rejected)
    else:
        assert not isinstance(chosen, str) and not isinstance(rejected, str)
        prompt, better, worse = _split_messages(given, chosen, rejected)
    if not better.strip() or not worse.strip():
        raise UnusableRowError(EMPTY)
    if better.strip() == worse.strip():
        raise UnusableRowError(SAME)
    last = as_messages(prompt)[-1]
    if last["role"] == "assistant" and last["content"].strip():
        raise UnusableRowError(PROMPT_ENDS_ANSWERED, shorten(repr(last["content"])))
    return open_dialogue(prompt) if isinstance(prompt, str) else prompt, better, worse


def _without_templated_prompt(given: Prompt, chosen: str, rejected: str) -> Parts:
    """Cut responses that hold their prompt as a chat template writes it; the text before them is the prompt then."""
    marks = list(_TEMPLATED.finditer(os.path.commonprefix([chosen, rejected])))
    question = as_messages(given)[-1]["content"].strip()
    if not marks or not question or question not in chosen[: marks[-1].start()]:
        return given, chosen, rejected
    end = marks[-1].end()
    return chosen[:end], chosen[end:], rejected[end:]


def _split_messages(given: Prompt | None, chosen: list[Message], rejected: list[Message]) -> Parts:
    inside = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if given is None and not inside:
        raise UnusableRowError(
            NO_PROMPT, f"chosen starts {shorten(repr(chosen[0]))}, rejected {shorten(repr(rejected[0]))}"
        )
    better, worse = (_only_turn(messages[inside:]) for messages in (chosen, rejected))
    return chosen[:inside] if given is None else joined(given, chosen[:inside]), better, worse


def _shared(one: list[Message], other: list[Message]) -> int:
    """Return how many first messages are the same but for blanks around them."""
    same = (_equal([left], [right]) for left, right in zip(one, other, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def _only_turn(messages: list[Message]) -> str:
    """Return the assistant's answer that is left after the prompt."""
    if messages[-1]["role"] != "assistant":
        raise UnusableRowError(NOT_THE_ASSISTANTS, f"it is {messages[-1]['role']!r}")
    if len(messages) > 1:
        raise UnusableRowError(DIVERGE)
    return messages[0]["content"]


def joined(given: Prompt, shared: list[Message]) -> Prompt:
    """Join a stated prompt and the turns before the responses, which may repeat it or continue it.

    Raises:
        UnusableRowError: the turns do neither.
    """
    stated = as_messages(given)
    if not shared or _equal(shared, stated):
        return given
    if _equal(shared[: len(stated)], stated) or _equal(shared[-len(stated) :], stated):
        return shared
    if shared[0]["role"] == "assistant":
        return [*stated, *shared]
    raise UnusableRowError(
        PROMPT_CONTRADICTED,
        f"the prompt {shorten(repr(given))} is not part of the {len(shared)} turns that chosen and rejected share, "
        f"which start {shorten(repr(shared[0]))}; state the whole conversation as the prompt, or leave it out",
    )


def _equal(one: list[Message], other: list[Message]) -> bool:
    return [(turn["role"], turn["content"].strip()) for turn in one] == [
        (turn["role"], turn["content"].strip()) for turn in other
    ]


def _split_text(chosen: str, rejected: str) -> Parts:
    better, worse = turns_of(chosen), turns_of(rejected)
    if not better or not worse:
        return _split_plain(chosen, rejected)
    for turns in (better, worse):
        if turns[-1].role != "assistant":
            raise UnusableRowError(NOT_THE_ASSISTANTS, f"a dialogue ends {shorten(repr(turns[-1].text))}")
    before = [[{"role": turn.role, "content": turn.text} for turn in turns[:-1]] for turns in (better, worse)]
    if not _equal(*before):
        raise UnusableRowError(DIVERGE if _shared(*before) else NO_PROMPT)
    return chosen[: better[-1].start], better[-1].text, worse[-1].text


def _split_plain(chosen: str, rejected: str) -> Parts:
    """Cut two plain texts after the words that they share, as TRL does for an implicit prompt, but never in a word.

    Where these words hold a mark that an answer follows ("### Response:", a chat template's), the cut is at its end:
    answers may start alike.
    """
    shared = os.path.commonprefix([chosen, rejected])
    marks = list(_ANSWER.finditer(shared))
    if marks and shared[: marks[-1].start()].strip():
        end = marks[-1].end()
        return chosen[:end], chosen[end:], rejected[end:]
    whole_words = len(shared) in (len(chosen), len(rejected)) or (
        chosen[len(shared)].isspace() and rejected[len(shared)].isspace()
    )
    prompt = shared if whole_words else re.sub(r"\S*$", "", shared)
    prompt = prompt.rstrip()
    if not prompt:
        raise UnusableRowError(NO_PROMPT, f"chosen starts {shorten(repr(chosen))}, rejected {shorten(repr(rejected))}")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]

"""Recognise a text that a chat template has written already, so that it is not written into the template again.

Data sets and clients often hold prompts after their chat template (``<s>[INST] Hi [/INST]``). Put into the template as
a user message, such a text would have its marks, and its BOS, twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vgf_llm.errors import DataError
from vgf_llm.runs.files import shorten

_FRAME = "vgf_frame"  # attribute of a tokenizer
_PROBE = "Hello."


@dataclass(frozen=True)
class _Frame:
    """What a chat template puts around one user message.

    Attributes:
        bos: The BOS where the template writes it, else "".
        opener: The mark that a conversation begins with, after the BOS; "" where it is an ordinary word.
        user: The mark of the user's turn.
        closed: What ends the user's turn; "" where that and the beginning of the answer are one mark.
        finished: What the template writes after the last turn where no answer is asked for, often an EOS or "".
        answer: The mark of the assistant's turn; "" where there is none.
        asked: After the user's message, up to where the answer begins.
        endings: Those of ``asked`` and ``answer`` that hold a mark.
    """

    bos: str
    opener: str
    user: str
    closed: str
    finished: str
    answer: str
    asked: str
    endings: tuple[str, ...]


def rendered_text(tokenizer: Any, text: str) -> str | None:
    """Return a text that the template has written as it is to be encoded, up to where an answer begins.

    A lost BOS, generation prompt or trailing white space is put back.

    Args:
        tokenizer: With a chat template.
        text: A prompt.

    Returns:
        The text with all special tokens in it; None for any other text.

    Raises:
        DataError: The text ends in the assistant's answer.
    """
    frame = _frame_of(tokenizer)
    if frame is None:
        return None
    body = text.lstrip().removeprefix(frame.bos)
    stripped = body.rstrip()
    ending = next((one for one in frame.endings if stripped.endswith(one.rstrip())), None)
    if ending is not None:
        return frame.bos + (body if body.endswith(ending) else stripped + ending[len(ending.rstrip()) :])
    if not frame.opener or not body.startswith(frame.opener):
        return None
    if frame.finished.strip():
        stripped = stripped.removesuffix(frame.finished.strip()).rstrip()
    if not frame.closed.strip() or not stripped.endswith(frame.closed.rstrip()):
        return frame.bos + body  # the answer has begun
    if frame.answer and stripped.rfind(frame.answer.strip()) > stripped.rfind(frame.user):
        raise DataError(
            f"the prompt {shorten(repr(text))} holds the chat template's marks and ends in the assistant's answer; end "
            "it before the answer, or give messages"
        )
    return frame.bos + stripped.removesuffix(frame.closed.rstrip()) + frame.asked


def _frame_of(tokenizer: Any) -> _Frame | None:
    """Return the frame of the tokenizer's template, found once per template."""
    key = str(tokenizer.chat_template)
    cached = getattr(tokenizer, _FRAME, None)
    if cached is None or cached[0] != key:
        cached = (key, _find_frame(tokenizer))
        setattr(tokenizer, _FRAME, cached)
    return cached[1]


def _find_frame(tokenizer: Any) -> _Frame | None:
    probe = [{"role": "user", "content": _PROBE}]
    try:
        whole = str(tokenizer.apply_chat_template(probe, add_generation_prompt=True, tokenize=False))
        turn = str(tokenizer.apply_chat_template(probe, add_generation_prompt=False, tokenize=False))
    except Exception:  # jinja2 raises several types; the template will say so itself when it gets the real messages
        return None
    if whole.count(_PROBE) != 1 or turn.count(_PROBE) != 1:
        return None
    marks = [token for token in tokenizer.get_added_vocab() if token] + ["[INST]", "[/INST]"]
    bos = tokenizer.bos_token if tokenizer.bos_token and whole.startswith(tokenizer.bos_token) else ""
    before, _, asked = whole.removeprefix(bos).partition(_PROBE)
    after = turn.partition(_PROBE)[2]
    closed = os.path.commonprefix([asked, after])
    if closed not in (asked, after):  # both go on with a token
        closed = closed[: closed.rfind("<")] if "<" in closed else closed
    answer, closed = ("", "") if asked == after else (asked[len(closed) :], closed)
    opener = max((mark for mark in marks if before.lstrip().startswith(mark)), key=len, default="")
    user = (before.rstrip().split("\n")[-1]).removeprefix(closed.strip()).strip()
    endings = tuple(one for one in (asked, answer) if one.strip() and any(mark in one for mark in marks))
    return _Frame(bos, opener, user, closed, after[len(closed) :] if closed else "", answer, asked, endings)

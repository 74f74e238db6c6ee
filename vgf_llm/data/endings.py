"""The first and last tokens of a text, decided in one place for training, sampling and scoring.

A response ends at any id that the tokenizer or the generation config calls an EOS, also where that id is the padding
token (Qwen pads with ``<|endoftext|>``): padding is told by masks, never by its id. A response that is trained or
scored is closed by the token that the chat template puts after the assistant's turn, so that a head reads the same last
token there as after sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vgf_llm.errors import DataError, ModelError

_KNOWN, _CLOSING, _OPENING = "vgf_eos_ids", "vgf_closing", "vgf_opening"  # attributes of a tokenizer
_ANSWER = "vgfanswer"  # no template writes it


def remember_eos_ids(tokenizer: Any, ids: Iterable[int]) -> None:
    """Attach the EOS ids of the model's generation config to its tokenizer, which knows one only."""
    setattr(tokenizer, _KNOWN, tuple(int(one) for one in ids))


def eos_ids_of(tokenizer: Any) -> tuple[int, ...]:
    """Return every EOS id that the tokenizer knows of, sorted: its own and those remembered."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(sorted({*own, *(getattr(tokenizer, _KNOWN, None) or ())}))


def closing_id(tokenizer: Any) -> int:
    """Return the id that closes a response: the first EOS after the assistant's turn of the chat template.

    Where the model's EOS ids were never remembered, a special token after the turn counts as one. Without a template,
    or where nothing that ends a text follows the turn, the tokenizer's own EOS closes it.

    Raises:
        ModelError: The tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so a response cannot be closed; set tokenizer.eos_token")
    template = getattr(tokenizer, "chat_template", None)
    key = (str(template), tokenizer.eos_token_id, getattr(tokenizer, _KNOWN, None))
    cached = getattr(tokenizer, _CLOSING, None)
    if cached is None or cached[0] != key:
        cached = (key, _find_closing(tokenizer) if template else int(tokenizer.eos_token_id))
        setattr(tokenizer, _CLOSING, cached)
    return cached[1]


def closing_ids(tokenizer: Any) -> list[int]:
    """Return all that the chat template writes after an assistant's turn, or the EOS alone where there is no template.

    Raises:
        ModelError: The tokenizer has no EOS token.
    """
    return _after_the_answer(tokenizer) or [closing_id(tokenizer)]


def answer_opening(tokenizer: Any) -> str:
    """Return the white space that the template writes between its generation prompt and an answer, often none.

    Where the tokenizer adds that space by itself (sentencepiece's ``▁``) there is none to add.
    """
    template = getattr(tokenizer, "chat_template", None)
    cached = getattr(tokenizer, _OPENING, None)
    if cached is None or cached[0] != str(template):
        cached = (str(template), _find_opening(tokenizer) if template else "")
        setattr(tokenizer, _OPENING, cached)
    return cached[1]


def _find_opening(tokenizer: Any) -> str:
    asked = [{"role": "user", "content": "Hello."}]
    try:
        start = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        talk = [*asked, {"role": "assistant", "content": _ANSWER}]
        whole = str(tokenizer.apply_chat_template(talk, tokenize=False))
    except Exception:  # as in `_after_the_answer`
        return ""
    opening = whole[len(start) :].partition(_ANSWER)[0]
    if not whole.startswith(start) or not opening or opening.strip():
        return ""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rest = ids(start + opening + _ANSWER)[len(ids(start)) :]
    return "" if rest == ids(_ANSWER) else opening


def _find_closing(tokenizer: Any) -> int:
    after = _after_the_answer(tokenizer)
    ends = set(eos_ids_of(tokenizer))
    found = [one for one in after if one in ends]
    if not found and getattr(tokenizer, _KNOWN, None) is None:
        found = [one for one in after if _is_special(tokenizer, one)]
    return int(found[0] if found else tokenizer.eos_token_id)


def _after_the_answer(tokenizer: Any) -> list[int]:
    """Return the ids that the template writes after an assistant's turn."""
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # jinja2 raises several types; a template that refuses this talk closes nothing
        return []
    _, answer, tail = str(text).rpartition(_ANSWER)
    return list(tokenizer(tail, add_special_tokens=False)["input_ids"]) if answer else []


def _is_special(tokenizer: Any, one: int) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(one)
    return one in tokenizer.all_special_ids or bool(added is not None and added.special)


def closed(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return a response's ids ended once: as they are up to their own EOS, else with the closing id added.

    What follows a response's own EOS is cut off where it holds no text (``<|im_end|>`` and a line break); an EOS with
    text after it is part of that text.

    Raises:
        ModelError: The tokenizer has no EOS token.
    """
    closing = closing_id(tokenizer)
    ends = {*eos_ids_of(tokenizer), closing}
    at = next((place for place, one in enumerate(ids) if one in ends), None)
    if at is not None and not tokenizer.decode(list(ids[at:]), skip_special_tokens=True).strip():
        return list(ids[: at + 1])
    return [*ids, closing]


def opened(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that is to be continued: with the tokenizer's own BOS, once, and no EOS but the text's own."""
    whole = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    room = len(whole) - len(plain)
    starts = [start for start in range(room, -1, -1) if plain and whole[start : start + len(plain)] == plain]
    if not starts:  # nothing but special tokens, or a tokenizer that writes the text in another way after a BOS
        added_end = whole and whole[-1] == tokenizer.eos_token_id and plain[-1:] != whole[-1:]
        return whole[:-1] if added_end else whole
    start = _added_before(tokenizer, whole, starts)
    before, after = whole[:start], whole[start + len(plain) :]
    while after and after[-1] == tokenizer.eos_token_id:
        after.pop()
    return [*([] if plain[: len(before)] == before else before), *plain, *after]


def _added_before(tokenizer: Any, whole: list[int], starts: list[int]) -> int:
    """Return how many ids were added before the text, of several places where it may stand."""
    if len(starts) == 1:
        return starts[0]
    bos = tokenizer.bos_token_id
    return max(starts) if whole[0] == bos else min(starts)


def padding_id(tokenizer: Any, rows: int) -> int:
    """Return an id to fill padding with: the tokenizer's, or 0 where the model has no row for that one.

    Args:
        tokenizer: the model's.
        rows: of the model's embedding table.
    """
    own = tokenizer.pad_token_id
    return int(own) if own is not None and own < rows else 0


def check_ids(tokenizer: Any, ids: Sequence[int], rows: int, where: str) -> None:
    """Refuse ids that the model has no embedding for; a tokenizer may hold tokens that no text has.

    Args:
        tokenizer: names the token.
        ids: of a text.
        rows: of the model's embedding table.
        where: the text, for the message.

    Raises:
        DataError: naming the token.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"{where} holds the token {token!r} (id {largest}), and the model's table has {rows} rows; take the token "
            "out of the text, or resize the model's embeddings and train them"
        )

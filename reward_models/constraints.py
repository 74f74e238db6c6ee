"""Constraints as reward functions: 1.0 where a response keeps one, 0.0 where it does not.

Every function takes prompts and responses. It takes its limits as one value per response: a column of the prompt file
of that name, or the same value for all by ``arguments`` in a composed reward (docs/reward_models.md). Words are runs of
letters, digits and apostrophes, compared without case. A limit of None is not asked for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from vgf_llm.errors import ConfigError

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u2019\u201d)\]*_]*(?=\s|$)")
_CLOSING = "\"'\u2019\u201d)]*_ \t\r\n"


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; "don't" and "well-known" are one each."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text.

    A sentence ends in ``.``, ``!``, ``?`` or an ellipsis before white space or the end; what is left at the end counts
    as one. An abbreviation that white space follows ("Dr. No") ends one too, a decimal point does not.
    """
    cuts = [match.end() for match in _SENTENCE_END.finditer(text)]
    parts = [text[start:end].strip() for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [part for part in parts if words_of(part)]


def words_within(
    prompts: list[str],
    responses: list[str],
    at_least: Sequence[int | None] | None = None,
    at_most: Sequence[int | None] | None = None,
) -> list[float]:
    """Ask for a number of words within limits, both included.

    Args:
        prompts: Not read.
        responses: R texts.
        at_least: Words, per response.
        at_most: Words, per response.
    """
    counts = [len(words_of(response)) for response in responses]
    return _within("words_within", counts, at_least, at_most)


def tokens_within(
    prompts: list[str],
    responses: list[str],
    tokenizer: Sequence[str],
    at_least: Sequence[int | None] | None = None,
    at_most: Sequence[int | None] | None = None,
) -> list[float]:
    """Ask for a number of tokens within limits, both included.

    Args:
        prompts: Not read.
        responses: R texts; special tokens, which a response has lost, are not counted.
        tokenizer: The model whose tokens count, per response: a folder, a hub name, or "default".
        at_least: Tokens, per response.
        at_most: Tokens, per response.

    Raises:
        ModelError: The tokenizer cannot be loaded.
    """
    loaded = [_tokenizer(name) for name in tokenizer]
    counts = [
        len(one(response, add_special_tokens=False)["input_ids"])
        for one, response in zip(loaded, responses, strict=True)
    ]
    return _within("tokens_within", counts, at_least, at_most)


def valid_json(
    prompts: list[str], responses: list[str], keys: Sequence[Sequence[str] | None] | None = None
) -> list[float]:
    """Ask for a response that is one JSON object, and has the given keys, others being allowed.

    A fence (three backquotes, with or without ``json``) around the object is taken off.

    Args:
        prompts: Not read.
        responses: R texts.
        keys: Names, per response.
    """
    wanted = _each("valid_json", "keys", keys, len(responses))
    return [float(_has_keys(response, _names(names))) for response, names in zip(responses, wanted, strict=True)]


def without_words(
    prompts: list[str], responses: list[str], banned: Sequence[str | Sequence[str] | None]
) -> list[float]:
    """Ask for a response without given words, whole words in any case.

    Args:
        prompts: Not read.
        responses: R texts.
        banned: A word or a list of words, per response.
    """
    kept = []
    for response, names in zip(responses, _each("without_words", "banned", banned, len(responses)), strict=True):
        there = " ".join(["", *words_of(response), ""])
        kept.append(float(not any(f" {' '.join(words_of(word))} " in there for word in _names(names))))
    return kept


def sentences_exactly(prompts: list[str], responses: list[str], number: Sequence[int | None]) -> list[float]:
    """Ask for an exact number of sentences (`sentences_of`).

    Args:
        prompts: Not read.
        responses: R texts.
        number: Sentences, per response.
    """
    return _within("sentences_exactly", [len(sentences_of(response)) for response in responses], number, number)


def ends_with_question(prompts: list[str], responses: list[str]) -> list[float]:
    """Ask for a response that ends in a question mark; closing quotes, brackets and blanks may follow it."""
    return [float(response.rstrip(_CLOSING).endswith("?")) for response in responses]


def word_in_second_half(prompts: list[str], responses: list[str], word: Sequence[str | None]) -> list[float]:
    """Ask for a word in the second half of the words; of an odd number the middle one is in the second half.

    Args:
        prompts: Not read.
        responses: R texts.
        word: Per response, in any case.
    """
    found = []
    for response, one in zip(responses, _each("word_in_second_half", "word", word, len(responses)), strict=True):
        words = words_of(response)
        found.append(float(one is None or str(one).lower() in words[len(words) // 2 :]))
    return found


def without_letter(prompts: list[str], responses: list[str], letter: Sequence[str | None]) -> list[float]:
    """Ask for a response, not empty, in which a letter does not occur, in neither case.

    Args:
        prompts: Not read.
        responses: R texts.
        letter: Per response; several letters are each asked for.
    """
    letters = _each("without_letter", "letter", letter, len(responses))
    return [
        float(one is None or (bool(response.strip()) and not set(str(one).lower()) & set(response.lower())))
        for response, one in zip(responses, letters, strict=True)
    ]


def _within(name: str, counts: list[int], at_least: Any, at_most: Any) -> list[float]:
    lowest, highest = (_each(name, key, limit, len(counts)) for key, limit in (("lower", at_least), ("upper", at_most)))
    return [
        float((low is None or count >= low) and (high is None or count <= high))
        for count, low, high in zip(counts, lowest, highest, strict=True)
    ]


def _each(name: str, key: str, values: Any, count: int) -> list[Any]:
    """Return one limit per response.

    Raises:
        ConfigError: It is not a list of that length.
    """
    if values is None:
        return [None] * count
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        raise ConfigError(f"{name}: the {key} limit must be a list with one value for each of {count} responses")
    return list(values)


def _names(names: Any) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else [str(name) for name in names]


def _has_keys(text: str, keys: list[str]) -> bool:
    text = text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(key in found for key in keys)


@functools.cache
def _tokenizer(name: str) -> Any:
    from vgf_llm.models.loading import load_tokenizer

    return load_tokenizer(name)

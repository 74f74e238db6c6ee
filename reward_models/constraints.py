"""Constraints as reward functions: 1.0 where a response keeps one, 0.0 where it does not.

Every function takes prompts and responses. It takes its limits as one value per response: a column of the prompt file
of that name, or the same value for all by ``arguments`` in a composed reward (docs/reward_models.md). Words and
sentences are those of `reward_models.words`, in any script. A limit of None is not asked for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from reward_models.words import ends_in_question, holds, letters_of, lowered, sentences_of, words_of
from vgf_llm.errors import ConfigError


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
    """Ask for a response without given words or phrases, whole words in any case.

    A phrase is found whatever blanks, line breaks or marks part its words (`reward_models.words.holds`).

    Args:
        prompts: Not read.
        responses: R texts.
        banned: A word or phrase, or a list of them, per response.

    Raises:
        ConfigError: One of them is blank.
    """
    kept = []
    for response, names in zip(responses, _each("without_words", "banned", banned, len(responses)), strict=True):
        wanted = [_not_blank("without_words", "banned", one) for one in _names(names)]
        kept.append(float(not any(holds(response, one) for one in wanted)))
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
    """Ask for a response that ends in a question mark; ``!``, closing quotes, brackets and blanks may follow it."""
    return [float(ends_in_question(response)) for response in responses]


def word_in_second_half(prompts: list[str], responses: list[str], word: Sequence[str | None]) -> list[float]:
    """Ask for a word in the second half of the words; of an odd number the middle one is in the second half.

    Args:
        prompts: Not read.
        responses: R texts.
        word: Per response, in any case; a phrase has to stand there as a whole.

    Raises:
        ConfigError: One of them is blank.
    """
    found = []
    for response, one in zip(responses, _each("word_in_second_half", "word", word, len(responses)), strict=True):
        half = len(words_of(response)) // 2
        found.append(float(one is None or holds(response, _not_blank("word_in_second_half", "word", one), half)))
    return found


def without_letter(prompts: list[str], responses: list[str], letter: Sequence[str | None]) -> list[float]:
    """Ask for a response, not empty, in which a letter does not occur, in neither case.

    Args:
        prompts: Not read.
        responses: R texts.
        letter: Per response; several letters are each asked for.

    Raises:
        ConfigError: One of them is blank.
    """
    kept = []
    for response, one in zip(responses, _each("without_letter", "letter", letter, len(responses)), strict=True):
        if one is None:
            kept.append(1.0)
            continue
        there, wanted = lowered(response), letters_of(_not_blank("without_letter", "letter", one))
        kept.append(float(bool(response.strip()) and not any(each in there for each in wanted)))
    return kept


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


def _not_blank(name: str, key: str, asked: Any) -> str:
    """Return what is looked for, as text.

    Raises:
        ConfigError: It is blank, so that nothing could be looked for.
    """
    if not letters_of(str(asked)):
        raise ConfigError(f"{name}: {key} is {asked!r}, which is blank; name what is meant, or null for no limit")
    return str(asked)


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

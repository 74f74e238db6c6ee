"""Rewards in the answers of servers: a judge's number, the outputs of a classifier, and their place in the JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.runs.files import shorten

_VALUE = r"[-+\u2212]?(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+\u2212]?\d++)?+"
_NUMBER = rf"({_VALUE})(?![,.]?\d|[-\u2013\u2014]\d|\s*to\s+\d)"  # not "1,000", and not the start of a range
_RANGE = rf"\s*[(\[][^()\[\]\n]{{0,40}}[)\]]|\s*{_VALUE}\s*(?:[-\u2013\u2014]|to)\s*{_VALUE}"
_SCORE = rf"(?i:score|rating|grade|reward)(?:(?:{_RANGE})(?=\W{{0,4}}?:))?+\W{{0,6}}?(?:is\W{{0,3}}?)?{_NUMBER}"


def number_in(said: str, pattern: re.Pattern[str] | None, judge: str) -> float:
    """Return the number in a judge's answer.

    Args:
        said: The answer.
        pattern: Its first group is the number, and its last match counts; None: "score: 7", or a bare number.
        judge: Names it in errors.

    Raises:
        ModelError: There is none; the message holds the answer.
    """
    if pattern is None:
        bare = re.fullmatch(rf"\W*?{_NUMBER}\W*", said.strip())
        found = [bare[1]] if bare else re.findall(_SCORE, said)
    else:
        found = [match[1] for match in pattern.finditer(said)]
    try:
        return float(found[-1].replace("\u2212", "-"))
    except (AttributeError, IndexError, ValueError):  # the group may be None
        wanted = "'score: <number>'" if pattern is None else f"{pattern.pattern!r}"
        raise ModelError(
            f"judge {judge}: no number as {wanted} in its answer {shorten(repr(said), 300)}; ask for it in the "
            "template, or set pattern"
        ) from None


def number_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Return the pattern of a judge's number.

    Raises:
        ConfigError: It is not a regular expression with a group.
    """
    if pattern is None:
        return None
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"endpoint: pattern {pattern!r} is not a regular expression: {error}") from error
    if found.groups < 1:
        raise ConfigError(f"endpoint: pattern {pattern!r} needs a group in parentheses, which is the number")
    return found


def weighted(outputs: Sequence[float], weights: Mapping[str, float], model: str) -> float:
    """Return the weighted sum of a classifier's outputs.

    Args:
        outputs: At least one.
        weights: By the number of an output; empty where there is one.
        model: Names it in errors.

    Raises:
        ConfigError: Several outputs and no weights, or a weight of an output that there is not.
    """
    if not weights and len(outputs) != 1:
        raise ConfigError(
            f'reward model {model} has {len(outputs)} outputs; give their weights, for example outputs: {{"0": 1.0}}'
        )
    if any(int(number) >= len(outputs) for number in weights):
        raise ConfigError(f"outputs: {model} has {len(outputs)} outputs, numbered from 0")
    return sum(w * float(outputs[int(number)]) for number, w in weights.items()) if weights else float(outputs[0])


def found_in(answer: Any, *path: str | int) -> Any:
    """Return a value inside an answer.

    Raises:
        ModelError: It is not there.
    """
    found = answer
    try:
        for part in path:
            found = found[part]
    except (LookupError, TypeError):
        raise ModelError(
            f"the server's answer has no {'.'.join(map(str, path))}: {shorten(json.dumps(answer), 200)}; does it serve "
            "this kind of model?"
        ) from None
    return found

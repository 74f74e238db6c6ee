"""The reward of this recipe: whether a response states the right sum, by the column ``answer``."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d{1,9}(?!\d)")


def exact_match(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """Return 1.0 where the last number of a response is the answer, else 0.0.

    Args:
        prompts: Not read.
        responses: What was written.
        answer: The column of that name, per response.
    """
    found = [stated(response) for response in responses]
    return [float(number is not None and number == int(right)) for number, right in zip(found, answer, strict=True)]


def closeness(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """Return 1 / (1 + distance) of the last number from the answer, 0.0 without a number.

    A small model is seldom right, and where all responses to a prompt are wrong an exact match has nothing to compare.

    Args:
        prompts: Not read.
        responses: What was written.
        answer: The column of that name, per response.
    """
    rewards = []
    for response, right in zip(responses, answer, strict=True):
        number = stated(response)
        rewards.append(0.0 if number is None else 1 / (1 + abs(number - int(right))))
    return rewards


def stated(response: str) -> int | None:
    """Return the last number of a text, None where there is none."""
    numbers = _NUMBER.findall(response.replace(",", ""))
    return int(numbers[-1]) if numbers else None

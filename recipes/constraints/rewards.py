"""Rewards that code checks and that a list of words cannot follow, and one that it can."""

from __future__ import annotations

from reward_models.constraints import ends_with_question, sentences_of, words_of


def two_sentences(prompts: list[str], responses: list[str]) -> list[float]:
    """Return 1.0 where a response is two sentences, whole or cut at its end, else 0.0.

    A full stop is right once and wrong before and after, so its worth depends on the text before it.

    Args:
        prompts: Not read.
        responses: What was written.
    """
    return [float(len(sentences_of(response)) == 2) for response in responses]


def question_at_the_end(prompts: list[str], responses: list[str]) -> list[float]:
    """Return 1.0 where a response ends with a question mark, else 0.0: the mark counts in one place alone.

    Args:
        prompts: As the responses are.
        responses: What was written.
    """
    return ends_with_question(prompts, responses)


def words_without_e(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the share of words without the letter e: a table of words is all that it takes.

    Args:
        prompts: Not read.
        responses: What was written.
    """
    found = []
    for response in responses:
        words = words_of(response)
        found.append(sum("e" not in word for word in words) / max(len(words), 1))
    return found

"""Python reward functions: `fn(prompts: list[str], responses: list[str]) -> list[float]`, one finite number a response.

Any importable function of that signature is one; the ones here are for demonstrations and tests.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from vgf_llm.errors import ConfigError, ModelError, VGFError

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


def vader_compound(prompts: list[str], responses: list[str]) -> list[float]:
    """Score sentiment by the VADER lexicon (Hutto and Gilbert, 2014): compound in [-1, 1], higher is more positive."""
    analyser = _vader()
    return [float(analyser.polarity_scores(response)["compound"]) for response in responses]


def length_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Score by length: the number of whitespace-separated words."""
    return [float(len(response.split())) for response in responses]


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    """Score by brevity: minus the number of words."""
    return [-count for count in length_words(prompts, responses)]


@functools.cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModelError("vader_compound needs the package vaderSentiment; run `pip install vaderSentiment`") from error
    return SentimentIntensityAnalyzer()


def load_function(name: str) -> RewardFunction:
    """Import a reward function.

    Args:
        name: "module:function" (the module must be importable from here), or the name of a function of this module.

    Raises:
        ConfigError: the module or function does not exist, or is not callable.
    """
    module_name, _, function_name = name.rpartition(":")
    try:
        module = importlib.import_module(module_name or __name__)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reward function {name!r}: module {module_name!r} cannot be imported ({error}); run from its folder or "
            "install it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        offered = "vader_compound, length_words, brevity" if not module_name else f"the functions of {module_name}"
        raise ConfigError(f"reward function {name!r} does not exist; use {offered}, or 'module:function'")
    return function


def remembered(function: RewardFunction) -> RewardFunction:
    """Return the same function, called once for each prompt and response: arms of a comparison share their samples."""
    known: dict[tuple[str, str], float] = {}

    @functools.wraps(function)
    def call(prompts: list[str], responses: list[str]) -> list[float]:
        pairs = list(zip(prompts, responses, strict=True))
        new = list(dict.fromkeys(pair for pair in pairs if pair not in known))
        if new:
            rewards = call_function(function, [prompt for prompt, _ in new], [response for _, response in new])
            known.update(zip(new, rewards, strict=True))
        return [known[pair] for pair in pairs]

    return call


def call_function(function: RewardFunction, prompts: list[str], responses: list[str]) -> list[float]:
    """Call a reward function and check what it returns.

    Raises:
        ModelError: it raises, the number of rewards differs from that of the responses, or one is not a finite number.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        rewards = list(function(prompts, responses))
    except VGFError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"reward function {name} raised {type(error).__name__} on {len(responses)} responses: {error}; mend it, or "
            "name another one"
        ) from error
    if len(rewards) != len(responses):
        raise ModelError(f"reward function {name} returned {len(rewards)} rewards for {len(responses)} responses")
    for index, reward in enumerate(rewards):
        if not _is_finite_number(reward):
            raise ModelError(
                f"reward function {name} returned {reward!r} for response {index} ({responses[index][:60]!r}); "
                "every reward must be a finite number"
            )
    return [float(reward) for reward in rewards]


def _is_finite_number(reward: Any) -> bool:
    """Whether it is a number, also NumPy's, or a tensor of one element; a text is not, whatever it says."""
    if isinstance(reward, str | bytes):
        return False
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, RuntimeError):
        return False

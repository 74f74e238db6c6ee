"""Python reward functions: `fn(prompts: list[str], responses: list[str]) -> list[float]`, one number per response.

Any importable function of that signature is one; the ones here are for demonstrations and tests. A function may take
further arguments: each is the column of that name in the prompt file, one value per response (`answer`), and
`**columns` takes all of them. A prompt is its whole conversation as text; `prompts[i].prompt` holds the messages.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vgf_llm.errors import ConfigError, ModelError, VGFError

RewardFunction = Callable[..., Sequence[float]]


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
        ConfigError: the module or function does not exist or is not callable, or the module raises when it is read.
    """
    module_name, _, function_name = name.rpartition(":")
    try:
        module = importlib.import_module(module_name or __name__)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reward function {name!r}: module {module_name!r} cannot be imported ({error}); run from its folder or "
            "install it"
        ) from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is read
        raise ConfigError(
            f"reward function {name!r}: reading the module {module_name!r} raised {type(error).__name__}: {error}; "
            "mend it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        offered = "vader_compound, length_words, brevity" if not module_name else f"the functions of {module_name}"
        raise ConfigError(f"reward function {name!r} does not exist; use {offered}, or 'module:function'")
    found: RewardFunction = function
    return found


def remembered(function: RewardFunction) -> RewardFunction:
    """Return the same function, called once for each prompt and response: arms of a comparison share their samples."""
    known: dict[tuple[str, str, str], float] = {}

    def call(prompts: list[str], responses: list[str]) -> list[float]:
        pairs = list(zip(prompts, responses, strict=True))
        keys = [(prompt, response, repr(getattr(prompt, "columns", None))) for prompt, response in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        if new:
            asked, answers = zip(*new.values(), strict=True)
            rewards = call_function(function, list(asked), list(answers))
            known.update(zip(new, rewards, strict=True))
        return [known[key] for key in keys]

    call.__name__ = getattr(function, "__name__", repr(function))
    return call


def further_arguments(function: RewardFunction, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of the prompts' rows that a function takes beside prompts and responses.

    Args:
        function: its parameters after the second name columns; `**anything` takes all.
        prompts: those of `vgf_llm.data.dialogue.PromptText` bring columns; others have none.

    Returns:
        One list per column, a value per prompt, None where a row has no such column.

    Raises:
        ConfigError: a parameter without a default is no column of any row.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a built-in without a signature
        return {}
    rows = [getattr(prompt, "columns", {}) for prompt in prompts]
    there = dict.fromkeys(name for row in rows for name in row)
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        positional = []  # all of them may be taken by place
    wanted = [one for one in named if one not in positional[:2]]
    for one in wanted:
        if one.name not in there and one.default is one.empty:
            raise ConfigError(
                f"reward function {getattr(function, '__name__', repr(function))} takes {one.name!r}, and the prompts' "
                f"rows have no such column; columns: {', '.join(there) or 'none'}"
            )
    names = {one.name for one in wanted}
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        names |= {name for name in there if name not in {one.name for one in positional[:2]}}
    return {name: [row.get(name) for row in rows] for name in there if name in names}


def call_function(function: RewardFunction, prompts: list[str], responses: list[str]) -> list[float]:
    """Call a reward function and check what it returns.

    Columns of the prompts' rows that it takes are passed as well (`further_arguments`).

    Raises:
        ConfigError: it takes a column that the rows do not have.
        ModelError: it raises, the number of rewards differs from that of the responses, or one is not a finite number.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        # copies, so that a function may change its lists
        rewards = function(list(prompts), list(responses), **further_arguments(function, prompts))
        if isinstance(rewards, Mapping | set):
            raise TypeError(f"it returned a {type(rewards).__name__}, where one number per response is expected")
        rewards = list(rewards)
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
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False

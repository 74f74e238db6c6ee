"""Python reward functions: `fn(prompts: list[str], responses: list[str]) -> list[float]`, one number per response.

Any importable function of that signature is one; the ones here are for demonstrations and tests. A function may take
further arguments: each is the column of that name in the prompt file, one value per response (`answer`), `**columns`
takes all of them, `rows` is the whole rows, and `messages` the conversations as lists of turns. A prompt is its whole
conversation as text; `prompts[i].prompt` holds the messages too. A function may be `async`, and one that is marked with
`per_response` scores one response per call.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from reward_models.calling import CalledReward, listed, not_finite
from reward_models.signature import Signature, is_finite_number, name_of, per_response
from vgf_llm.errors import ConfigError, ModelError, VGFError

__all__ = [
    "RewardFunction",
    "brevity",
    "call_function",
    "check_columns",
    "further_arguments",
    "length_words",
    "load_function",
    "per_response",
    "vader_compound",
]

RewardFunction = Callable[..., Any]
"""Returns one finite number per response, or an awaitable of that; with `per_response` one number."""

_OFFERED = ("reward_models.functions", "reward_models.constraints")  # where a name without a module is looked up


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
        name: "module:function" (the module must be importable from here), or the name of a function of this module or
            of `reward_models.constraints`.

    Raises:
        ConfigError: the module or function does not exist or is not callable, or the module raises when it is read.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name:
        return _own_function(name)
    try:
        module = importlib.import_module(module_name)
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
        raise ConfigError(
            f"reward function {name!r} does not exist; use the functions of {module_name}, or 'module:function'"
        )
    found: RewardFunction = function
    return found


def _own_function(name: str) -> RewardFunction:
    """Return a function of ours by its name alone."""
    offered: dict[str, RewardFunction] = {}
    for module_name in _OFFERED:
        module = importlib.import_module(module_name)
        offered |= {one: found for one, found in vars(module).items() if _is_reward(found, module_name)}
    if name not in offered:
        raise ConfigError(f"reward function {name!r} does not exist; use {', '.join(offered)}, or 'module:function'")
    return offered[name]


def _is_reward(one: Any, module_name: str) -> bool:
    """Return whether something of a module is a reward function that is written there."""
    if not inspect.isfunction(one) or one.__module__ != module_name or one.__name__.startswith("_"):
        return False
    parameters = list(inspect.signature(one).parameters)
    return parameters[:2] == ["prompts", "responses"]


def further_arguments(function: RewardFunction, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """Return what a function takes beside prompts and responses, by parameter.

    Args:
        function: its parameters after the second name columns; `**anything` takes all.
        prompts: those of `vgf_llm.data.dialogue.PromptText` bring columns; others have none.

    Returns:
        One list per column, a value per prompt; messages and rows likewise. Where a parameter has a default, a row
        without its column gives None.

    Raises:
        ConfigError: a parameter without a default is not a column of any row.
        DataError: it is not a column of one of the rows.
    """
    return Signature(function).arguments(prompts, [""] * len(prompts)).by_name


def check_columns(function: RewardFunction, prompts: Sequence[str]) -> None:
    """Refuse a function that takes a column which the prompts do not have.

    Raises:
        ConfigError: no row has it; naming function and column, and the columns that there are.
        DataError: one row does not have it.
    """
    signature = function.signature if isinstance(function, CalledReward) else Signature(function)
    signature.check_rows(prompts)


def call_function(function: RewardFunction, prompts: list[str], responses: list[str]) -> list[float]:
    """Call a reward function and check what it returns.

    Columns of the prompts' rows that it takes are passed as well (`further_arguments`).

    Raises:
        ConfigError: it takes a column that the rows do not have.
        DataError: it takes a column that one of the rows does not have.
        ModelError: it raises, the number of rewards differs from that of the responses, or one is not a finite number.
    """
    name, signature = name_of(function), Signature(function)
    if signature.one_by_one or inspect.iscoroutinefunction(function):
        return CalledReward(function)(prompts, responses)
    try:
        # copies, so that a function may change its lists
        arguments = signature.arguments(prompts, responses)
        rewards = listed(name, function(*arguments.by_place, **arguments.by_name), len(responses))
    except VGFError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"reward function {name} raised {type(error).__name__} on {len(responses)} responses: {error}; mend it, or "
            "name another one"
        ) from error
    for index, reward in enumerate(rewards):
        if not is_finite_number(reward):
            raise not_finite(name, reward, index, prompts[index], responses[index])
    return [float(reward) for reward in rewards]

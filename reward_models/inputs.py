"""Looks at the rewards a command is given before torch and transformers are imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.calling import CalledReward
from reward_models.composed import ComposedReward
from reward_models.endpoint import EndpointReward
from reward_models.functions import RewardFunction, check_columns, load_function
from reward_models.grammar import Part, is_composed, read_composed
from reward_models.reward_cache import RewardCache
from reward_models.sources import is_hub_name
from vgf_llm.console.screen import say
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.models.inputs import check_base_model, check_holds_model
from vgf_llm.settings import ModelSettings, RewardCallSettings


def check_reward_model(name: str | None) -> None:
    """Refuse a reward model that is neither a folder with a model in it nor a name on the hub.

    Raises:
        ConfigError: None is named.
        ModelError: The folder does not exist, or does not hold a model.
    """
    if name is None:
        raise ConfigError("reward_model is not set; train one with `vgf-llm reward` and name its folder")
    if is_hub_name(name):
        return
    if not Path(name).is_dir():
        raise ModelError(f"reward_model {name!r} is not a folder; train one with `vgf-llm reward` and name its folder")
    check_holds_model(Path(name), "reward_model")


def check_models(models: ModelSettings) -> None:
    """Refuse the models of a command that transports.

    Raises:
        VGFError: As for `check_reward_model` and `check_base_model`.
    """
    check_reward_model(models.reward_model)
    check_base_model(models.model_name_or_path)


def check_rewards(
    names: Sequence[str],
    gold: str | None = None,
    prompts: Sequence[Any] = (),
    calls: RewardCallSettings | None = None,
) -> None:
    """Refuse rewards that are neither folders of models, functions nor files that compose them.

    Functions are imported, templates of judges are read, and the cache is opened.

    Args:
        names: Folders, functions and YAML files.
        gold: One more, which is not trained on.
        prompts: What functions will be called with; none are looked at when empty.
        calls: How functions are called.

    Raises:
        ConfigError: A function, file or folder does not exist, a function takes a column that the prompts do not have,
            or a server's URL is not set.
        DataError: A function takes a column that one of the prompts does not have.
        ModelError: A folder does not hold a model.
        OutputError: The cache cannot be used.
    """
    for name in names:
        if is_hub_name(name) and not is_composed(name):
            continue
        if not is_composed(name) and not Path(name).is_dir() and "/" in name:
            raise ConfigError(
                f"rewards: {name!r} is not a folder; train a reward model with `vgf-llm reward`, or name a function or "
                "a YAML file"
            )
        _check("rewards", name, prompts)
    if gold is not None and (is_composed(gold) or not is_hub_name(gold)):
        _check("gold", gold, prompts, running=False)
    if calls is not None and calls.reward_cache is not None:
        RewardCache(calls.reward_cache).check()
    elif calls is not None and (asked := [name for name in (*names, gold) if name and _asks_a_server(name)]):
        say(f"{asked[0]} asks a server, and reward_cache is not set: a run that is stopped pays for its rewards again")


def _asks_a_server(name: str) -> bool:
    return is_composed(name) and any(part.endpoint is not None for part in read_composed(name).walk())


def _check(key: str, name: str, prompts: Sequence[Any], running: bool = True) -> None:
    """Look at one reward and its parts.

    Args:
        key: Of the setting, for messages.
        name: Of the reward.
        prompts: As for `check_rewards`.
        running: Whether its parts may be standardised by running statistics.
    """
    if Path(name).is_dir():
        check_holds_model(Path(name), key)
    elif is_composed(name):
        try:
            part = read_composed(name)
            composed = ComposedReward(part, lambda leaf: _checked_part(leaf, key, prompts), name)
            if not running:
                composed.check_fixed()
        except ConfigError as error:
            raise error if str(error).startswith(name) else ConfigError(f"{name}: {error}") from error
    else:
        _check_columns(CalledReward(load_function(name)), prompts)


def _checked_part(part: Part, key: str, prompts: Sequence[Any]) -> RewardFunction:
    if part.reward is not None and Path(part.reward).is_dir():
        check_holds_model(Path(part.reward), key)
        return _nothing
    called = called_part(part, None)
    _check_columns(called, prompts)
    return called


def called_part(part: Part, calls: RewardCallSettings | None) -> CalledReward:
    """Return the function or server of a part of a composed reward.

    Args:
        part: A reward that is not a folder, or an endpoint.
        calls: How it is called.

    Raises:
        ConfigError: The function does not exist, it does not take the arguments, or a server's settings are wrong.
    """
    if part.endpoint is not None:
        limit = None if calls is None else calls.reward_timeout_sec
        return CalledReward(EndpointReward(part.endpoint, limit), calls)
    assert part.reward is not None
    if "/" in part.reward:
        raise ConfigError(f"reward: {part.reward!r} is not a folder; name one that exists, or a function")
    return CalledReward(load_function(part.reward), calls, name=part.reward, constants=part.arguments)


def _check_columns(called: CalledReward, prompts: Sequence[Any]) -> None:
    if prompts:
        check_columns(called, prompts)


def _nothing(prompts: list[str], responses: list[str]) -> list[float]:
    """Stand for a model that is not loaded yet."""
    return [0.0] * len(responses)

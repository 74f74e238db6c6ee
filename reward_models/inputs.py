"""Looks at the rewards a command is given before torch and transformers are imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.functions import further_arguments, load_function
from reward_models.sources import is_hub_name
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.models.inputs import check_base_model, check_holds_model
from vgf_llm.settings import ModelSettings


def check_reward_model(name: str | None) -> None:
    """Refuse a reward model that is neither a folder with a model in it nor a name on the hub.

    Raises:
        ConfigError: None is named.
        ModelError: The folder does not exist, or holds no model.
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


def check_rewards(names: Sequence[str], gold: str | None = None, prompts: Sequence[Any] = ()) -> None:
    """Refuse rewards that are neither folders of models nor functions; the functions are imported.

    Args:
        names: Folders and functions.
        gold: One more function.
        prompts: What functions will be called with; none are looked at when empty.

    Raises:
        ConfigError: A function or folder does not exist, or a function takes a column that the prompts do not have.
        ModelError: A folder holds no model.
    """

    def check_function(name: str) -> None:
        function = load_function(name)
        if prompts:
            further_arguments(function, prompts)

    for name in names:
        if Path(name).is_dir():
            check_holds_model(Path(name), "rewards")
        elif is_hub_name(name):
            continue
        elif "/" in name:
            raise ConfigError(
                f"rewards: {name!r} is not a folder; train a reward model with `vgf-llm reward`, or name a function"
            )
        else:
            check_function(name)
    if gold is not None and Path(gold).is_dir():
        check_holds_model(Path(gold), "gold")
    elif gold is not None and not is_hub_name(gold):
        check_function(gold)

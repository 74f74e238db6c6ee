"""Recipes and flags to dataclasses: one call, strict about keys, types and ranges.

A thin layer over jsonargparse, which checks types and takes the help texts from the strings under the dataclass fields.
What is added here: several dataclasses share one flat level of keys, an unknown key or flag is an error that names the
file and the nearest valid key at any depth (``config_keys``), and a ``__post_init__`` that refuses a value is reported
with its key. ``--resume`` alone means ``--resume true``, and a list can be given item by item
(``--prompt "a" --prompt "b"``).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgf_llm.errors import ConfigError, SettingError
from vgf_llm.settings.keys import (
    complete_flags,
    dataclass_in,
    field_hints,
    flag_hint,
    inline_yaml,
    item_hint,
    listed,
    load_recipe,
    type_name,
)
from vgf_llm.settings.renamed import expected

Sources = list[tuple[str, dict[str, Any]]]
"""Recipes as (path, nested values), in the order given."""


def parse(
    *dataclass_types: type, argv: Sequence[str] | None = None, prog: str | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Build one instance of each dataclass from ``--config file.yaml`` and flags; later ones override earlier ones.

    Fields of every dataclass are flat keys at the root, nested dataclasses are dotted (``--budget.steps 3``), lists of
    dataclasses come from YAML. Paths stay relative to the current folder.

    Args:
        dataclass_types: dataclasses whose field names do not collide; a string under a field is its help text.
        argv: the arguments; None takes those of the process.
        prog: name shown in the usage line.
        description: first lines of the help.

    Returns:
        One instance a dataclass, in the order given.

    Raises:
        ConfigError: a missing file, an unknown key or flag, a wrong type or a refused value; the message names the
            file or flag, the key, the value seen and what is valid.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    hints = {key: hint for cls in dataclass_types for key, hint in field_hints(cls).items()}
    argv, sources = _read_recipes(complete_flags(sys.argv[1:] if argv is None else argv, hints), hints)
    parser = _parser(dataclass_types, prog, description)
    try:
        values = parser.parse_args(argv).as_dict()
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), argv, sources, hints)) from error
    return tuple(_build(cls, values, "", argv, sources) for cls in dataclass_types)


def dump(*instances: Any) -> dict[str, Any]:
    """Return the resolved configuration as one flat level of keys, ready to be written as JSON or YAML.

    Args:
        instances: what ``parse`` returned.

    Returns:
        A dictionary that ``parse`` reads back as the same instances.
    """
    merged: dict[str, Any] = {}
    for instance in instances:
        merged.update(dataclasses.asdict(instance))
    return {key: _plain(value) for key, value in merged.items()}


def _plain(value: Any) -> Any:
    """Tuples become lists and paths strings, as JSON and YAML have them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read_recipes(argv: Sequence[str], hints: Mapping[str, Any]) -> tuple[list[str], Sources]:
    """Replace the path after every --config by the checked content of the file."""
    tokens, replaced, sources = list(argv), [], []
    while tokens:
        token = tokens.pop(0)
        if token != "--config" and not token.startswith("--config="):
            replaced.append(token)
            continue
        if token == "--config" and not tokens:
            raise ConfigError("--config needs a path: --config recipes/<task>/<stage>.yaml")
        path = token.partition("=")[2] if "=" in token else tokens.pop(0)
        sources.append((path, load_recipe(path, hints)))
        replaced.append(f"--config={inline_yaml(sources[-1][1])}")
    return replaced, sources


def _parser(dataclass_types: Sequence[type], prog: str | None, description: str | None) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Recipe: a YAML file of the keys below; may be repeated.")
    for cls in dataclass_types:
        parser.add_class_arguments(cls)
    return parser


def _explain(message: str, argv: Sequence[str], sources: Sources, hints: Mapping[str, Any]) -> str:
    """Turn a message of jsonargparse into one that names the file or flag, the value and the type."""
    message = " ".join(message.split())
    if message.startswith("unrecognized arguments:"):
        return f"{message}; every value follows its --key; {listed(hints)}"
    if message.startswith("the following arguments are required:"):
        return f"{message}; set each in the recipe or with its --key"
    keys = re.findall(r'Parser key "([^"]+)"', message)
    seen = re.search(r"(?:Got|Given) value: (.*)$", message)
    if not keys or seen is None:
        return message
    where, hint = _origin(keys[0], argv, sources), flag_hint(keys[0], hints)
    for inner in keys[1:]:  # the value is inside an item of a list
        nested = dataclass_in(item_hint(hint)) or dataclass_in(hint)
        if nested is None or inner not in field_hints(nested):
            return message
        where, hint = f"{where}, '{inner}' of an item", field_hints(nested)[inner]
    value = seen.group(1)
    quote = " (YAML reads no, off, yes and on as booleans: quote the word)" if value in ("True", "False") else ""
    return f"{where}: expected {expected(keys[0], value, type_name(hint))}, got {value!r}{quote}"


def _origin(key: str, argv: Sequence[str], sources: Sources) -> str:
    """Say where the value of a key came from, as the start of a message."""
    parts = re.findall(r"[^.\[\]]+", key)
    for end in range(len(parts), 0, -1):
        flag = "--" + ".".join(parts[:end])
        if any(token.partition("=")[0].removesuffix("+") == flag for token in argv):
            return flag if end == len(parts) else f"{flag}: key '{key}'"
    for path, content in reversed(sources):
        if _holds(content, parts):
            return f"{path}: key '{key}'"
    return f"key '{key}'"


def _holds(node: Any, parts: Sequence[str]) -> bool:
    for part in parts:
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return False
    return True


def _build(hint: Any, value: Any, key: str, argv: Sequence[str], sources: Sources) -> Any:
    """Make dataclasses out of parsed dictionaries, the innermost first, so that an error knows its key."""
    nested, items = dataclass_in(hint), item_hint(hint)
    if nested is not None and isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        arguments = {
            name: _build(inner, value[name], f"{prefix}{name}", argv, sources)
            for name, inner in field_hints(nested).items()
        }
        try:
            return nested(**arguments)
        except SettingError as error:
            raise ConfigError(f"{_origin(f'{prefix}{error.key}', argv, sources)}: {error}") from error
        except (ValueError, TypeError) as error:  # of a class that does not say which key
            where = f"key '{key}'" if key else "config"
            raise ConfigError(f"{where}: {error}") from error
    if items is not None and isinstance(value, list | tuple):
        return type(value)(_build(items, item, f"{key}[{index}]", argv, sources) for index, item in enumerate(value))
    return value

"""Recipes and flags to dataclasses: one call, strict about keys, types and ranges.

A thin layer over jsonargparse. It reads ``1e-5`` as a number, checks every type, and takes the help texts from the
strings under the dataclass fields. What this file adds: several dataclasses share one flat level of keys, an unknown
key or flag is an error that names the file and the nearest valid key at any depth, and a ``__post_init__`` that
refuses a value is reported with its key. ``--resume`` alone means ``--resume true``, and a list can be given item by
item (``--prompt "a" --prompt "b"``).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vgf_llm.errors import ConfigError

_OWN_FLAGS = ("config", "help", "print_config")


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
    argv = list(sys.argv[1:] if argv is None else argv)
    valid = {field.name: hint for cls in dataclass_types for field, hint in _fields(cls)}
    argv = _complete_flags(argv, valid)
    sources = [(path, _load_yaml(path)) for path in _config_paths(argv)]
    for path, content in sources:
        _check_keys(content, valid, source=path, prefix="")
        if not content:  # a recipe of comments only changes nothing; jsonargparse would refuse it
            argv = _drop_config(argv, path)
    parser = _parser(dataclass_types, prog, description)
    try:
        values = parser.parse_args(argv).as_dict()
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), argv, sources, valid)) from error
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


def _parser(dataclass_types: Sequence[type], prog: str | None, description: str | None) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Recipe: a YAML file of the keys below; may be repeated.")
    for cls in dataclass_types:
        parser.add_class_arguments(cls)
    return parser


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field, hints[field.name]


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union without None; the hint itself where it is no union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for member in typing.get_args(hint) if member is not type(None))
    return (hint,)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass a value of this type is built from, if there is one."""
    return next((member for member in _members(hint) if dataclasses.is_dataclass(member)), None)


def _item_hint(hint: Any) -> Any:
    """The item type of a list or tuple type, else None."""
    for member in _members(hint):
        if typing.get_origin(member) in (list, tuple, Sequence):
            return typing.get_args(member)[0]
    return None


def _is_mapping(hint: Any) -> bool:
    return any(member is dict or typing.get_origin(member) in (dict, Mapping) for member in _members(hint))


# Files and keys ----------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _config_paths(argv: Sequence[str]) -> list[str]:
    paths = []
    for index, token in enumerate(argv):
        if token.startswith("--config="):
            paths.append(token.removeprefix("--config="))
        elif token == "--config":
            if index + 1 == len(argv):
                raise ConfigError("--config needs a path: --config recipes/<task>/<stage>.yaml")
            paths.append(argv[index + 1])
    return paths


def _drop_config(argv: Sequence[str], path: str) -> list[str]:
    kept: list[str] = []
    for token in argv:
        if token == f"--config={path}":
            continue
        if token == path and kept and kept[-1] == "--config":
            kept.pop()
            continue
        kept.append(token)
    return kept


def _load_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"config file '{path}' does not exist (current folder: {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}' cannot be read ({error})") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got {type(content).__name__}")
    return content


def _check_keys(content: Mapping[Any, Any], valid: Mapping[str, Any], source: str, prefix: str) -> None:
    """Refuse the first key of a mapping, or of any block or list inside it, that no field has."""
    for key, value in content.items():
        name, _, rest = str(key).partition(".")
        if name not in valid:
            raise ConfigError(_unknown(f"{source}: unknown key", f"{prefix}{name}", prefix, valid))
        _check_value({rest: value} if rest else value, valid[name], source, f"{prefix}{name}")


def _check_value(value: Any, hint: Any, source: str, key: str) -> None:
    nested = _dataclass_in(hint)
    if nested is not None and isinstance(value, Mapping):
        _check_keys(value, {field.name: inner for field, inner in _fields(nested)}, source, f"{key}.")
    elif isinstance(value, list) and _item_hint(hint) is not None:
        for index, item in enumerate(value):
            _check_value(item, _item_hint(hint), source, f"{key}[{index}]")


def _unknown(what: str, key: str, prefix: str, valid: Mapping[str, Any], dashes: str = "") -> str:
    last = key.removeprefix(prefix)
    near = difflib.get_close_matches(last, valid, n=1, cutoff=0.5)
    nearest = f" (nearest: '{dashes}{prefix}{near[0]}')" if near else ""
    return f"{what} '{dashes}{key}'{nearest}; valid keys{f' of {prefix[:-1]}' if prefix else ''}: {', '.join(valid)}"


# Flags -------------------------------------------------------------------------------------------------------------


def _complete_flags(argv: Sequence[str], valid: Mapping[str, Any]) -> list[str]:
    """Refuse unknown flags; a bare boolean flag means true, a plain value of a list flag is one item of the list."""
    completed: list[str] = []
    seen: set[str] = set()
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        if not _is_flag(name) or name == "--help":
            completed.append(token)
            continue
        key = name[2:].removesuffix("+")
        hint = _flag_hint(key, valid)
        follows = bool(tokens) and not _is_flag(tokens[0].partition("=")[0])
        if bool in _members(hint) and not equals and not follows:
            completed += [token, "true"]
        elif _item_hint(hint) in (str, int, float) and (equals or follows):
            value = value if equals else tokens.pop(0)
            again = "+" if name.endswith("+") or key in seen else ""
            completed.append(f"--{key}{again}={_as_list(value, hint)}")
            seen.add(key)
        else:
            completed.append(token)
    return completed


def _is_flag(token: str) -> bool:
    return len(token) > 2 and token.startswith("--") and not any(character.isspace() for character in token)


def _as_list(value: str, hint: Any) -> str:
    """A list flag's value as YAML: a list as it is, anything else as the one item that it holds."""
    if value == "null" and type(None) in typing.get_args(hint):
        return value
    if _item_hint(hint) is not str:
        return value if value.startswith("[") else f"[{value}]"
    if value.startswith("[") and value.endswith("]"):
        try:
            yaml.safe_load(value)
        except yaml.YAMLError:
            pass  # a text that happens to stand in brackets
        else:
            return value
    return json.dumps([value], ensure_ascii=False)


def _flag_hint(name: str, valid: Mapping[str, Any]) -> Any:
    """The type of a dotted flag; ConfigError where no field answers to it."""
    if name in _OWN_FLAGS:
        return None
    prefix, hint = "", None
    for part in name.split("."):
        if part not in valid:
            raise ConfigError(_unknown("unknown flag", name, prefix, valid, dashes="--"))
        prefix, hint = f"{prefix}{part}.", valid[part]
        if _is_mapping(hint):
            return None
        nested = _dataclass_in(hint)
        valid = {field.name: inner for field, inner in _fields(nested)} if nested else {}
    return hint


# Values ------------------------------------------------------------------------------------------------------------


def _origin(key: str, argv: Sequence[str], sources: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Where the value of a key came from, as the start of a message."""
    if any(token.partition("=")[0].removesuffix("+") == f"--{key}" for token in argv):
        return f"--{key}"
    for path, content in reversed(sources):
        if key in content or _holds(content, re.findall(r"[^.\[\]]+", key)):
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


def _explain(message: str, argv: Sequence[str], sources: Sequence[tuple[str, Any]], valid: Mapping[str, Any]) -> str:
    """Turn a message of jsonargparse into one that names the file or flag, the value and the type."""
    message = " ".join(message.split())
    if message.startswith("unrecognized arguments:"):
        return f"{message}; every value follows its --key; valid keys: {', '.join(valid)}"
    if message.startswith("the following arguments are required:"):
        return f"{message}; set each in the recipe or with its --key"
    located = re.match(r'Parser key "([^"]+)":? (.*)', message)
    if located is None:
        return message
    key, detail = located.groups()
    seen = re.search(r"(?:Got|Given) value: (.*)$", detail)
    if seen is None or "class_path" in detail:
        return f"{_origin(key, argv, sources)}: {detail}"
    value = seen.group(1)
    hint = " (YAML reads no, off, yes and on as booleans: quote the word)" if value in ("True", "False") else ""
    return f"{_origin(key, argv, sources)}: expected {_type_name(_flag_hint(key, valid))}, got {value!r}{hint}"


def _type_name(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(repr(choice) for choice in typing.get_args(hint))}"
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return f"a block with the keys {', '.join(field.name for field, _ in _fields(hint))}"
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def _build(hint: Any, value: Any, key: str, argv: Sequence[str], sources: Sequence[tuple[str, Any]]) -> Any:
    """Make dataclasses out of parsed dictionaries, the innermost first, so that an error knows its key."""
    nested = _dataclass_in(hint)
    if nested is not None and isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        arguments = {
            field.name: _build(inner, value[field.name], f"{prefix}{field.name}", argv, sources)
            for field, inner in _fields(nested)
        }
        try:
            return nested(**arguments)
        except (ValueError, TypeError) as error:
            named = next((name for name in arguments if name in str(error).split("'")[0].split()), None)
            named = named or next((name for name in arguments if name in str(error)), None)
            where = _origin(f"{prefix}{named}" if named else key or "config", argv, sources)
            raise ConfigError(f"{where}: {error}") from error
    item = _item_hint(hint)
    if item is not None and isinstance(value, list | tuple):
        return type(value)(_build(item, entry, f"{key}[{index}]", argv, sources) for index, entry in enumerate(value))
    return value

"""Keys of recipes and flags, checked against dataclasses before any value is parsed.

Dataclasses and the type hints of their fields are the only schema: a key leads to a hint, a hint to the keys below it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vgf_llm.errors import ConfigError
from vgf_llm.settings.renamed import expected, now_called

_LISTED = 20  # valid keys that a message still names

Hints = Mapping[str, Any]
OWN_FLAGS = ("config", "help", "print_config")


# Types -------------------------------------------------------------------------------------------------------------


def field_hints(cls: type) -> dict[str, Any]:
    """Map the names of a dataclass's fields to their resolved type hints."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def members(hint: Any) -> tuple[Any, ...]:
    """List the alternatives of a union without None, or the hint itself if it is not a union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for member in typing.get_args(hint) if member is not type(None))
    return (hint,)


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a value of this type is built from, or None."""
    return next((typing.cast(type, member) for member in members(hint) if dataclasses.is_dataclass(member)), None)


def item_hint(hint: Any) -> Any:
    """Return the item type of a list or tuple type, or None."""
    for member in members(hint):
        if typing.get_origin(member) in (list, tuple, Sequence):
            return typing.get_args(member)[0]
    return None


def type_name(hint: Any) -> str:
    """Name a type as a reader of YAML would."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(repr(choice) for choice in typing.get_args(hint))}"
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return f"a block of {', '.join(field_hints(typing.cast(type, hint)))}"
    if item_hint(hint) is not None:
        return f"a list, each item {type_name(item_hint(hint))}"
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def _optional(hint: Any) -> bool:
    return hint in (None, Any) or type(None) in typing.get_args(hint)


def _is_mapping(hint: Any) -> bool:
    return any(member is dict or typing.get_origin(member) in (dict, Mapping) for member in members(hint))


# Files -------------------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-5 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(path: str, hints: Hints) -> dict[str, Any]:
    """Read a recipe as nested dictionaries whose keys are all known.

    Args:
        path: YAML file; dotted keys (``budget.steps: 3``) and blocks may be mixed.
        hints: valid keys at the root with their types.

    Returns:
        The values, dotted keys folded into blocks; empty for a file of comments.

    Raises:
        ConfigError: the file is missing or no YAML, or a key at any depth is unknown or given twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"config file '{path}' does not exist (current folder: {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}' cannot be read ({error})") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got {type(content).__name__}")
    content = _fold(content, hints)
    check_keys(content, hints, path)
    return content


def inline_yaml(content: Mapping[str, Any]) -> str:
    """Write a recipe on one line that every YAML reader takes for the same values."""
    text = json.dumps(content, ensure_ascii=False, default=str)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _fold(content: Mapping[Any, Any], hints: Hints) -> dict[str, Any]:
    """Fold dotted keys into blocks; the keys inside a free mapping are names, whose points stay."""
    folded: dict[str, Any] = {}
    for key, value in content.items():
        name, _, rest = str(key).partition(".")
        value = {rest: value} if rest else value
        hint = hints.get(name)
        if isinstance(value, Mapping):
            nested, is_free = dataclass_in(hint), _is_mapping(hint)
            inside = field_hints(nested) if nested else {}
            value = {str(one): held for one, held in value.items()} if is_free else _fold(value, inside)
        if isinstance(value, Mapping) and isinstance(folded.get(name), Mapping):
            value = {**folded[name], **value}
        folded[name] = value
    return folded


def check_keys(content: Mapping[Any, Any], hints: Hints, source: str, prefix: str = "") -> None:
    """Refuse the first key of a mapping, or of any block or list inside it, that no field has.

    Args:
        content: keys and values.
        hints: valid keys with their types.
        source: file or flag, the start of the message.
        prefix: where the mapping is, ending in a dot.

    Raises:
        ConfigError: an unknown key, or a value where a block or list belongs.
    """
    for key, value in content.items():
        if key not in hints:
            if line := now_called(str(key), value, hints):
                raise ConfigError(f"{source}: key '{prefix}{key}' has another name now; write '{prefix}{line}'")
            raise ConfigError(_unknown(f"{source}: unknown key", f"{prefix}{key}", prefix, hints))
        check_blocks(value, hints[key], source, f"{prefix}{key}")


def check_blocks(value: Any, hint: Any, source: str, key: str) -> None:
    """Descend into blocks and lists of a value; what is left to check are scalars.

    Raises:
        ConfigError: as for ``check_keys``.
    """
    if value is None and _optional(hint):
        return
    nested, items = dataclass_in(hint), item_hint(hint)
    shape: Any = Mapping if nested is not None else list if items is not None else object
    if value is None or not isinstance(value, shape):
        seen = "nothing (null)" if value is None else repr(value)
        raise ConfigError(f"{source}: key '{key}': expected {expected(key, value, type_name(hint))}, got {seen}")
    if nested is not None:
        check_keys(value, field_hints(nested), source, f"{key}.")
    elif items is not None:
        for index, item in enumerate(value):
            check_blocks(item, items, source, f"{key}[{index}]")


def _unknown(what: str, key: str, prefix: str, hints: Hints, dashes: str = "") -> str:
    near = difflib.get_close_matches(key.removeprefix(prefix), hints, n=1, cutoff=0.5)
    nearest = f" (nearest: '{dashes}{prefix}{near[0]}')" if near else ""
    of = f" of {prefix[:-1]}" if prefix else ""
    return f"{what} '{dashes}{key}'{nearest}; {listed(hints, of)}"


def listed(keys: Collection[str], of: str = "") -> str:
    """List valid keys for a message; of a whole command say where they stand, so that the message stays readable."""
    if len(keys) > _LISTED:
        return f"--help lists the {len(keys)} valid keys{of}"
    return f"valid keys{of}: {', '.join(keys)}"


# Flags -------------------------------------------------------------------------------------------------------------


def complete_flags(argv: Sequence[str], hints: Hints) -> list[str]:
    """Refuse unknown flags; a bare boolean flag means true, a plain value of a list flag is one item of the list.

    Args:
        argv: the command line.
        hints: valid keys at the root with their types.

    Returns:
        The command line with every value spelt out.

    Raises:
        ConfigError: an unknown flag, or an unknown key inside the value of one.
    """
    completed: list[str] = []
    seen: set[str] = set()
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        if not is_flag(name):
            completed.append(token)
            continue
        key = name[2:].removesuffix("+")
        follows = bool(tokens) and not is_flag(tokens[0].partition("=")[0])
        if key not in hints and (line := now_called(key, value or (tokens[0] if follows else "true"), hints)):
            raise ConfigError(f"flag '{name}' has another name now; write '--{line.replace(': ', ' ')}'")
        hint = flag_hint(key, hints)
        if bool in members(hint) and not equals and not follows:
            completed.append(f"{name}=true")
        elif hint is None or not (equals or follows):
            completed.append(token)
        else:
            value = value if equals else tokens.pop(0)
            again = "+" if name.endswith("+") or (key in seen and item_hint(hint) is not None) else ""
            completed.append(f"--{key}{again}={_flag_value(value, hint, key)}")
            seen.add(key)
    return completed


def is_flag(token: str) -> bool:
    """Tell a flag from a text that starts with dashes."""
    return len(token) > 2 and token.startswith("--") and not any(character.isspace() for character in token)


def flag_hint(key: str, hints: Hints) -> Any:
    """Return the type of a dotted key, None for the parser's own flags and for keys inside a free mapping.

    Raises:
        ConfigError: no field answers to it.
    """
    if key in OWN_FLAGS or (key.endswith(".help") and key.removesuffix(".help") in hints):
        return None
    prefix, hint = "", None
    for part in key.split("."):
        if part not in hints:
            raise ConfigError(_unknown("unknown flag", key, prefix, hints, dashes="--"))
        prefix, hint = f"{prefix}{part}.", hints[part]
        if _is_mapping(hint) and part != key.rpartition(".")[2]:
            return None
        nested = dataclass_in(hint)
        hints = field_hints(nested) if nested else {}
    return hint


def _flag_value(value: str, hint: Any, key: str) -> str:
    """Spell out the value of a flag whose type is a list or a block; leave a scalar alone."""
    items, nested = item_hint(hint), dataclass_in(hint)
    if (items is None and nested is None) or (value == "null" and _optional(hint)):
        return value
    if nested is not None or dataclass_in(items) is not None:
        try:
            content = yaml.load(value, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: not valid YAML: {error}") from error
        content = [content] if nested is None and isinstance(content, Mapping) else content
        check_blocks(content, hint, f"--{key}", key)
        return json.dumps(content)
    if items is not str:
        return value if value.startswith("[") else f"[{value}]"
    if value.startswith("[") and value.endswith("]"):
        try:
            yaml.safe_load(value)
        except yaml.YAMLError:
            pass  # a text that happens to stand in brackets
        else:
            return value
    return json.dumps([value], ensure_ascii=False)

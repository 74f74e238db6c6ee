"""The grammar of composed rewards: a YAML file of parts, each a reward, a server, a sum or a product.

    sum:
      - {reward: my_rewards:correct, weight: 2.0}
      - {reward: brevity, clip: [-40, 0], weight: 0.02}
    require:
      - {reward: words_within, arguments: {at_least: 3, at_most: 40}}
    otherwise: -1.0

A part's value is computed in this order: the reward, ``standardise``, ``clip``, ``require`` with ``otherwise``,
``weight``. docs/reward_models.md describes every key. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from reward_models.endpoint import READ_BY_KIND, EndpointKind, EndpointSettings
from vgf_llm.data.contents import scorer_contents
from vgf_llm.errors import ConfigError
from vgf_llm.settings.keys import field_hints, load_recipe

_KINDS = ("reward", "endpoint", "sum", "product")
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Part:
    """A reward, or several that are added or multiplied."""

    reward: str | None = None
    """A function ("module:function", or a name of ours), or the folder of a reward model."""
    endpoint: EndpointSettings | None = None
    """A server that scores or judges."""
    sum: list[Part] | None = None
    """Parts whose weighted values are added."""
    product: list[Part] | None = None
    """Parts whose weighted values are multiplied."""
    name: str | None = None
    """What it is logged as; by default the reward's own name."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the function that are the same for every response; others are columns."""
    standardise: bool | dict[str, Any] = False
    """true: minus the mean, over the deviation, of all values of the training run so far. {mean, deviation}: fixed."""
    clip: list[float | None] | None = None
    """Least and greatest value; either may be null."""
    require: list[Part] = field(default_factory=list)
    """Constraints; a response keeps one where its value is above 0."""
    otherwise: float = 0.0
    """Value of a response that breaks a constraint. It is then not scored."""
    weight: float = 1.0
    """What the value is multiplied by at the end."""

    @property
    def parts(self) -> list[Part]:
        """Parts that are added or multiplied."""
        return self.sum or self.product or []

    @property
    def label(self) -> str | None:
        """What the part is logged as; None for a sum or product without a name."""
        if self.name is not None or (self.reward is None and self.endpoint is None):
            return self.name
        if self.endpoint is not None:
            return self.endpoint.kind
        assert self.reward is not None
        return Path(self.reward).name if Path(self.reward).is_dir() else self.reward.rpartition(":")[2]

    def walk(self) -> Iterator[Part]:
        """Yield the part and all parts within, constraints before what they guard."""
        for part in (*self.require, *self.parts):
            yield from part.walk()
        yield self


def is_composed(name: str | None) -> bool:
    """Return whether a reward's name is that of a YAML file."""
    return name is not None and name.endswith(_ENDINGS)


def holds_part(content: Mapping[str, Any]) -> bool:
    """Return whether a YAML file holds a composed reward, and not a recipe, which may have a key `reward` too."""
    keys = {str(key).partition(".")[0] for key in content}
    return bool(keys & set(_KINDS[1:])) or ("reward" in keys and keys <= set(field_hints(Part)))


def read_composed(path: str) -> Part:
    """Read a composed reward.

    Raises:
        ConfigError: The file does not exist, or a key, type or value in it is wrong; the message names file and key.
    """
    part = _part(load_recipe(path, field_hints(Part)), f"{path}:", "")
    labels = [one.label for one in part.walk() if one.label is not None]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{path}: two parts are called {twice[0]!r}; give each a name, as in `name: other`")
    unnamed = [one for one in part.walk() if one.standardise is True and one.label is None]
    if unnamed:
        raise ConfigError(f"{path}: a sum or product with standardise: true needs a name, as in `name: total`")
    return part


def reward_contents(name: str) -> str:
    """Return what a reward is, for the identity of a run: a function's name, or a digest of a folder or a file's parts.

    Comments and the order of keys in a file do not count; models and templates that it names do.

    Raises:
        ConfigError: The file is wrong.
    """
    if not is_composed(name):
        return scorer_contents(name)
    part = read_composed(name)
    files = [one.endpoint.template for one in part.walk() if one.endpoint is not None and one.endpoint.template]
    inside = [Path(file).read_text(encoding="utf-8") for file in files]
    inside += [scorer_contents(one.reward) for one in part.walk() if one.reward is not None]
    return hashlib.sha256(json.dumps([dataclasses.asdict(part), inside], sort_keys=True).encode()).hexdigest()


class _Block:
    """A block of a file: its keys and values, and the error of one that is wrong.

    Args:
        content: Keys and values; the keys are known.
        source: The file, for messages.
        key: Of the block, ending in a dot where it is not the root.
    """

    def __init__(self, content: Mapping[str, Any], source: str, key: str) -> None:
        self.content, self.source, self.key = content, source, key

    def require(self, holds: bool, name: str, valid: str) -> None:
        """Refuse the value of a key unless a condition holds.

        Raises:
            ConfigError: Naming file and key, what is valid, and the value.
        """
        if not holds:
            seen = repr(self.content.get(name))
            raise ConfigError(f"{self.source} key '{self.key}{name}': expected {valid}, got {seen}")

    def require_texts(self, *names: str) -> None:
        """Refuse values that are neither texts nor null."""
        for name in names:
            value = self.content.get(name)
            self.require(value is None or (isinstance(value, str) and bool(value)), name, "a text")

    def require_numbers(self, *names: str) -> None:
        """Refuse values that are not finite numbers, where there are some."""
        for name in names:
            self.require(name not in self.content or _is_number(self.content[name]), name, "a finite number")


def _part(content: Mapping[str, Any], source: str, key: str) -> Part:
    """Build a part from checked keys."""
    block = _Block(content, source, key)
    kinds = [kind for kind in _KINDS if content.get(kind) is not None]
    if len(kinds) != 1:
        where = f"key '{key.removesuffix('.')}'" if key else "the root"
        seen = ", ".join(kinds) or "none"
        raise ConfigError(f"{source} {where}: a part needs one of {', '.join(_KINDS)}, got {seen}")
    block.require_numbers("weight", "otherwise")
    block.require_texts("reward", "name")
    block.require("/" not in str(content.get("name") or ""), "name", "a name without a slash")
    composed = is_composed(content.get("reward"))
    block.require(not composed, "reward", "a function or a folder: a file cannot name another file")
    arguments = content.get("arguments") or {}
    block.require(isinstance(arguments, Mapping), "arguments", "a block of names and values")
    block.require(not arguments or kinds == ["reward"], "arguments", "none: only a function takes some")
    _check_standardise(block)
    made = {name: value for name, value in content.items() if value is not None}
    for name in ("sum", "product", "require"):
        if name in made:
            made[name] = [_part(one, source, f"{key}{name}[{i}].") for i, one in enumerate(made[name])]
            block.require(bool(made[name]), name, "at least one part")
    if "clip" in made:
        made["clip"] = _clip(block)
    if "endpoint" in made:
        made["endpoint"] = _endpoint(_Block(made["endpoint"], source, f"{key}endpoint."))
    return Part(**made)


def _clip(block: _Block) -> list[float | None]:
    bounds = block.content["clip"]
    good = len(bounds) == 2 and all(bound is None or _is_number(bound) for bound in bounds)
    block.require(good, "clip", "two numbers, the least and the greatest, or null for one of them")
    block.require(None in bounds or bounds[0] <= bounds[1], "clip", "the least number first")
    return [None if bound is None else float(bound) for bound in bounds]


def _check_standardise(block: _Block) -> None:
    given = block.content.get("standardise", False)
    fixed = isinstance(given, Mapping) and set(given) == {"mean", "deviation"} and all(map(_is_number, given.values()))
    good = isinstance(given, bool) or (fixed and given["deviation"] > 0)
    block.require(good, "standardise", "true, false, or {mean: 0.0, deviation: 1.0} with a deviation above 0")


def _endpoint(block: _Block) -> EndpointSettings:
    content = block.content
    block.require(content.get("kind") in get_args(EndpointKind), "kind", f"one of {', '.join(get_args(EndpointKind))}")
    block.require(content.get("model") is not None, "model", "the model's name at the server")
    block.require_texts("model", "url_variable", "key_variable", "template", "pattern", "version")
    kind, some = content["kind"], dict.fromkeys(name for names in READ_BY_KIND.values() for name in names)
    for name in some:
        allowed = content.get(name) is None or name in READ_BY_KIND[kind]
        block.require(allowed, name, f"none: an endpoint of kind {kind} does not read it")
    block.require_numbers("temperature")
    block.require(content.get("temperature", 0.0) >= 0, "temperature", "at least 0")
    tokens = content.get("max_tokens", 1)
    whole = isinstance(tokens, int) and not isinstance(tokens, bool)
    block.require(whole and tokens >= 1, "max_tokens", "an integer >= 1")
    outputs, variables = content.get("outputs") or {}, content.get("chat_template_kwargs") or {}
    weights = isinstance(outputs, Mapping) and all(str(k).isdecimal() and _is_number(v) for k, v in outputs.items())
    block.require(weights, "outputs", "weights by the number of an output")
    block.require(isinstance(variables, Mapping), "chat_template_kwargs", "a block of names and values")
    made = {name: value for name, value in content.items() if value is not None}
    return EndpointSettings(**made | {"outputs": {str(key): float(weight) for key, weight in outputs.items()}})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

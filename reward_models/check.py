"""Check a reward model of this package or of others: its reading of conversations, its scores, its gradient.

    vgf-llm reward-check path/to/model
    vgf-llm reward-check recipes/<task>/generate.yaml
    vgf-llm reward-check reward.yaml
    vgf-llm reward-check --reward_model mypackage.rewards:politeness --dataset pairs.jsonl --json

Prints a line per check with the value seen, the limit, a verdict and what to do. Ends with exit code 1 where a check
failed, 0 otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.checking.line import Line
from reward_models.checking.settings import CheckSettings, PairSettings
from reward_models.grammar import holds_part, is_composed
from reward_models.inputs import check_rewards
from reward_models.sources import is_hub_name
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, working
from vgf_llm.console.screen import emit, say, show
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ConfigError
from vgf_llm.machine.device import resolve_device
from vgf_llm.models.inputs import check_base_model
from vgf_llm.settings.parse import parse

if TYPE_CHECKING:
    from reward_models.checking.pairs import Pairs

_NAMING = ("reward_model", "rewards", "reward", "output_dir", "reward_function", "gold")
"""Keys of recipes that name a reward: the first that is set counts, a missing output_dir last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 where a check failed, else 0."""
    (settings,) = parse(
        CheckSettings,
        argv=_with_names(sys.argv[1:] if argv is None else argv),
        prog="vgf-llm reward-check",
        description="Check any reward model: reading, scores, gradient.",
    )
    with library_output(None):
        lines = run(settings)
    failed = [line.check for line in lines if line.verdict == "fail"]
    if settings.json:
        emit(json.dumps({"reward_model": settings.reward_model, "lines": [line.to_dict() for line in lines]}))
    else:
        _print_table(settings.reward_model, lines)
    return 1 if failed else 0


def _with_names(argv: Sequence[str]) -> list[str]:
    """Spell out a first argument without a key: a reward, a file that composes one, or a recipe that names one.

    Raises:
        ConfigError: The file cannot be read, or is a recipe that names no reward, or several.
    """
    if not argv or argv[0].startswith("-"):
        return list(argv)
    first, rest = argv[0], list(argv[1:])
    if not first.endswith((".yaml", ".yml")):
        return ["--reward_model", first, *rest]
    import yaml

    try:
        recipe = yaml.safe_load(Path(first).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe '{first}' cannot be read: {error}") from error
    recipe = recipe if isinstance(recipe, dict) else {}
    if holds_part(recipe):
        return ["--reward_model", first, *rest]
    outputs = recipe.get("reward_outputs")
    given = ["--reward_model", _named(recipe, first), *(["--reward_outputs", json.dumps(outputs)] if outputs else [])]
    return [*given, *rest]


def _named(recipe: dict[str, Any], path: str) -> str:
    """Return the reward that a recipe names."""
    named = {key: recipe[key] for key in _NAMING if recipe.get(key)}
    if len(named) > 1 and not Path(str(named.get("output_dir"))).is_dir():
        named.pop("output_dir", None)
    if not named:
        raise ConfigError(
            f"recipe '{path}' has neither reward_model nor output_dir, nor another key that names a reward "
            "(rewards, reward, reward_function, gold); name the reward itself"
        )
    found = next(iter(named.values()))
    names = found if isinstance(found, list) else [found]
    if len(names) > 1:
        raise ConfigError(
            f"recipe '{path}' names {len(names)} rewards ({', '.join(map(str, names))}); name one of them"
        )
    return str(names[0])


def run(settings: CheckSettings) -> list[Line]:
    """Run all checks.

    Raises:
        VGFError: There is no such model, function or file, or the pairs cannot be read.
    """
    name = settings.reward_model
    composed = name if is_composed(name) else None  # looked at as gold is: there are no running statistics here
    names = [name] if composed is None else []
    check_rewards(names, composed)
    if settings.model_name_or_path is not None:
        check_base_model(settings.model_name_or_path)
    pairs = read_pairs(settings)
    check_rewards(names, composed, [PromptText(pair.prompt) for pair in pairs.kept])
    load_libraries("reward_models.checking.report")
    from reward_models.checking.report import check_reward
    from vgf_llm.models.loading import load_tokenizer

    base = None if settings.model_name_or_path is None else load_tokenizer(settings.model_name_or_path)
    found = []
    with working(f"checking {name} on {len(pairs.kept)} pairs"):
        device = resolve_device(settings.device)
        for line in check_reward(name, settings.reward_outputs, pairs, device, base):
            say(f"  {line.check}: {line.verdict}")
            found.append(line)
    return found


def read_pairs(settings: PairSettings) -> Pairs:
    """Return the pairs of the settings' file, or the built-in ones.

    Raises:
        DataError: The file cannot be read, or holds no usable pair.
    """
    from reward_models.checking.pairs import Pairs

    if settings.dataset is None:
        from reward_models.checking.examples import built_in_pairs

        return Pairs(built_in_pairs()[: settings.limit], {}, False)
    from vgf_llm.data.prompts import load_preferences

    found = load_preferences(
        settings.dataset,
        split=settings.split,
        limit=settings.limit,
        prompt_column=settings.prompt_column,
        chosen_column=settings.chosen_column,
        rejected_column=settings.rejected_column,
        max_dropped_share=1.0,
    )
    return Pairs(found.pairs, found.dropped, True)


def _print_table(name: str, lines: Sequence[Line]) -> None:
    from rich.table import Table

    table: Any = Table(title=f"Check of {name if is_hub_name(name) else Path(name).name}")
    for column in ("check", "verdict", "seen", "limit", "what to do"):
        table.add_column(column)
    for line in lines:
        table.add_row(line.check, line.verdict, line.value, line.threshold, line.advice)
    show(table)
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in ("fail", "warn", "pass", "skip")}
    say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


if __name__ == "__main__":
    sys.exit(run_main(main))

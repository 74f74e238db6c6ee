"""Joins the seeds of a task: a table with intervals, the best budget chosen on other seeds, and a figure.

    python -m vgf_llm.control.report --runs '[outputs/control/cube_single/0, outputs/control/cube_single/1]'

An interval is a bootstrap over episodes, resampled within every seed (the agents are taken as given); differences to
the clone and to best-of-N are taken episode by episode, since all arms of a seed meet the same episodes. The budget
that scores best on some seeds is also the one that luck has favoured there, so "best budget" takes for each seed the
budget that scores best on the others.

Of n episodes that all fail (or all succeed) every resample is the same, so that the bootstrap's interval has no width
however small n is. The exact 95% bound on the rate of what was not seen is 1 - 0.025^(1/n), about 3.7 / n, which the
table then names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from vgf_llm.cli import run_main
from vgf_llm.console.screen import emit, say
from vgf_llm.control.settings import EVALUATIONS_NAME, DataSettings
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.runs.files import check_writable, read_jsonl, write_json_atomic
from vgf_llm.settings.parse import parse
from vgf_llm.statistics.intervals import bootstrap_within_seeds

_CONFIG_NAME = "config.json"  # written by the training command
CLONE = "clone"


@dataclass(frozen=True)
class ReportSettings:
    """Which runs are joined."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs of one task that differ in their seed."""
    output: str | None = None
    """JSON file for the figures; null writes none."""
    figure: str | None = None
    """Image file of score against budget; null writes none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the last line of standard output is JSON."""
    (settings,) = parse(
        ReportSettings, argv=argv, prog="vgf-llm control-report", description="Join the seeds of a task."
    )
    if not settings.runs:
        raise ConfigError("runs: give at least one folder")
    result = summarise([Path(run) for run in settings.runs])
    say(table(result))
    if settings.output is not None:
        check_writable(Path(settings.output).parent)
        write_json_atomic(settings.output, result)
    if settings.figure is not None:
        check_writable(Path(settings.figure).parent)
        write_figure([Path(run) for run in settings.runs], Path(settings.figure))
    emit(json.dumps(result))
    return 0


def summarise(runs: Sequence[Path]) -> dict[str, Any]:
    """Return every arm's score with its 95% interval and its paired differences, at each run's last evaluation.

    Raises:
        DataError: A run has no evaluation or no configuration, or the runs have different arms, steps or numbers of
            episodes, one seed twice, or another task or data.
    """
    _check_one_task(runs)
    found = [_last(run) for run in runs]
    first = found[0]
    for run, rows in zip(runs, found, strict=True):
        if [(r["arm"], r["step"], len(r["returns"])) for r in rows.values()] != [
            (r["arm"], r["step"], len(r["returns"])) for r in first.values()
        ]:
            raise DataError(f"'{run}' and '{runs[0]}' differ in arms, steps or episodes: they cannot be joined")
    values = {arm: np.array([_values(rows[arm]) for rows in found]) for arm in first}  # [seeds, episodes]
    returns = {arm: np.array([rows[arm]["returns"] for rows in found]) for arm in first}
    base = next((arm for arm in first if arm.startswith("best-of-")), None)
    moved = [arm for arm in first if first[arm]["flow_steps"]]
    arms = {arm: _arm(values, returns, arm, base) | {"moved": first[arm]["moved"]} for arm in first}
    if len(runs) > 1:
        for name, candidates in (("best budget", [*([base] if base else []), *moved]), ("best budget above 0", moved)):
            if candidates:
                chosen = _chosen_elsewhere(values, returns, candidates)
                for measured in (values, returns):
                    measured[name] = np.array([measured[arm][seed] for seed, arm in enumerate(chosen)])
                arms[name] = _arm(values, returns, name, base) | {"chosen": chosen}
    return {
        "step": next(iter(first.values()))["step"],
        "seeds": len(runs),
        "episodes": int(values[CLONE].shape[1]),
        "measure": "success rate" if _solved(first[CLONE]) else "return",
        "arms": arms,
    }


def table(result: dict[str, Any]) -> str:
    """Write a summary as a Markdown table."""
    lines = [
        f"{result['seeds']} seeds, {result['episodes']} episodes each, step {result['step']}, {result['measure']}",
        "",
        "| arm | score [95%] | minus clone [95%] | minus best-of-N [95%] | return minus best-of-N's [95%] |",
        "|---|---|---|---|---|",
    ]
    for name, arm in result["arms"].items():
        cells = [arm["score"], arm["minus_clone"], arm["minus_best_of_n"], arm["return_minus_best_of_n"]]
        lines.append(f"| {name} | {' | '.join('' if c is None else _shown(c) for c in cells)} |")
    return "\n".join([*lines, *_note(result)])


def _note(result: dict[str, Any]) -> list[str]:
    """What the intervals of arms that always failed or always succeeded do not say; nothing where there is none."""
    if result["measure"] != "success rate":
        return []
    names = [name for name, arm in result["arms"].items() if arm["score"] in ([0.0] * 3, [100.0] * 3)]
    if not names:
        return []
    episodes = result["seeds"] * result["episodes"]
    bound = 100 * (1 - 0.025 ** (1 / episodes))
    return [
        "",
        f"{', '.join(names)}: all {episodes} episodes ended alike, where a bootstrap interval has no width. The exact "
        f"95% bound for 0 of {episodes} is {bound:.1f}% (for {episodes} of {episodes}: {100 - bound:.1f}%).",
    ]


def write_figure(runs: Sequence[Path], path: Path | None = None) -> Path | None:
    """Draw score, and return beside a success rate, against flow steps; None without matplotlib.

    Args:
        runs: Folders of runs of one task.
        path: Image file; None: score.png in the first folder.
    """
    try:
        import matplotlib
    except ImportError:
        say("score.png is not drawn: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    result, rows = summarise(runs), _last(runs[0])
    panels = [("score", "success rate (%)"), ("return", "return")] if _solved(rows[CLONE]) else [("score", "return")]
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axes, (key, label) in zip(all_axes[0], panels, strict=True):
        _draw(axes, result["arms"], rows, key)
        axes.set_ylabel(label)
    # The clone's return is that of its failures, which would leave the budgets no room to differ.
    all_axes[0, 0].axhline(result["arms"][CLONE]["score"][0], linestyle="--", color="grey", label="clone")
    all_axes[0, 0].legend()
    path = path or runs[0] / "score.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _draw(axes: Any, arms: dict[str, Any], rows: dict[str, Any], key: str) -> None:
    """Draw a figure of the arms against flow steps, a line a step size."""
    base = next((arm for arm in rows if arm.startswith("best-of-")), None)
    for size in sorted({row["step_size"] for row in rows.values() if row["step_size"]}):
        names = ([base] if base else []) + [arm for arm, row in rows.items() if row["step_size"] == size]
        steps = [rows[arm]["flow_steps"] for arm in names]
        means, lows, highs = np.array([arms[arm][key] for arm in names]).T
        axes.errorbar(steps, means, [means - lows, highs - means], marker="o", capsize=3, label=f"step size {size:g}")
    axes.set_xlabel("flow steps at test time (0: best-of-N)")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _last(run: Path) -> dict[str, dict[str, Any]]:
    path = run / EVALUATIONS_NAME
    rows = read_jsonl(path)
    if not rows:
        raise DataError(f"'{path}' holds no evaluation yet")
    last = {row["arm"]: row for row in rows if row["step"] == rows[-1]["step"]}
    episodes = {arm: len(row["returns"]) for arm, row in last.items()}
    if len(set(episodes.values())) > 1:
        shown = ", ".join(f"{arm}: {count}" for arm, count in episodes.items())
        raise DataError(
            f"'{path}', step {rows[-1]['step']}: arms differ in their episodes ({shown}) and cannot be compared; "
            "evaluate all of them again (--only_evaluate) with one eval_episodes"
        )
    return last


def _check_one_task(runs: Sequence[Path]) -> None:
    """Refuse runs of one seed, whose episodes would count twice, and runs of another task or data."""
    configs = [_config(run) for run in runs]
    seen: dict[int, Path] = {}
    for run, config in zip(runs, configs, strict=True):
        path = run / _CONFIG_NAME
        for key in (one.name for one in fields(DataSettings)):
            here, there = config.get(key), configs[0].get(key)
            if here != there:
                raise DataError(f"'{path}': {key}: {here!r}, but '{runs[0]}' has {there!r}: join runs of one task")
        seed = config["seed"]
        if seed in seen:
            raise DataError(
                f"'{path}': seed: {seed} is also that of '{seen[seed]}', whose episodes would count twice; "
                "give each seed once"
            )
        seen[seed] = run


def _config(run: Path) -> dict[str, Any]:
    """Read the configuration that a run was started with."""
    path = run / _CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); name the folder of a run") from error
    if not isinstance(config, dict) or not isinstance(config.get("seed"), int):
        raise DataError(f"'{path}': seed: missing or not an integer; name the folder of a run")
    return config


def _solved(row: dict[str, Any]) -> bool:
    return row["successes"] is not None


def _values(row: dict[str, Any]) -> list[float]:
    return [100 * value for value in row["successes"]] if _solved(row) else row["returns"]


def _arm(values: dict[str, np.ndarray], returns: dict[str, np.ndarray], arm: str, base: str | None) -> dict[str, Any]:
    beside = None if arm in (base, CLONE) else base
    return {
        "score": _interval(values[arm]),
        "minus_clone": _interval(values[arm] - values[CLONE]) if arm != CLONE else None,
        "minus_best_of_n": None if beside is None else _interval(values[arm] - values[beside]),
        "return": _interval(returns[arm]),
        "return_minus_best_of_n": None if beside is None else _interval(returns[arm] - returns[beside]),
        "per_seed": [round(float(mean), 2) for mean in values[arm].mean(1)],
        "return_per_seed": [round(float(mean), 2) for mean in returns[arm].mean(1)],
    }


def _interval(values_SE: np.ndarray) -> list[float]:
    """Return mean, lower and upper end, rounded as they are reported."""
    found = bootstrap_within_seeds(values_SE)
    return [round(number, 2) for number in (found.mean, found.low, found.high)]


def _chosen_elsewhere(
    values: dict[str, np.ndarray], returns: dict[str, np.ndarray], candidates: Sequence[str]
) -> list[str]:
    """For each seed the candidate with the best mean over the other seeds; of equals the one with the best return."""

    def elsewhere(arm: str, seed: int) -> tuple[float, float]:
        others = (np.delete(table[arm], seed, 0).mean() for table in (values, returns))
        score, total = (round(float(mean), 9) for mean in others)
        return score, total

    seeds = len(values[candidates[0]])
    return [max(candidates, key=lambda arm: elsewhere(arm, seed)) for seed in range(seeds)]


def _shown(interval: Sequence[float]) -> str:
    return f"{interval[0]:.1f} [{interval[1]:.1f}, {interval[2]:.1f}]"


if __name__ == "__main__":
    sys.exit(run_main(main))

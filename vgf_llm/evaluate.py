"""``vgf-llm evaluate``: compare transport budgets with best-of-N and controls, at what they cost.

    vgf-llm evaluate --config recipes/smollm2_sentiment/evaluate.yaml --budgets '[{nats: 2}, {nats: 4}]'

Every finished (arm, seed, prompt) is a line of ``rows.jsonl``; Ctrl-C or a kill loses at most the batch in progress,
and ``--resume`` continues. The summary comes from the rows: ``summary.json``, a table on standard error, and with
``--record NAME`` also ``docs/results/NAME.json`` and the tables and unfiltered texts in ``docs/results/NAME.md``.
The last line of standard output is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.grammar import is_composed, reward_contents
from reward_models.inputs import check_models, check_rewards
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries
from vgf_llm.console.screen import emit, say
from vgf_llm.data.contents import contents
from vgf_llm.engines.inputs import check_engine
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.machine.precision import with_dtype
from vgf_llm.runs.claim import claim, refuse_rows
from vgf_llm.runs.files import append_jsonl, check_writable, read_jsonl, write_json_atomic, write_text_atomic
from vgf_llm.settings import HOW_REWARDS_ARE_CALLED, ModelSettings, SamplingSettings, check_decoder_options
from vgf_llm.settings.parse import dump, parse
from vgf_llm.settings.shared import check_backend

_RECORDS = Path("docs/results")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings, models, sampling = parse(
        EvaluateSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm evaluate",
        description="Compare transport budgets with best-of-N and controls.",
    )
    with library_output(settings.output_dir):
        summary = run(settings, models, sampling)
    emit(json.dumps(headline(summary)))
    return 0


def run(settings: EvaluateSettings, models: ModelSettings, sampling: SamplingSettings) -> dict[str, Any]:
    """Evaluate every arm on every prompt and return the summary.

    Raises:
        OutputError: If output_dir cannot be written, or holds rows and ``resume`` is off.
        ConfigError: If ``resume`` is on and the configuration is another one.
    """
    output_dir = check_writable(settings.output_dir)
    if settings.record:
        check_writable(_RECORDS)
    rows_path = output_dir / "rows.jsonl"
    refuse_rows(rows_path, bool(settings.resume))
    prompts = look_at_inputs(settings, models)
    load_libraries("vgf_llm.evaluation.runner")
    models = with_dtype(models)
    _claim(rows_path, settings, models, sampling)
    from vgf_llm.evaluation.report import markdown_report
    from vgf_llm.evaluation.runner import finish, work
    from vgf_llm.evaluation.table import equal_cost_lines, part_lines, print_table

    done = {(row["arm"], row["seed"], row["prompt_index"]) for row in _read(rows_path)}
    for rows in work(settings, models, sampling, prompts, done):
        append_jsonl(rows_path, rows)
    rows = _read(rows_path)
    summary = finish(settings, models, sampling, rows)
    write_json_atomic(output_dir / "summary.json", summary)
    if settings.record:
        write_json_atomic(_RECORDS / f"{settings.record}.json", summary)
        write_text_atomic(_RECORDS / f"{settings.record}.md", markdown_report(summary, rows))
        say(f"recorded in {_RECORDS / settings.record}.json and .md")
    print_table(summary["arms"], f"{len(summary['arms'])} arms, {summary['prompts']} prompts, gold: {settings.gold}")
    for line in [*part_lines(summary["arms"]), *equal_cost_lines(summary["equal_cost"])]:
        say(line)
    for direction, figures in summary["fidelity"].items():
        share = figures["top8_gain"] / figures["best8_gain"] if figures["best8_gain"] > 0 else float("nan")
        say(
            f"fidelity of the {direction}: Spearman {figures['spearman']:.2f} [{figures['low']:.2f}, "
            f"{figures['high']:.2f}], its best eight substitutions gain {share:.0%} of what the true best gain"
        )
    return summary


def look_at_inputs(settings: EvaluateSettings, models: ModelSettings) -> list[Any]:
    """Look at everything that can be judged without a model, and return the prompts.

    Raises:
        VGFError: Something is unusable.
    """
    from vgf_llm.data.prompts import load_prompt_texts

    check_rewards([], settings.gold, calls=settings)
    check_models(models)
    for arm in settings.all_arms():
        check_decoder_options(arm.decoder, arm.decoder_options)
        check_backend(arm.decoder, settings.backend)
    check_engine(settings.backend, settings.engine.url)
    prompts = load_prompt_texts(
        settings.prompts, settings.prompt_column, limit=settings.num_prompts, system_column=settings.system_column
    )
    check_rewards([], settings.gold, prompts)
    return prompts


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the last line's object: proxy, gold and NLL of each arm's cloud and the gold of its selected response."""
    keys = ("proxy", "gold", "nll", "selected_gold", "tflops", "seconds")
    return {arm: {key: round(entry[key]["mean"], 4) for key in keys} for arm, entry in summary["arms"].items()}


def _read(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path)) if path.exists() else []


def _claim(rows_path: Path, *instances: Any) -> None:
    """Refuse to mix the rows of two runs; more prompts and further arms only add rows."""
    settings, models = instances[0], instances[1]
    config = {
        **dump(*instances),
        "contents": contents(settings.prompts, models.reward_model, models.model_name_or_path),
        **({"gold_contents": reward_contents(settings.gold)} if is_composed(settings.gold) else {}),
    }
    # What the arms are made from is compared in the arms themselves.
    free = ("num_prompts", "arms", "baselines", "num_particles", "draws", "best_of", "budgets", *HOW_REWARDS_ARE_CALLED)
    claim(rows_path, config, resume=bool(settings.resume), free=free, changes=_arm_changes)


def _arm_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"arms: {name}" for name in _changed_arms(before.get("arms", []), now["arms"])]


def _changed_arms(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Return the names of arms whose description changed; more seeds do not count as a change."""

    def described(arms: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {arm["name"]: {k: v for k, v in arm.items() if k != "num_seeds"} for arm in arms}

    old, new = described(before), described(now)
    return [name for name in new if name in old and old[name] != new[name]]


if __name__ == "__main__":
    sys.exit(run_main(main))

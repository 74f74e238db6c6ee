"""The bake-off: every decoder against best-of-N at equal compute, with controls, on two tasks.

    python -m benchmarks.decoders --config recipes/smollm2_sentiment/evaluate_decoders.yaml --show_texts true
    python -m benchmarks.decoders --config recipes/smollm2_dialogue/evaluate_decoders.yaml
    python -m benchmarks.decoders --config ... --stage seconds

Stage ``compute`` runs best-of-N and the decoders named by ``main`` at four compute levels on all prompts, then every
decoder, and each with a random direction, without one, and with the value's raw gradient, on ``few_prompts`` of them.
FLOPs are counted, and every arm is held against best-of-N at its own count (``benchmarks/decoder_matches.py``). It can
be resumed: every finished (arm, prompt) is a line of ``rows.jsonl``. Stage ``seconds`` times the arms one by one, each
with a sampling of its own, on an otherwise idle machine; ``report``, or ``compute`` run again, adds the comparison at
equal seconds.
The last line of standard output is one JSON object; with ``--record`` the summary goes to docs/results/<name>.json and
the tables to <name>.md, with texts if these may be shown.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.decoder_arms import (
    BASE,
    DEFAULT_NATS,
    ablation_arms,
    best_of,
    cloud_arm,
    control_arms,
    decodings,
    growing_arms,
    level_arms,
)
from reward_models.composed import Remembered
from vgf_llm.cli import run_main
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.evaluation.arms import Arm
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.runs.files import check_writable, read_jsonl, write_json_atomic, write_text_atomic
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import dump, parse

_RECORDS = Path("docs/results")
_SHOWN = 40
_CLOUD_NATS = (1.0, 2.0, 4.0)
_ALPHA_SHARE = 0.1  # of the standard deviation of the value, for the decoders that accept by it


@dataclass(frozen=True)
class BenchmarkSettings:
    """What the bake-off runs."""

    stage: str = "compute"
    """compute (FLOPs, gold, controls), seconds (timing, on an idle machine), or report (of the rows there are)."""
    few_prompts: int = 8
    """Prompts on which every decoder, control and ablation is run; the first of the file, at least 2."""
    main: list[str] = field(default_factory=lambda: ["prior", "prior 4 nats", "prior 4 nats by time", "pivot all"])
    """Decoders that are run on all prompts."""
    others: list[str] = field(default_factory=lambda: list(decodings(1.0)))
    """Decoders that are run at all."""
    extras: list[str] = field(default_factory=lambda: ["controls", "ablations", "growing"])
    """What is run besides the decoders: controls, ablations of prior, and growing budgets."""
    show_texts: bool = False
    """Whether the record may hold prompts and texts; never for data that must not be passed on."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        if self.stage not in ("compute", "seconds", "report"):
            raise ValueError(f"stage must be compute, seconds or report, got {self.stage!r}")
        unknown = sorted(set(self.extras) - {"controls", "ablations", "growing"})
        if unknown:
            raise ValueError(f"extras: {unknown[0]!r} is none of controls, ablations, growing")
        if self.few_prompts < 2:
            raise ValueError(f"few_prompts must be at least 2, got {self.few_prompts}")
        for name in (*self.main, *self.others):
            if name not in decodings(1.0):
                raise ValueError(f"main, others: {name!r} is no decoder here; there are {', '.join(decodings(1.0))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    benchmark, settings, models, sampling = parse(
        BenchmarkSettings,
        EvaluateSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="python -m benchmarks.decoders",
        description="Compare decoders with best-of-N at equal compute.",
    )
    if settings.arms or settings.baselines:
        raise ConfigError("arms and baselines are the benchmark's own (benchmarks/decoder_arms.py); leave them out")
    check_writable(settings.output_dir)
    if settings.record:
        check_writable(_RECORDS)
    run = time_arms if benchmark.stage == "seconds" else compare
    print(json.dumps(run(benchmark, settings, models, sampling)))
    return 0


def acceptance_temperature(models: ModelSettings) -> float:
    """Return alpha of the decoders that accept by value: a tenth of the reward model's standard deviation.

    Raises:
        ModelError: The reward model's card states none.
    """
    from reward_models.card import read_card

    std = read_card(models.reward_model or "").score_std
    if not std:
        raise ModelError(f"'{models.reward_model}': the card states no score_std; train the reward model again")
    return round(_ALPHA_SHARE * std, 4) or _ALPHA_SHARE * std


def stages(benchmark: BenchmarkSettings, alpha: float) -> list[tuple[list[Arm], bool]]:
    """Return the arms of each pass over the prompts, and whether it takes few of them."""
    arms = [*best_of(), *level_arms(alpha, benchmark.others)]
    undirected = ("prior 4 nats", "prior 4 nats by time", "nearest", "nearest each step")
    directed = [name for name in benchmark.others if name not in undirected]
    extras = {
        "controls": control_arms(alpha, directed),
        "ablations": ablation_arms(),
        "growing": growing_arms(alpha),
    }
    for name in benchmark.extras:
        arms += extras[name]
    main_arms = [*best_of(), *level_arms(alpha, benchmark.main), *map(cloud_arm, _CLOUD_NATS)]
    return [(main_arms, False), (arms, True)]


def compare(
    benchmark: BenchmarkSettings, settings: EvaluateSettings, models: ModelSettings, sampling: SamplingSettings
) -> dict[str, Any]:
    """Run the arms that are left, hold all against best-of-N at equal FLOPs, and return the headline."""
    from benchmarks.decoder_matches import matched, matched_markdown, seconds_count
    from vgf_llm.evaluate import run
    from vgf_llm.evaluation.report import markdown_report
    from vgf_llm.evaluation.runner import finish

    alpha = acceptance_temperature(models)
    passes = stages(benchmark, alpha)
    prompts = settings.num_prompts or sum(1 for _ in read_jsonl(Path(settings.prompts)))
    for some, few in passes if benchmark.stage == "compute" else []:
        count = min(benchmark.few_prompts, prompts) if few else prompts
        run(replace(settings, arms=some, num_prompts=count, resume=True, record=None), models, sampling)
    every_row = read_jsonl(Path(settings.output_dir) / "rows.jsonl")
    rows = [row for row in every_row if row["prompt_index"] < prompts]  # an earlier run may have had more
    arms = {arm.name: arm for some, _ in passes for arm in some}
    every = replace(settings, arms=list(arms.values()), baselines=["base", BASE])
    summary = finish(every, models, sampling, rows)
    summary["matched_flops"] = matched([row for row in rows if row["arm"] in arms], BASE)
    seconds_path = Path(settings.output_dir) / "seconds.json"
    if seconds_path.is_file():
        summary["seconds"] = json.loads(seconds_path.read_text(encoding="utf-8"))
        if summary["seconds"]["config"] != dump(models, sampling):
            raise ConfigError(f"{seconds_path} was measured with other models or sampling; remove it, or time again")
        seconds = summary["seconds"]["seconds"]
        timed = [row for row in rows if row["arm"] in arms and row["arm"] in seconds]
        summary["matched_seconds"] = matched(timed, BASE, seconds_count(seconds))
    summary["alpha"] = alpha
    write_json_atomic(Path(settings.output_dir) / "summary.json", summary)
    if settings.record:
        tables = ["## At equal FLOPs", matched_markdown(summary["matched_flops"])]
        if "matched_seconds" in summary:
            tables += ["## At equal seconds", matched_markdown(summary["matched_seconds"])]
        tables.append(markdown_report(summary, []))
        if benchmark.show_texts:
            tables.append(samples_markdown(rows, cloud_arm(DEFAULT_NATS).name))
        write_json_atomic(_RECORDS / f"{settings.record}.json", summary)
        write_text_atomic(_RECORDS / f"{settings.record}.md", "\n\n".join(tables))
        print(f"recorded in {_RECORDS / settings.record}.json and .md", file=sys.stderr)
    print(matched_markdown(summary["matched_flops"]))
    return {
        name: {"n": round(one["n"], 1), "gold": round(one["selected_gold"]["mean"], 4)}
        for name, one in summary["matched_flops"].items()
    }


def samples_markdown(rows: list[dict[str, Any]], moved_arm: str) -> str:
    """Return 40 samples, as many of each prompt, and what they were moved to, whatever they say."""
    seed = min(row["seed"] for row in rows)
    found = {(row["arm"], row["prompt_index"]): row for row in rows if row["seed"] == seed}
    indices = sorted(index for arm, index in found if arm == moved_arm and (BASE, index) in found)[:_SHOWN]
    each = -(-_SHOWN // max(1, len(indices)))
    lines = [
        "## Texts, unfiltered",
        "",
        f"The first samples of each prompt and what `{moved_arm}` made of them, each with gold and NLL a token.",
        "",
        "| | prompt | sample | transported |",
        "|---|---|---|---|",
    ]
    for index in indices:
        original, moved = found[BASE, index], found[moved_arm, index]
        for n in range(min(each, len(moved["texts"]))):
            cells = [_text_cell(row, n) for row in (original, moved)]
            lines.append(f"| {index + 1} | {original['prompt']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _text_cell(row: dict[str, Any], n: int) -> str:
    text = " ".join(row["texts"][n].split()).replace("|", "\\|")
    return f"{text} ({row['gold'][n]:+.2f}, {row['nll'][n]:.2f})"


def time_arms(
    benchmark: BenchmarkSettings, settings: EvaluateSettings, models: ModelSettings, sampling: SamplingSettings
) -> dict[str, Any]:
    """Time best-of-N and every decoder at every level, one batch of ``few_prompts`` prompts an arm, and return seconds.

    An arm draws its own samples in one piece, as it would in use. Two repetitions in turning order; the lower counts.
    """
    from vgf_llm.answering.pipeline import encode_prompts, load_pipeline
    from vgf_llm.console.progress import track
    from vgf_llm.data.prompts import load_prompts
    from vgf_llm.evaluation.experiment import Experiment, Prompts
    from vgf_llm.evaluation.flops import Sizes
    from vgf_llm.machine.facts import hardware
    from vgf_llm.text import TorchReference

    arms = stages(replace(benchmark, extras=[]), acceptance_temperature(models))[1][0]
    pipeline = load_pipeline(models, sampling)
    found = load_prompts(settings.prompts, settings.prompt_column, limit=benchmark.few_prompts)
    if len(found) < benchmark.few_prompts:
        raise ConfigError(f"{settings.prompts} has {len(found)} prompts, few_prompts asks for {benchmark.few_prompts}")
    batch = Prompts(list(range(len(found))), [""] * len(found), encode_prompts(pipeline, found))
    sizes = Sizes.of(pipeline.reference.model, pipeline.value)

    def no_gold(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0] * len(responses)

    gold = Remembered(no_gold)
    experiment = Experiment(pipeline.reference, pipeline.value, pipeline.tokenizer, gold, sizes, pipeline.gradient)
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    started = time.perf_counter()
    for arm in track([*arms, *reversed(arms)], "timing"):
        reference = pipeline.reference  # a new one has no prompts in its cache
        fresh = TorchReference(reference.model, reference.sampling, reference.eos_ids, reference.pad_id)
        for rows in replace(experiment, reference=fresh).rows([arm], batch, settings.seed):
            seconds[arm.name].append(rows[0]["seconds"])
    result = {
        "seconds": {name: min(times) for name, times in seconds.items()},
        "spread": {name: round(max(times) / min(times), 3) for name, times in seconds.items()},
        "prompts_a_batch": len(found),
        "hardware": hardware(),
        "config": dump(models, sampling),
        "wall_sec": round(time.perf_counter() - started, 1),
    }
    write_json_atomic(Path(settings.output_dir) / "seconds.json", result)
    if settings.record:
        write_json_atomic(_RECORDS / f"{settings.record}_seconds.json", result)
    return result


if __name__ == "__main__":
    sys.exit(run_main(main))

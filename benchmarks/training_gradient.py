"""The learned value's direction, exact or from a secant head trained along: what it costs in reward, and in time.

    python -m benchmarks.training_gradient --record training_gradient

Fine-tunes by one recipe (a Python reward, a value learned along), once with the value's input gradient and once with
a secant head, a run a seed and kind in a process of its own; measures both policies (benchmarks/training_evaluate.py)
with their paired difference; and on the final value of each secant run the fidelity of both directions, on responses of
the base to unseen prompts, and the processor time of one flow step by each, alternating. Finished runs are kept. The
last line of standard output is one JSON object; with ``--record`` it also goes to docs/results/<name>.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vgf_llm.cli import run_main
from vgf_llm.errors import ModelError
from vgf_llm.machine.precision import with_dtype
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.settings.parse import parse

KINDS = ("exact", "secant")


@dataclass(frozen=True)
class GradientSettings:
    """How long, how often, and where it goes."""

    recipe: str = "recipes/smollm2_sentiment/vgf_function.yaml"
    """Recipe whose learned value is compared with itself."""
    max_steps: int = 40
    """Optimiser steps of each run, at least 1."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Training seeds."""
    reward_model: str = "outputs/smollm2_sentiment/reward"
    """Reward model that is only looked at in the evaluation."""
    prompts: str = "recipes/smollm2_sentiment/data/prompts_test.jsonl"
    """Prompts that the policies are measured on."""
    validation_prompts: str = "recipes/smollm2_sentiment/data/prompts_validation.jsonl"
    """Prompts that fidelity is measured on."""
    num_samples: int = 4
    """Responses a prompt in the evaluation."""
    repetitions: int = 7
    """Timings of a flow step by each direction."""
    output_dir: str = "outputs/training_gradient"
    """Folder of the runs."""
    record: str | None = None
    """Also write the result to docs/results/<record>.json."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    (settings,) = parse(
        GradientSettings,
        argv=argv,
        prog="python -m benchmarks.training_gradient",
        description="Compare the exact gradient of a learned value with a secant head trained along.",
    )
    check_writable(settings.output_dir)
    folders = {kind: [train(settings, kind, seed) for seed in settings.seeds] for kind in KINDS}
    result = {
        "settings": asdict(settings),
        "policies": compare_policies(settings, folders),
        "directions": [compare_directions(settings, folder) for folder in folders["secant"]],
        "steps": {kind: [step_figures(folder) for folder in folders[kind]] for kind in KINDS},
    }
    if settings.record:
        write_json_atomic(Path("docs/results") / f"{settings.record}.json", result)
    print(json.dumps(result))
    return 0


def train(settings: GradientSettings, kind: str, seed: int) -> Path:
    """Fine-tune in a process of its own unless that was done; returns the run's folder.

    Raises:
        ModelError: The run failed; its messages are in log.txt.
    """
    folder = Path(settings.output_dir) / f"{kind}_seed_{seed}_steps_{settings.max_steps}"
    if (folder / "adapter_config.json").is_file():
        return folder
    flags = {
        "config": settings.recipe,
        "output_dir": folder,
        "max_steps": settings.max_steps,
        "seed": seed,
        "logging_steps": 10,
        "learned_value.gradient": kind,
    }
    command = [sys.executable, "-m", "vgf_llm.train", *(str(p) for key, v in flags.items() for p in (f"--{key}", v))]
    check_writable(folder)
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ, check=False).returncode:
            raise ModelError(f"{' '.join(command)} failed; see {folder / 'log.txt'}")
    return folder


def step_figures(folder: Path) -> dict[str, list[float]]:
    """Return what a run's log says of its course, a number a line."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("step", "reward/original", "reward/transported", "seconds/transport", "seconds/targets")
    names += ("value/explained_variance", "value/secant_correlation")
    return {name: [line.get(name, float("nan")) for line in lines if name in line] for name in names}


def compare_policies(settings: GradientSettings, folders: dict[str, list[Path]]) -> dict[str, Any]:
    """Measure the policies and return means with intervals, and secant minus exact paired by prompt and seed."""
    from benchmarks.training_evaluate import MEASURES, EvaluationSettings, run
    from vgf_llm.machine.facts import hardware
    from vgf_llm.settings import ModelSettings, SamplingSettings
    from vgf_llm.statistics.intervals import bootstrap_mean

    names = [str(folder) for kind in KINDS for folder in folders[kind]]
    evaluation = EvaluationSettings(
        adapter=names, output_dir=settings.output_dir, prompts=settings.prompts, num_samples=settings.num_samples
    )
    models = with_dtype(ModelSettings(reward_model=settings.reward_model))
    results = run(evaluation, models, SamplingSettings())
    rows = {kind: [row for folder in folders[kind] for row in results[str(folder)]["prompts"]] for kind in KINDS}
    found: dict[str, Any] = {"hardware": hardware()}
    for kind in KINDS:
        found[kind] = {key: asdict(bootstrap_mean([row[key] for row in rows[kind]])) for key in MEASURES}
    pairs = list(zip(rows["secant"], rows["exact"], strict=True))
    found["secant - exact"] = {
        key: asdict(bootstrap_mean([one[key] - other[key] for one, other in pairs])) for key in MEASURES
    }
    return found


def compare_directions(settings: GradientSettings, folder: Path) -> dict[str, Any]:
    """Return fidelity and seconds of a flow step of both directions of a run's value."""
    from reward_models.secant import load_secant_head, secant_gradient
    from reward_models.secant_fit import compare_with_gradient, sample_reference, score_substitutions
    from vgf_llm.answering.pipeline import encode_prompts, load_pipeline
    from vgf_llm.data.prompts import load_prompts
    from vgf_llm.settings import ModelSettings, SamplingSettings
    from vgf_llm.text.particles import exact_gradient

    pipeline = load_pipeline(ModelSettings(reward_model=str(folder / "value")), SamplingSettings())
    value, head = pipeline.value, load_secant_head(folder / "value", pipeline.value)
    prompts = encode_prompts(pipeline, load_prompts(settings.validation_prompts, limit=20))
    sampled = sample_reference(pipeline.reference, prompts, a_prompt=2, shortlist=30, seed=0)
    changes = score_substitutions(value, sampled, 60, 0, "exact changes, prompts")
    exact, secant = compare_with_gradient(value, head, sampled.responses, changes)
    prefix, u_BNTD = value.prefix(sampled.responses.prompts), value.embed(sampled.responses.tokens_BNT).detach()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(settings.repetitions):
        for kind, source in (("exact", exact_gradient), ("secant", secant_gradient(head))):
            step, started = source(value, prefix, sampled.responses), time.process_time()
            step(u_BNTD)
            seconds[kind].append(time.process_time() - started)
    ratios = [one / other for one, other in zip(seconds["secant"], seconds["exact"], strict=True)]
    return {
        "fidelity": {"exact": exact.to_dict(), "secant": secant.to_dict()},
        "flow_step_seconds": seconds,
        "secant_over_exact_time": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Fine-tuning at equal wall-clock: our trainer against TRL's GRPO, RLOO and DPO, on one model, reward and prompt set.

    python -m benchmarks.training --reward_model outputs/smollm2_sentiment/reward --dtype bfloat16 --stage tune
    python -m benchmarks.training --reward_model outputs/smollm2_sentiment/reward --dtype bfloat16 --record training

Every method trains for the same minutes of its own trainer's time (benchmarks/training_marks.py), one after the other,
each in a process of its own, so that peak memory is its own; adapters are kept at four marks on the way. Stage ``tune``
gives every method the same number of learning rates for ``tune_minutes`` and takes the one of highest mean gold on the
validation prompts. Stage ``compare`` trains with those (without them: with each method's first), measures every mark on
the test prompts (benchmarks/training_evaluate.py) and reports. What is on disk under the same settings is not run
again. The last line of standard output is one JSON object; with ``--record`` the summary goes to
docs/results/<name>.json, tables and texts to <name>.md, and the figure to docs/figures/<name>.png.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.training_job import RESULT_NAME, Clock, Job, Method, identity
from vgf_llm.cli import run_main
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.machine.precision import with_dtype
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import dump, parse

RATES: dict[str, list[float]] = {
    "vgf": [2.0e-4, 5.0e-5, 5.0e-4],  # first the recipe's
    "grpo": [1.0e-5, 5.0e-5, 2.0e-4],  # first what TRL's documentation recommends under LoRA, then its other page's
    "rloo": [1.0e-5, 5.0e-5, 2.0e-4],
    "dpo": [5.0e-6, 2.0e-5, 1.0e-4],
}
TUNED_NAME = "tuned.json"
MODULES = {"vgf": "benchmarks.training_vgf"}  # the others: benchmarks.training_trl


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is compared, for how long, and where it goes."""

    stage: Literal["tune", "compare", "report"] = "compare"
    """tune (learning rates, on validation prompts), compare (train, measure, report) or report (of what there is)."""
    methods: list[Method] = field(default_factory=lambda: ["vgf", "grpo", "rloo", "dpo"])
    """Methods, in the order they run."""
    minutes: float = 10.0
    """Training time of each, in minutes, above 0."""
    tune_minutes: float = 3.0
    """Training time of each try of the stage tune, in minutes, above 0."""
    clock: Clock = "wall"
    """wall, or processor: on a shared machine, where a method's wall time is also that of its neighbours."""
    learning_rates: dict[str, list[float]] = field(default_factory=lambda: dict(RATES))
    """Rates tried for each method, as many for one as for another; the first is used where nothing was tuned."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Training seeds; figures are means over them."""
    output_dir: str = "outputs/training"
    """Folder for runs, figures and the report."""
    train_prompts: str = "recipes/smollm2_sentiment/data/prompts_train.jsonl"
    """Prompts that every method trains on."""
    validation_prompts: str = "recipes/smollm2_sentiment/data/prompts_validation.jsonl"
    """Prompts that learning rates are chosen on."""
    test_prompts: str = "recipes/smollm2_sentiment/data/prompts_test.jsonl"
    """Prompts that the comparison is made on."""
    recipe: str = "recipes/smollm2_sentiment/vgf.yaml"
    """Recipe of our trainer."""
    gold: str = "vader_compound"
    """Held-out scorer: a function of reward_models.functions or "module:function"."""
    num_samples: int = 4
    """Responses a prompt that are scored, at least 1; as many again for the KL."""
    max_steps: int = 1_000_000
    """Optimiser steps that end a run before its time; for smoke tests."""
    record: str | None = None
    """Also write the report to docs/results/<record>.json and .md and docs/figures/<record>.png."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        for key in ("minutes", "tune_minutes"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}")
        if not self.methods or not self.seeds:
            raise ValueError(f"methods and seeds must not be empty, got {self.methods} and {self.seeds}")
        missing = [method for method in self.methods if not self.learning_rates.get(method)]
        if missing:
            raise ValueError(f"learning_rates has none for {missing[0]!r}")
        tries = {method: len(self.learning_rates[method]) for method in self.methods}
        if len(set(tries.values())) > 1:
            raise ValueError(f"learning_rates must offer every method as many tries, got {tries}")


@dataclass(frozen=True)
class Benchmark:
    """The settings of a comparison, and its runs."""

    settings: BenchmarkSettings
    models: ModelSettings
    sampling: SamplingSettings

    def job(self, method: Method, rate: float, seed: int, tuning: bool) -> Job:
        """Return one run: short and with one mark where it is a try."""
        folder = Path(self.settings.output_dir) / ("tune" if tuning else "runs") / method / f"rate_{rate:g}_seed_{seed}"
        return Job(
            method=method,
            output_dir=str(folder),
            learning_rate=rate,
            minutes=self.settings.tune_minutes if tuning else self.settings.minutes,
            clock=self.settings.clock,
            prompts=self.settings.train_prompts,
            recipe=self.settings.recipe,
            seed=seed,
            marks=1 if tuning else 4,
            max_steps=self.settings.max_steps,
        )

    def jobs(self) -> list[Job]:
        """Return the comparison's runs, with the rates that tuning found."""
        rates = {method: self.rate(method) for method in self.settings.methods}
        return [self.job(m, rates[m], seed, False) for m in self.settings.methods for seed in self.settings.seeds]

    def rate(self, method: Method) -> float:
        """Return the tuned learning rate of a method, or the first of its list."""
        return float(self.tuned().get(method, {}).get("learning_rate", self.settings.learning_rates[method][0]))

    def tuned(self) -> dict[str, Any]:
        """Return what tuning found, by method; empty before."""
        path = Path(self.settings.output_dir) / TUNED_NAME
        return json.loads(path.read_text()) if path.is_file() else {}

    def train(self, job: Job) -> dict[str, Any]:
        """Run a job in a process of its own unless its result is there; returns the result.

        Raises:
            ConfigError: The folder holds the result of another configuration.
            ModelError: The process failed; its messages are in log.txt.
        """
        result = self.result(job)
        if result is not None:
            return result
        print(f"{job.method}, rate {job.learning_rate:g}, seed {job.seed}: {job.minutes:g} minutes", file=sys.stderr)
        flags = as_flags(dump(job, self.models, self.sampling))
        _run_child(MODULES.get(job.method, "benchmarks.training_trl"), flags, Path(job.output_dir))
        result = self.result(job)
        if result is None:
            raise ModelError(f"{job.output_dir}: the run ended without {RESULT_NAME}; see log.txt there")
        return result

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a job, or None where it has not run to its end."""
        path = Path(job.output_dir) / RESULT_NAME
        if not path.is_file():
            return None
        result = json.loads(path.read_text())
        wanted = identity(job, self.models, self.sampling)
        changed = [key for key in wanted if result["job"].get(key) != wanted[key]]
        if changed:
            raise ConfigError(f"{path} is of a run with another {changed[0]}; remove it, or name another output_dir")
        return result

    def evaluate(self, adapters: Sequence[str], prompts: str) -> None:
        """Measure adapters on prompts in a process of its own; what is measured already is kept."""
        settings = self.settings
        own = {"output_dir": settings.output_dir, "prompts": prompts, "gold": settings.gold}
        flags = as_flags({**own, "num_samples": settings.num_samples, **dump(self.models, self.sampling)})
        for adapter in adapters:
            flags += ["--adapter", adapter]
        _run_child("benchmarks.training_evaluate", flags, Path(settings.output_dir))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings, models, sampling = parse(
        BenchmarkSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="python -m benchmarks.training",
        description="Compare our trainer with TRL's at equal wall-clock.",
    )
    if models.reward_model is None:
        raise ConfigError("reward_model is not set; train one with `vgf-llm reward` and name its folder")
    check_writable(settings.output_dir)
    benchmark = Benchmark(settings, with_dtype(models), sampling)
    print(json.dumps(tune(benchmark) if settings.stage == "tune" else compare(benchmark)))
    return 0


def tune(benchmark: Benchmark) -> dict[str, Any]:
    """Try every learning rate of every method and keep the one of highest mean gold on the validation prompts."""
    from benchmarks.training_report import read_means

    settings, seed = benchmark.settings, benchmark.settings.seeds[0]
    found = benchmark.tuned()
    for method in settings.methods:
        jobs = [benchmark.job(method, rate, seed, True) for rate in settings.learning_rates[method]]
        for job in jobs:
            benchmark.train(job)
        benchmark.evaluate([str(job.mark(1)) for job in jobs], settings.validation_prompts)
        tries = {job.learning_rate: read_means(job.mark(1), settings.validation_prompts) for job in jobs}
        best = max(tries, key=lambda rate: tries[rate]["gold"])
        found[method] = {"learning_rate": best, "tries": {f"{rate:g}": means for rate, means in tries.items()}}
        write_json_atomic(Path(settings.output_dir) / TUNED_NAME, found)
    return {method: entry["learning_rate"] for method, entry in found.items()}


def compare(benchmark: Benchmark) -> dict[str, Any]:
    """Train, measure and report; with the stage report, of the runs that there are."""
    from benchmarks.training_evaluate import BASE

    settings, jobs = benchmark.settings, benchmark.jobs()
    if settings.stage == "report":
        jobs = [job for job in jobs if benchmark.result(job) is not None]
        if not jobs:
            raise ConfigError(f"{settings.output_dir} holds no finished run to report; run --stage compare")
    else:
        for job in jobs:
            benchmark.train(job)
    adapters = [str(job.mark(number + 1)) for job in jobs for number in range(job.marks)]
    benchmark.evaluate([BASE, *adapters], settings.test_prompts)

    from benchmarks.training_report import headline, summarise, write_report

    results = {job.output_dir: benchmark.result(job) or {} for job in jobs}
    summary = summarise(jobs, results, settings.output_dir, settings.test_prompts, benchmark.tuned())
    write_report(summary, Path(settings.output_dir), settings.record)
    return headline(summary)


def as_flags(config: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line flags; unset ones are left out."""
    flags: list[str] = []
    for key, value in config.items():
        if value is not None:
            flags += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return flags


def _run_child(module: str, flags: list[str], folder: Path) -> None:
    """Run a module in a fresh interpreter, its messages going to log.txt in a folder.

    Raises:
        ModelError: It failed.
    """
    log = check_writable(folder) / "log.txt"
    with open(log, "a", encoding="utf-8") as handle:
        done = subprocess.run(
            [sys.executable, "-m", module, *flags], stdout=handle, stderr=subprocess.STDOUT, env=os.environ, check=False
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise ModelError(f"{module} ended with exit code {done.returncode} ({last}); its messages are in {log}")


if __name__ == "__main__":
    sys.exit(run_main(main))

"""``vgf-llm demo``: the main job end to end on a real pretrained model, on a laptop without a network.

It trains a reward model on the recipe's preference pairs and fits its secant head (unless ``output_dir`` holds them
already), moves and decodes responses to unseen prompts, and prints the base model, best-of-N and three budgets side by
side, then a few texts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from reward_models.card import CARD_NAME
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, stage, stages
from vgf_llm.console.screen import emit, say, show
from vgf_llm.errors import ConfigError, require
from vgf_llm.evaluate import headline
from vgf_llm.evaluate import run as run_evaluation
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.machine.precision import choose_dtype
from vgf_llm.machine.speed import expected_sec
from vgf_llm.runs.files import check_writable, read_jsonl
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import parse

# TFLOP of 7 million parameters (two layers) on a pair, of a response whose gradient is measured, of the secant head's
# samples and substitutions, and of a prompt under all arms: what the titles' expected times are made of.
_TFLOP = {"pair": 0.0057, "response": 0.066, "secant": 3.0, "prompt": 0.45}
# Less than the recipe's steps and prompts: minutes instead of a quarter of an hour, for 0.05 of accuracy.
_SHORTER_REWARD = ("--max_steps", "60", "--fidelity_responses", "24")
_SHORTER_SECANT = ("--num_prompts", "30", "--num_validation_prompts", "8")


@dataclass(frozen=True)
class DemoSettings:
    """Where the demo's recipe is and where its files go."""

    recipe: str = "recipes/smollm2_sentiment"
    """Folder with reward.yaml, secant.yaml and demo.yaml."""
    output_dir: str = "outputs/demo"
    """Folder for the reward model and the evaluation; what it holds already is used again."""
    num_prompts: int = 8
    """Held-out prompts, at least 1."""
    shown: int = 4
    """Prompts whose texts are printed, at least 0."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(self.num_prompts >= 1, "num_prompts", self.num_prompts, "at least 1")
        require(self.shown >= 0, "shown", self.shown, "at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    (settings,) = parse(
        DemoSettings,
        argv=argv,
        prog="vgf-llm demo",
        description="Train a reward model and compare transport budgets on a small real model.",
    )
    started = time.perf_counter()
    output_dir = check_writable(settings.output_dir)
    recipe = Path(settings.recipe)
    if not (recipe / "demo.yaml").is_file():
        raise ConfigError(f"recipe {str(recipe)!r} has no demo.yaml; run from the repository's folder or name one")
    plan = _read(settings, recipe, output_dir)
    with library_output(output_dir), stages(len(plan.stages)):
        load_libraries("reward_models.trainer", "vgf_llm.runs.hf_arguments", "vgf_llm.evaluation.runner")
        for title, tflop, run in plan.stages:
            stage(title, expected_sec(tflop * 1e12, choose_dtype("auto")))
            with stages(0):
                summary = run()
        _show_texts(plan.evaluation_dir, summary, settings.shown)
    reward_model = plan.reward_model
    minutes = (time.perf_counter() - started) / 60
    emit(json.dumps(headline(summary)))
    command = sys.argv[0] if Path(sys.argv[0]).name == "vgf-llm" else "vgf-llm"  # .venv need not be active
    say(f"\ndone in {minutes:.1f} minutes; everything is in {output_dir}. Next: {command} generate --reward_model "
          f"{reward_model} --prompt 'Write one sentence about the sea.'")  # fmt: skip
    return 0


@dataclass(frozen=True)
class _Plan:
    """What is left to do, as (title, TFLOP, call), and where its results go; the last call returns the summary."""

    stages: list[tuple[str, float, Callable[[], Any]]]
    reward_model: Path
    evaluation_dir: Path


def _read(settings: DemoSettings, recipe: Path, output_dir: Path) -> _Plan:
    """Read all three files of the recipe before the first stage begins, so that a fault in the last one shows at once.

    A reward model, a head or rows of an evaluation that are in the output folder are used again.
    """
    reward_model, evaluation_dir = output_dir / "reward", output_dir / "evaluation"
    found: list[tuple[str, float, Callable[[], Any]]] = []
    if (reward_model / CARD_NAME).exists():
        say(f"using the reward model in {reward_model}")
    else:
        found.append(("reward model", *_train(recipe, reward_model)))
    if not (reward_model / "secant.json").exists() and (recipe / "secant.yaml").is_file():
        found.append(("secant head", _TFLOP["secant"], _fit_secant_head(recipe, reward_model)))
    evaluation, models, sampling = parse(
        EvaluateSettings, ModelSettings, SamplingSettings, argv=["--config", str(recipe / "demo.yaml")]
    )
    evaluation = replace(evaluation, output_dir=str(evaluation_dir), num_prompts=settings.num_prompts, resume=True)
    work = partial(run_evaluation, evaluation, replace(models, reward_model=str(reward_model)), sampling)
    found.append(("evaluation", _TFLOP["prompt"] * settings.num_prompts, work))
    return _Plan(found, reward_model, evaluation_dir)


def _train(recipe: Path, folder: Path) -> tuple[float, Callable[[], Any]]:
    """Return the training of the recipe's reward model, after its TFLOP."""
    from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining
    from reward_models.train import run as train

    script, model, training = parse(
        RewardScript,
        RewardModelSettings,
        RewardTraining,
        argv=["--config", str(recipe / "reward.yaml"), "--output_dir", str(folder), *_SHORTER_REWARD],
    )
    pairs = max(training.max_steps, 0) * training.per_device_train_batch_size
    tflop = pairs * _TFLOP["pair"] + script.fidelity_responses * _TFLOP["response"]
    return tflop, partial(train, script, model, training)


def _fit_secant_head(recipe: Path, folder: Path) -> Callable[[], Any]:
    """Return the fit of the head whose direction moves the particles."""
    from reward_models.secant_settings import SecantScript, SecantTraining
    from reward_models.train_secant import run as fit

    parsed = parse(
        SecantScript,
        SecantTraining,
        SamplingSettings,
        argv=["--config", str(recipe / "secant.yaml"), "--reward_model", str(folder), *_SHORTER_SECANT],
    )
    return partial(fit, *parsed)


def _show_texts(folder: Path, summary: dict[str, Any], shown: int) -> None:
    """Print, for the first prompts, what each arm returned."""
    from rich.table import Table

    arms, rows = list(summary["arms"]), list(read_jsonl(folder / "rows.jsonl"))
    for index in range(shown):
        found = {row["arm"]: row for row in rows if row["prompt_index"] == index}
        if not found:
            break
        table = Table(title=next(iter(found.values()))["prompt"], title_justify="left", show_lines=True)
        for heading in ("arm", "gold", "response"):
            table.add_column(heading, no_wrap=heading != "response")
        for arm in arms:
            if arm in found:
                table.add_row(arm, f"{found[arm]['selected_gold']:+.2f}", found[arm]["selected"].strip())
        show(table)


if __name__ == "__main__":
    sys.exit(run_main(main))

"""The work of ``evaluate``: loads the models, walks over seeds and prompt batches, and closes with the summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from reward_models.composed import Remembered
from reward_models.foreign import text_reward
from reward_models.secant import stated_fidelity
from vgf_llm import __version__
from vgf_llm.answering.pipeline import encode_prompts, load_pipeline
from vgf_llm.console.progress import Bar, stage, working
from vgf_llm.engines.backends import backend_named
from vgf_llm.evaluation.arms import Arm
from vgf_llm.evaluation.experiment import Experiment, Prompts
from vgf_llm.evaluation.flops import Sizes
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.evaluation.summary import Row, at_equal_cost, differences, summarise
from vgf_llm.machine.facts import hardware
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.settings.parse import dump

Key = tuple[str, int, int]
"""(arm, seed, prompt index): what a row stands for."""


def work(
    settings: EvaluateSettings,
    models: ModelSettings,
    sampling: SamplingSettings,
    prompts: Sequence[Any],
    done: set[Key],
) -> Iterator[list[Row]]:
    """Yield the rows that are not done yet, a batch of prompts and an arm at a time."""
    gold = Remembered(text_reward(settings.gold, calls=settings, variables=models.chat_template_kwargs))
    todo = _batches(settings.all_arms(), len(prompts), settings.seed, settings.batch_prompts, done)
    if not todo:
        return
    with working(f"loading the base model {models.model_name_or_path} and the reward model {models.reward_model}"):
        pipeline = load_pipeline(models, sampling, backend_named(settings.backend, settings.engine))
    with closing(pipeline):
        ids, texts = encode_prompts(pipeline, [prompt.prompt for prompt in prompts]), prompts
        sizes = Sizes.of(pipeline.reference.model, pipeline.value)
        experiment = Experiment(
            pipeline.reference,
            pipeline.value,
            pipeline.tokenizer,
            gold,
            sizes,
            pipeline.gradient,
            models.reward_model,
            ids,
        )
        left = sum(len(indices) * len(arms) for _, indices, arms in todo)
        stage(f"evaluating {len(prompts)} prompts under {len(settings.all_arms())} arms")
        with Bar("evaluating", left, "answers") as bar:
            for seed, indices, arms in todo:
                batch = Prompts(indices, [texts[i] for i in indices], [ids[i] for i in indices])
                for rows in experiment.rows(arms, batch, seed):
                    yield [row for row in rows if (row["arm"], row["seed"], row["prompt_index"]) not in done]
                    bar.advance(len(rows))


def _batches(
    arms: list[Arm], num_prompts: int, seed: int, batch_prompts: int, done: set[Key]
) -> list[tuple[int, list[int], list[Arm]]]:
    """Return (seed, prompt indices, arms with something left to do); all of a seed before the next."""
    batches = []
    for repetition in range(max(arm.num_seeds for arm in arms)):
        current = seed + repetition
        active = [arm for arm in arms if repetition < arm.num_seeds]
        for start in range(0, num_prompts, batch_prompts):
            indices = list(range(start, min(start + batch_prompts, num_prompts)))
            left = [arm for arm in active if any((arm.name, current, index) not in done for index in indices)]
            if left:
                batches.append((current, indices, left))
    return batches


def finish(
    settings: EvaluateSettings, models: ModelSettings, sampling: SamplingSettings, rows: list[Row]
) -> dict[str, Any]:
    """Return the summary of all rows: arms, differences from the baseline, and how they came about."""
    names = [arm.name for arm in settings.all_arms()]
    baselines = settings.baselines or names[:1]
    return {
        "arms": summarise(rows, names),
        "differences": {baseline: differences(rows, names, baseline) for baseline in baselines},
        "equal_cost": _at_equal_cost(settings.all_arms(), rows),
        "prompts": len({row["prompt_index"] for row in rows}),
        "fidelity": {} if models.reward_model is None else stated_fidelity(models.reward_model),
        "config": dump(settings, models, sampling),
        "hardware": hardware(),
        "version": __version__,
    }


def _at_equal_cost(arms: list[Arm], rows: list[Row]) -> dict[str, Any]:
    """Compare the arms that move responses with best-of-N."""
    best_of = [arm.name for arm in arms if arm.transport.is_none and not arm.is_plain_base]
    return at_equal_cost(rows, best_of, [arm.name for arm in arms if not arm.transport.is_none])

"""Where the time of a transported response goes, and how often its prompt is processed.

Stages are put around calls from outside for the time of the measurement: the library knows nothing of it. An
operation counts for the innermost stage around it, with its own processor time on the calling thread, and so does what
Python does between the operations of a stage. The profiler itself slows small operations down; how much is stated.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cost_models import CostModels
from reward_models import modelling
from vgf_llm.answering import implicit_policy
from vgf_llm.evaluation.arms import Arm
from vgf_llm.models.prefix import PromptPrefix
from vgf_llm.text import choosing, tilted_path, tilted_step
from vgf_llm.text import reference as reference_module
from vgf_llm.text.tilted_path import TiltedPath

_REFERENCE, _MARK = "reference", "stage: "
_OTHER = "everything else"
_CALLS: tuple[tuple[Any, str, str], ...] = (
    (reference_module, "compute_prefix", "prompts, once"),
    (modelling, "compute_prefix", "prompts, once"),
    (PromptPrefix, "select", "copies of the prompt cache"),
    (PromptPrefix, "cache", "copies of the prompt cache"),
    (choosing, "truncate", "top-k and log-softmax"),
    (tilted_path, "truncate", "top-k and log-softmax"),
    (reference_module, "truncate", "top-k and log-softmax"),
    (choosing, "gumbel_noise", "noise"),
    (implicit_policy, "gumbel_noise", "noise"),
    (tilted_step, "ends_here", "noise"),
    (tilted_step, "_noise", "noise"),
    (TiltedPath, "calibrate", "tilt: calibration"),
    (tilted_step, "_tilted", "tilt: each token"),
    (implicit_policy, "move_particles", "flow around the value"),
)


def profile_stages(models: CostModels, arm: Arm) -> dict[str, Any]:
    """Profile one run of an arm, after one that is not counted.

    Returns:
        The share of each stage in the processor time, largest first, the three largest, the seconds profiled, and how
        much longer the run took than without the profiler.
    """
    models.answer(arm)
    started = time.perf_counter()
    models.answer(arm)
    plain = time.perf_counter() - started
    run = _named(models.answer, _OTHER)
    with named_stages(models), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(arm)
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if (stage := _stage(event)) is not None:
            totals[stage] += event.self_cpu_time_total / 1e6
    seconds = sum(totals.values())
    ordered = sorted(totals, key=lambda stage: -totals[stage])
    return {
        "arm": arm.name,
        "shares": {stage: round(totals[stage] / seconds, 4) for stage in ordered},
        "largest": [f"{stage} {totals[stage] / seconds:.0%}" for stage in ordered[:3]],
        "seconds": round(seconds, 4),
        "over_unprofiled": round(seconds / plain, 3),
    }


@contextmanager
def named_stages(models: CostModels) -> Iterator[None]:
    """Put the stages' names around the calls that they stand for."""
    of_models = (
        (models.model, "forward", _REFERENCE),
        (models.model.get_output_embeddings(), "forward", "reference: logits"),
        (models.value, "score_with_hidden", "value"),
    )
    with ExitStack() as stack:
        for owner, attribute, stage in (*_CALLS, *of_models):
            stack.enter_context(patch.object(owner, attribute, _named(getattr(owner, attribute), stage)))
        yield


def prompt_cache(models: CostModels, arm: Arm) -> dict[str, dict[str, float]]:
    """Count the tokens that go through both models for one prompt.

    Returns:
        For "reference" and "value": the prompt's tokens, tokens fed in all, those of them at a place of the prompt,
        the latter over the prompt's tokens, and the same without the prompt's last token, which the reference is given
        again with every response, because it answers with the logits of the first response token.
    """
    one = CostModels(**{**vars(models), "prompts": models.prompts[:1]})
    bodies = {"reference": one.model.base_model, "value": one.value.body}
    places: dict[str, list[torch.Tensor]] = {name: [] for name in bodies}
    with ExitStack() as stack:
        for name, body in bodies.items():

            def count(module: Any, inputs: Any, keywords: dict[str, Any], taken: list = places[name]) -> None:
                found = keywords["input_ids"] if "input_ids" in keywords else keywords["inputs_embeds"]
                taken.append(keywords["position_ids"].expand(found.shape[:2]).flatten())

            stack.callback(body.register_forward_pre_hook(count, with_kwargs=True).remove)
        one.answer(arm)
    length = len(one.prompts[0])
    counts = {}
    for name, taken in places.items():
        fed = torch.cat(taken)
        of_prompt = int((fed < length).sum())
        counts[name] = {
            "prompt_tokens": length,
            "tokens_fed": len(fed),
            "prompt_tokens_fed": of_prompt,
            "prompt_tokens_fed_over_prompt_tokens": round(of_prompt / length, 3),
            "times_processed_but_last_token": round(int((fed < length - 1).sum()) / (length - 1), 3),
        }
    return counts


def _named(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + stage):
            return function(*args, **kwargs)

    return inside


def _stage(event: Any) -> str | None:
    """Return the innermost stage around an operation, that of the reference's layers split by kind; None outside."""
    names = []
    while event is not None and not event.name.startswith(_MARK):
        names.append(event.name)
        event = event.cpu_parent
    if event is None:
        return None
    stage = event.name.removeprefix(_MARK)
    if stage != _REFERENCE:
        return stage
    if any("scaled_dot_product" in name for name in names):
        return "reference: attention"
    if any(name in ("aten::linear", "aten::matmul") for name in names):
        return "reference: matmuls of the layers"
    return "reference: rest of the layers"

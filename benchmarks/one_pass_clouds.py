"""Clouds of the one-pass comparison: what each arm writes to a task's prompts, and how it is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.one_pass_directions import directions, written_by
from reward_models.directions.ground import Ground, load_ground
from reward_models.directions.reward import ModelReward, TextPrompt
from reward_models.directions.settings import DirectionScript
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.answering.pipeline import load_gradient
from vgf_llm.console.progress import track
from vgf_llm.data.prompts import load_prompt_texts
from vgf_llm.evaluation.measures import nll_per_token
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.files import append_jsonl, check_writable, read_jsonl
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.stream import Steering, StreamSampler

NATS, TOKEN_CAP, PARTICLES, PROMPTS_AT_ONCE = (1.0, 2.0, 4.0), 1.0, 8, 4
CALIBRATION_PROMPTS, CALIBRATION_TEXTS, SEED = 8, 4, 0
Row = dict[str, Any]
Write = Callable[[list[TextPrompt], Tensor], tuple[Any, Tensor]]
"""(prompts, seeds_BN) -> the cloud's responses and their nats [B, N]."""


@dataclass(frozen=True)
class Task:
    """A reward, the prompts it is tried on, and a held-out score where there is one.

    Attributes:
        reward: Folder of a reward model, or a reward function.
        prompts: File of test prompts.
        fitted_on: File of other prompts, which steering is measured on.
        gold: Name of a reward function; None for none.
        tokens: Longest response.
    """

    reward: str
    prompts: str
    fitted_on: str
    gold: str | None
    tokens: int

    def is_there(self) -> bool:
        """Return whether the reward can be asked: functions can."""
        return ":" in self.reward or Path(self.reward).is_dir()


def run_task(task: Task, work: Path, arguments: argparse.Namespace) -> list[Row]:
    """Return a row for every arm and prompt; those in the work folder are not run again."""
    path = work / "rows.jsonl"
    check_writable(str(work))
    ground = load_ground(
        DirectionScript(
            kind="table",
            reward=task.reward,
            gold=task.gold,
            prompts=task.prompts,
            validation_prompts=task.fitted_on,
            dtype="float32",
        ),
        SamplingSettings(top_k=50, max_new_tokens=task.tokens),
    )
    fitted = folder_of(task, work)
    marks = written_by(task.reward, fitted, arguments.directions)
    done = (
        [row for row in read_jsonl(path) if row["mark"] == marks.get(direction_of(row["arm"]))] if path.exists() else []
    )
    known = {(row["arm"], row["prompt"]) for row in done}
    prompts = ground.encode(load_prompt_texts(task.prompts)[: arguments.prompts])
    for name, write in arms(ground, task, fitted, arguments.directions).items():
        todo = [index for index in range(len(prompts)) if (name, index) not in known]
        batches = [todo[start : start + PROMPTS_AT_ONCE] for start in range(0, len(todo), PROMPTS_AT_ONCE)]
        for batch in track(batches, f"{work.name}: {name}"):
            rows = _rows(ground, name, write, [prompts[index] for index in batch], batch)
            rows = [{**row, "mark": marks[direction_of(name)]} for row in rows]
            append_jsonl(path, rows)
            done += rows
    return [row for row in done if row["prompt"] < len(prompts)]


def folder_of(task: Task, work: Path) -> Path:
    """Return the folder whose ``directions`` were fitted to the task's reward: the model's own, or the work folder."""
    return Path(task.reward) if Path(task.reward).is_dir() else work


def direction_of(arm: str) -> str:
    """Return an arm's name without its nats."""
    return arm.rsplit(" ", 1)[0]


def arms(ground: Ground, task: Task, fitted: Path, names: Sequence[str]) -> dict[str, Write]:
    """Return how each arm writes a cloud, by name; ``<direction> <nats>`` but for plain samples."""
    sampler = ReferenceSampler(ground.reference)
    found: dict[str, Write] = {
        "plain": lambda prompts, seeds_BN: (sampler.sample(prompts, seeds_BN), torch.zeros(seeds_BN.shape))
    }
    if "prior" in names and isinstance(ground.reward, ModelReward):
        found |= {f"prior {nats:g}": _two_passes(ground, task, nats) for nats in NATS}
    seeds_BN = row_seeds(SEED + 1, list(range(CALIBRATION_PROMPTS)), CALIBRATION_TEXTS)
    others = ground.encode(load_prompt_texts(task.fitted_on)[:CALIBRATION_PROMPTS])
    for name, source in directions(ground, task.reward, fitted, names).items():
        stream = StreamSampler(ground.reference, source, Steering(0.0, TOKEN_CAP)).calibrated(others, seeds_BN)
        found |= {f"{name} {nats:g}": _one_pass(stream.at(nats)) for nats in NATS}
    return found


def _one_pass(stream: StreamSampler) -> Write:
    def write(prompts: list[TextPrompt], seeds_BN: Tensor) -> tuple[Any, Tensor]:
        streamed = stream.stream(prompts, seeds_BN)
        return streamed.responses, streamed.nats_BN

    return write


def _two_passes(ground: Ground, task: Task, nats: float) -> Write:
    assert isinstance(ground.reward, ModelReward)
    budget, value = TransportBudget(nats=nats, max_token_nats=TOKEN_CAP), ground.reward.value
    policy = make_policy(ImplicitPolicy, ground.reference, value, budget, gradient=load_gradient(task.reward, value))

    def write(prompts: list[TextPrompt], seeds_BN: Tensor) -> tuple[Any, Tensor]:
        outcome = policy(prompts, seeds_BN)
        return outcome.transported, outcome.nats_BN

    return write


def _rows(ground: Ground, name: str, write: Write, prompts: list[TextPrompt], indices: list[int]) -> list[Row]:
    """Write and measure the clouds of a few prompts."""
    responses, nats_BN = write(prompts, row_seeds(SEED, indices, PARTICLES))
    measured = {"values": ground.reward, "gold": ground.gold}
    scores = {
        key: reward.score(reward.prefix(prompts), responses.tokens_BNT, responses.mask_BNT)
        for key, reward in measured.items()
        if reward is not None
    }
    scores |= {"nats": nats_BN, "nll": nll_per_token(ground.reference, ground.reference.prefix(prompts), responses)}
    texts = responses.texts(ground.tokenizer)
    return [
        {
            "arm": name,
            "prompt": index,
            **{key: _rounded(found_BN[b]) for key, found_BN in scores.items()},
            "texts": texts[b],
        }
        for b, index in enumerate(indices)
    ]


def _rounded(values_N: Tensor) -> list[float]:
    return [round(value, 5) for value in values_N.detach().double().tolist()]

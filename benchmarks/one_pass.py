"""One pass against two: clouds of eight under every direction at equal nats, and what they cost beside plain sampling.

    python -m benchmarks.one_pass [--tasks relevance sentiment] [--record]

Quality, per task: eight texts to each prompt by plain sampling, by two-pass ``prior`` and by ``stream`` under each
direction, at 1, 2 and 4 nats with a cap of 1 nat per token; the same prompts and seeds for all. Given are the mean of
the value over a cloud less that of plain samples, the same of the held-out score, the likelihood lost, and

    eta = gain / (sigma sqrt(2 nats)),

with sigma the spread of plain samples to a prompt and nats those that were really spent. ``gain_per_nat_ratio`` is a
direction's gain over two-pass ``prior``'s at the same spent nats (between budgets, gains are read off linearly in
sqrt(nats), and where ``prior`` gains nothing there is no ratio). Intervals are paired bootstraps over prompts. A task
whose reward model is absent is skipped with a word. ``picked`` is the held-out score of the text with the highest value in
a cloud, less that of the same number of plain samples.

Speed: `benchmarks.one_pass_speed`. Texts are appended to ``--work`` prompt by prompt; a run that was stopped goes on.
Texts of other weights, or of a direction that was fitted again since, are left out and written again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.one_pass_directions import directions, written_by
from benchmarks.one_pass_speed import measure
from reward_models.functions import call_function, load_function
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.answering.pipeline import Pipeline, load_pipeline
from vgf_llm.console.progress import track
from vgf_llm.data.prompts import encode_prompt, load_prompts
from vgf_llm.evaluation.measures import nll_per_token
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import append_jsonl, check_writable, read_jsonl, write_json_atomic
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.statistics.intervals import bootstrap_mean
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.protocols import Reference
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.stream import Steering, StreamSampler

RECORD = Path("docs/results/one_pass.json")
NATS, TOKEN_CAP, PARTICLES, PROMPTS_AT_ONCE = (1.0, 2.0, 4.0), 1.0, 8, 4
CALIBRATION_PROMPTS, CALIBRATION_TEXTS, SEED = 8, 4, 0
Row = dict[str, Any]
Write = Callable[[list[list[int]], Tensor], tuple[Any, Tensor]]
"""(prompts, seeds_BN) -> the cloud's responses and their nats [B, N]."""


@dataclass(frozen=True)
class Task:
    """A reward model, the prompts it is tried on, and a held-out score where there is one.

    Attributes:
        reward: Folder of the reward model.
        prompts: File of test prompts.
        fitted_on: File of other prompts, which directions and steering are fitted on.
        gold: Name of a reward function; "" for none.
        tokens: Longest response.
    """

    reward: str
    prompts: str
    fitted_on: str
    gold: str
    tokens: int


_SENTENCES = "recipes/smollm2_sentiment/data"
_DIALOGUES = "outputs/smollm2_dialogue"
TASKS = {
    "sentiment": Task(
        "outputs/smollm2_sentiment/reward",
        f"{_SENTENCES}/prompts_test.jsonl",
        f"{_SENTENCES}/prompts_validation.jsonl",
        "vader_compound",
        24,
    ),
    "dialogues": Task(
        f"{_DIALOGUES}/reward",
        f"{_DIALOGUES}/data/prompts_test.jsonl",
        f"{_DIALOGUES}/data/prompts_validation.jsonl",
        "",
        32,
    ),
    "relevance": Task(
        "outputs/smollm2_context/relevance",
        f"{_SENTENCES}/prompts_test.jsonl",
        f"{_SENTENCES}/prompts_validation.jsonl",
        "",
        24,
    ),
    "order": Task(
        "outputs/smollm2_context/order",
        f"{_SENTENCES}/prompts_test.jsonl",
        f"{_SENTENCES}/prompts_validation.jsonl",
        "",
        24,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and print one line of JSON."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.record:
        check_writable(str(RECORD.parent))
    quality = {}
    for name in arguments.tasks:
        if not Path(TASKS[name].reward).is_dir():
            print(f"{name}: skipped, '{TASKS[name].reward}' is not there; train it first", file=sys.stderr)
            continue
        rows = run_task(TASKS[name], Path(arguments.work, name), arguments)
        quality[name] = summary(rows)
        for arm, figures in quality[name]["arms"].items():
            print(f"{name:10} {arm:28} {figures}", file=sys.stderr)
    speed = {} if arguments.no_speed else measured_speed(arguments)
    arms_by_task = {name: found["arms"] for name, found in quality.items()}
    result = {
        "one_pass_over_sampling_time": speed.get("over_sampling_time", {}),
        "gain_per_nat_ratio": {task: _pick(arms, "gain_per_nat_ratio") for task, arms in arms_by_task.items()},
        "eta": {task: _pick(arms, "eta") for task, arms in arms_by_task.items()},
    }
    if arguments.record:
        command = "python -m benchmarks.one_pass " + " ".join(sys.argv[1:] if argv is None else argv)
        record = {**result, "quality": quality, "speed": speed, "hardware": hardware(), "command": command.strip()}
        write_json_atomic(RECORD, record)
    print(json.dumps(result))
    return 0


def run_task(task: Task, work: Path, arguments: argparse.Namespace) -> list[Row]:
    """Return a row for every arm and prompt; those in the work folder are not run again."""
    path = work / "rows.jsonl"
    check_writable(str(work))
    sampling = SamplingSettings(top_k=50, max_new_tokens=task.tokens)
    pipeline = load_pipeline(ModelSettings(reward_model=task.reward, dtype="float32"), sampling)
    marks = written_by(Path(task.reward), arguments.directions)
    done = [row for row in read_jsonl(path) if row["mark"] == marks.get(_direction(row["arm"]))] if path.exists() else []
    known = {(row["arm"], row["prompt"]) for row in done}
    prompts = load_prompts(task.prompts)[: arguments.prompts]
    fitted = [encode_prompt(pipeline.tokenizer, prompt) for prompt in load_prompts(task.fitted_on)]
    for name, write in arms(pipeline, fitted, task, arguments.directions).items():
        todo = [index for index in range(len(prompts)) if (name, index) not in known]
        batches = [todo[start : start + PROMPTS_AT_ONCE] for start in range(0, len(todo), PROMPTS_AT_ONCE)]
        for batch in track(batches, f"{work.name}: {name}"):
            rows = _rows(pipeline, task, name, write, [prompts[index] for index in batch], batch)
            rows = [{**row, "mark": marks[_direction(name)]} for row in rows]
            append_jsonl(path, rows)
            done += rows
    return [row for row in done if row["prompt"] < len(prompts)]


def arms(pipeline: Pipeline[Any], fitted: list[list[int]], task: Task, names: Sequence[str]) -> dict[str, Write]:
    """Return how each arm writes a cloud, by name; ``<direction> <nats>`` but for plain samples."""
    reference, sampler = pipeline.reference, ReferenceSampler(pipeline.reference)
    found: dict[str, Write] = {
        "plain": lambda prompts, seeds_BN: (sampler.sample(prompts, seeds_BN), torch.zeros(seeds_BN.shape))
    }
    for nats in NATS:
        if "prior" in names:
            found[f"prior {nats:g}"] = _two_passes(pipeline, nats)
    seeds_BN = row_seeds(SEED + 1, list(range(CALIBRATION_PROMPTS)), CALIBRATION_TEXTS)
    for name, source in directions(pipeline, Path(task.reward), names).items():
        stream = StreamSampler(reference, source, Steering(0.0, TOKEN_CAP))
        stream = stream.calibrated(fitted[:CALIBRATION_PROMPTS], seeds_BN)
        for nats in NATS:
            found[f"{name} {nats:g}"] = _one_pass(stream.at(nats))
    return found


def _one_pass(stream: StreamSampler) -> Write:
    def write(prompts: list[list[int]], seeds_BN: Tensor) -> tuple[Any, Tensor]:
        streamed = stream.stream(prompts, seeds_BN)
        return streamed.responses, streamed.nats_BN

    return write


def _two_passes(pipeline: Pipeline[Any], nats: float) -> Write:
    budget = TransportBudget(nats=nats, max_token_nats=TOKEN_CAP)
    policy = make_policy(ImplicitPolicy, pipeline.reference, pipeline.value, budget, gradient=pipeline.gradient)

    def write(prompts: list[list[int]], seeds_BN: Tensor) -> tuple[Any, Tensor]:
        outcome = policy(prompts, seeds_BN)
        return outcome.transported, outcome.nats_BN

    return write


def _rows(
    pipeline: Pipeline[Any], task: Task, name: str, write: Write, prompts: Sequence[Any], indices: list[int]
) -> list[Row]:
    """Write and measure the clouds of a few prompts."""
    ids = [encode_prompt(pipeline.tokenizer, prompt) for prompt in prompts]
    responses, nats_BN = write(ids, row_seeds(SEED, indices, PARTICLES))
    reference: Reference = pipeline.reference
    values_BN = pipeline.value.score(pipeline.value.prefix(ids), responses.tokens_BNT, responses.mask_BNT)
    nll_BN = nll_per_token(reference, reference.prefix(ids), responses)
    texts = responses.texts(pipeline.tokenizer)
    rows = []
    for b, index in enumerate(indices):
        row = {
            "arm": name,
            "prompt": index,
            "values": _rounded(values_BN[b]),
            "nats": _rounded(nats_BN[b]),
            "nll": _rounded(nll_BN[b]),
            "texts": texts[b],
        }
        if task.gold:
            asked = [str(prompts[b])] * PARTICLES
            row["gold"] = [round(g, 4) for g in call_function(load_function(task.gold), asked, texts[b])]
        rows.append(row)
    return rows


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return sigma and the figures of every arm."""
    by_arm: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["prompt"]] = row
    plain = by_arm["plain"]
    sigma = math.sqrt(statistics.fmean(statistics.variance(row["values"]) for row in plain.values()))
    found = {name: _figures(own, plain, sigma) for name, own in by_arm.items() if name != "plain"}
    of_prior = [figures for name, figures in found.items() if _direction(name) == "prior"]
    prior_gains = bool(of_prior) and all(figures["gain"][1] > 0 for figures in of_prior)  # else a ratio says nothing
    for name, figures in found.items():
        if _direction(name) != "prior" and prior_gains and (two := _gain_at(found, "prior", figures["nats"])):
            figures["gain_per_nat_ratio"] = round(figures["gain"][0] / two, 3)
    return {"prompts": len(plain), "texts_per_prompt": PARTICLES, "sigma": round(sigma, 4), "arms": found}


def _figures(own: dict[int, Row], plain: dict[int, Row], sigma: float) -> dict[str, Any]:
    prompts = sorted(own.keys() & plain.keys())

    def difference(key: str) -> list[float]:
        return [statistics.fmean(own[p][key]) - statistics.fmean(plain[p][key]) for p in prompts]

    gain = bootstrap_mean(difference("values"))
    nats = statistics.fmean(statistics.fmean(own[p]["nats"]) for p in prompts)
    unit = sigma * math.sqrt(2 * max(nats, 1e-9))
    figures: dict[str, Any] = {
        "nats": round(nats, 3),
        "gain": [round(x, 4) for x in (gain.mean, gain.low, gain.high)],
        "eta": [round(x / unit, 3) for x in (gain.mean, gain.low, gain.high)],
        "nll": round(bootstrap_mean(difference("nll")).mean, 3),
    }
    if all("gold" in own[p] and "gold" in plain[p] for p in prompts):
        gold = bootstrap_mean(difference("gold"))
        figures["gold"] = [round(x, 4) for x in (gold.mean, gold.low, gold.high)]
        picked = bootstrap_mean([_picked(own[p]) - _picked(plain[p]) for p in prompts])
        figures["picked"] = [round(x, 4) for x in (picked.mean, picked.low, picked.high)]
    return figures


def _picked(row: Row) -> float:
    """Return the held-out score of the text with the highest value."""
    found: float = row["gold"][max(range(len(row["values"])), key=row["values"].__getitem__)]
    return found


def _direction(arm: str) -> str:
    """Return an arm's name without its nats."""
    return arm.rsplit(" ", 1)[0]


def _gain_at(found: dict[str, dict[str, Any]], direction: str, nats: float) -> float | None:
    """Return a direction's gain at ``nats`` spent, read off its budgets linearly in sqrt(nats), from 0 at 0."""
    points = [(0.0, 0.0)]
    points += sorted(
        (math.sqrt(figures["nats"]), figures["gain"][0])
        for name, figures in found.items()
        if _direction(name) == direction
    )
    if len(points) == 1:
        return None
    x = math.sqrt(nats)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1 or (x1, y1) == points[-1]:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-9)
    return None


def measured_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the embedded base alone and time the arms."""
    from vgf_llm.models.loading import load_causal_lm, load_tokenizer

    tokenizer, model = load_tokenizer(), load_causal_lm(dtype=torch.float32)
    prompts = [encode_prompt(tokenizer, row) for row in load_prompts(f"{_SENTENCES}/prompts_test.jsonl")[:8]]
    return measure(model, prompts, tokenizer.pad_token_id, arguments.rows, arguments.tokens, arguments.turns)


def _pick(arms_of_task: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    found = {name: figures[key] for name, figures in arms_of_task.items() if key in figures}
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def _rounded(values_N: Tensor) -> list[float]:
    return [round(value, 5) for value in values_N.detach().double().tolist()]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_pass", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), help="what is written")
    parser.add_argument(
        "--directions",
        nargs="+",
        default=["prior", "table", "constant", "causal", "distilled", "lookahead"],
        help="arms beside plain samples",
    )
    parser.add_argument("--prompts", type=int, default=40, help="test prompts of each task")
    parser.add_argument("--no-speed", action="store_true", help="leave out the timing")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64], help="texts side by side that are timed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 128], help="lengths that are timed")
    parser.add_argument("--turns", type=int, default=5, help="timed turns")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--work", default="outputs/one_pass", help="folder for the texts")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD} too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

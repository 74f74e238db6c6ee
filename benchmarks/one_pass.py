"""One pass against two: clouds of eight under every direction at equal nats, and what they cost beside plain sampling.

    python -m benchmarks.one_pass [--tasks relevance sentiment] [--record]

Quality, per task: eight texts to each prompt by plain sampling, by two-pass ``prior`` and by ``stream`` under each
direction, at 1, 2 and 4 nats with a cap of 1 nat per token; the same prompts and seeds for all. Given are the mean of
the value over a cloud less that of plain samples, the same of the held-out score, the likelihood lost, and

    eta = gain / (sigma sqrt(2 nats)),

with sigma the spread of plain samples to a prompt and nats those that were really spent. ``gain_per_nat_ratio`` is a
direction's gain over two-pass ``prior``'s at the same spent nats (between budgets, gains are read off linearly in
sqrt(nats), and where ``prior`` gains nothing there is no ratio). Intervals are paired bootstraps over prompts. A task
whose reward model is absent is skipped with a word. ``best`` is the highest value in a cloud less the highest of plain
samples, ``picked`` the held-out score of the text with the highest value in
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.one_pass_clouds import PARTICLES, Row, Task, direction_of, run_task
from benchmarks.one_pass_speed import measure
from vgf_llm.data.prompts import encode_prompt, load_prompts
from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.statistics.intervals import bootstrap_mean

RECORD = Path("docs/results/one_pass.json")
_SENTENCES, _DIALOGUES = "recipes/smollm2_sentiment/data", "outputs/smollm2_dialogue"
_TOPICS = f"{_SENTENCES}/prompts_test.jsonl", f"{_SENTENCES}/prompts_validation.jsonl"
_TALKS = f"{_DIALOGUES}/data/prompts_test.jsonl", f"{_DIALOGUES}/data/prompts_validation.jsonl"
TASKS = {
    "sentiment": Task("outputs/smollm2_sentiment/reward", *_TOPICS, "vader_compound", 24),
    "dialogues": Task(f"{_DIALOGUES}/reward", *_TALKS, "recipes.smollm2_dialogue.gold:held_out", 32),
    "relevance": Task("outputs/smollm2_context/relevance", *_TOPICS, None, 24),
    "order": Task("outputs/smollm2_context/order", *_TOPICS, None, 24),
    "two_sentences": Task("recipes.constraints.rewards:two_sentences", *_TOPICS, None, 24),
    "question": Task("recipes.constraints.rewards:question_at_the_end", *_TOPICS, None, 24),
    "no_e": Task("recipes.constraints.rewards:words_without_e", *_TOPICS, None, 24),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and print one line of JSON."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.record:
        check_writable(str(RECORD.parent))
    quality = {}
    for name in arguments.tasks:
        if not TASKS[name].is_there():
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


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return sigma and the figures of every arm."""
    by_arm: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["prompt"]] = row
    plain = by_arm["plain"]
    sigma = math.sqrt(statistics.fmean(statistics.variance(row["values"]) for row in plain.values()))
    found = {name: _figures(own, plain, sigma) for name, own in by_arm.items() if name != "plain"}
    of_prior = [figures for name, figures in found.items() if direction_of(name) == "prior"]
    prior_gains = bool(of_prior) and all(figures["gain"][1] > 0 for figures in of_prior)  # else a ratio says nothing
    for name, figures in found.items():
        if direction_of(name) != "prior" and prior_gains and (two := _gain_at(found, "prior", figures["nats"])):
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
    best = bootstrap_mean([max(own[p]["values"]) - max(plain[p]["values"]) for p in prompts])
    figures["best"] = [round(x, 4) for x in (best.mean, best.low, best.high)]
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


def _gain_at(found: dict[str, dict[str, Any]], direction: str, nats: float) -> float | None:
    """Return a direction's gain at ``nats`` spent, read off its budgets linearly in sqrt(nats), from 0 at 0."""
    points = [(0.0, 0.0)]
    points += sorted(
        (math.sqrt(figures["nats"]), figures["gain"][0])
        for name, figures in found.items()
        if direction_of(name) == direction
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

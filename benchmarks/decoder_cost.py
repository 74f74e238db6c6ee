"""What a transported response costs: seconds, counted FLOPs, memory, how they grow, and where the time goes.

    python -m benchmarks.decoder_cost [--record] [--reward_model outputs/smollm2_sentiment/reward]
        [--decoders prior,pivot,...] [--repetitions 3] [--dtype bfloat16] [--prompts 1] [--tiny]

decoders      every decoder with its budget of the bake-off (at level 32) and N = 8 particles of T = 24 tokens, from
              prompt to selected response: seconds and TFLOP a response (N times the draws are written), seconds over
              those of plain sampling of as many responses, timed beside it, and the peak of tensor memory that a run
              allocates on top of the weights (all tensor allocations, summed up from torch's memory profile; of two
              rounds at most, after which it does not grow)
growth        seconds and TFLOP a prompt of ``prior`` as N, T, the flow steps L or the vocabulary V grow, one at a time
              around N = 8, T = 24, L = 1, with the slope of log cost over log size. The model has one V, so those
              points are of SmolLM2's shape with 4 layers, random weights and the exact gradient
profile       processor time of ``prior`` with 3 draws by stage (``benchmarks/decoder_profile.py``)
prompt_cache  prompt tokens that went through each model over the prompt's tokens

Responses never end before T tokens. Arms run one after the other in turning order; medians over the repetitions, after
one that is not counted, with their quartiles. The last line of standard output is one JSON object; ``--record`` writes
it to docs/results/decoder_cost.json. On a shared machine set OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cost_models import (
    PARTICLES,
    SMOLLM2,
    TINY,
    TINY_TOKENS,
    TOKENS,
    CostModels,
    cost_arms,
    random_models,
    real_models,
)
from benchmarks.decoder_profile import profile_stages, prompt_cache
from benchmarks.transport import peak_bytes
from vgf_llm.cli import run_main
from vgf_llm.evaluation.arms import Arm
from vgf_llm.machine.facts import hardware
from vgf_llm.machine.precision import choose_dtype
from vgf_llm.runs.files import check_writable, write_json_atomic

DECODERS = "prior,block,pivot,edit,edit_greedy,nearest"
GROWTH = {"N": (4, 8, 16, 32), "T": (8, 16, 32), "L": (1, 2, 4)}
VOCABULARIES, TINY_VOCABULARIES = (8192, 16384, 49152), (64, 128, 256)


def decoder_costs(models: CostModels, arms: list[Arm], repetitions: int) -> dict[str, dict[str, Any]]:
    """Time every arm beside plain sampling of as many responses.

    Args:
        models: What to run.
        arms: Arms to time, best-of-N first.
        repetitions: Measured rounds of all arms, at least 1, after one that is not counted.

    Returns:
        For "sampling" (N plain samples) and every arm: responses a prompt, seconds and TFLOP a response,
        seconds over sampling, peak memory in MiB. Seconds and their ratio are quartiles, the median in the middle.
    """
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    plain: dict[str, list[float]] = {arm.name: [] for arm in arms}
    tflops: dict[str, float] = {}
    for repetition in range(-1, repetitions):
        for index in range(len(arms)):
            arm = arms[(index + repetition) % len(arms)]
            works = [
                (seconds, lambda arm=arm: models.answer(arm)),
                (plain, lambda arm=arm: models.sample(_responses(arm))),
            ]
            for taken, work in works if repetition % 2 else reversed(works):
                elapsed, outcome = timed(work)
                if taken is seconds:
                    tflops[arm.name] = models.tflops(arm, outcome)
                if repetition >= 0:
                    taken[arm.name].append(elapsed)
        print(f"decoders: {repetition + 1} of {repetitions} repetitions", file=sys.stderr)
    particles = arms[0].num_particles
    count = particles * len(models.prompts)
    of_base = [one for arm in arms if _responses(arm) == particles for one in plain[arm.name]]
    costs: dict[str, dict[str, Any]] = {
        "sampling": {
            "responses": particles,
            "seconds_a_response": quartiles([one / count for one in of_base]),
            "tflop_a_response": digits(models.sampling_tflops(models.sample(particles)) / count),
            "peak_mib": _peak_mib(lambda: models.sample(particles)),
        }
    }
    for arm in arms:
        count = _responses(arm) * len(models.prompts)
        over = [one / other for one, other in zip(seconds[arm.name], plain[arm.name], strict=True)]
        costs[arm.name] = {
            "responses": _responses(arm),
            "rounds": arm.transport.rounds,
            "seconds_a_response": quartiles([one / count for one in seconds[arm.name]]),
            "seconds_over_sampling": quartiles(over),
            "tflop_a_response": digits(tflops[arm.name] / count),
            "peak_mib": _peak_mib(lambda arm=arm: models.answer(_two_rounds(arm))),
        }
    return costs


def growth(models: CostModels, by_vocabulary: dict[int, CostModels], arm: Arm, repetitions: int) -> dict[str, Any]:
    """Time one arm as one factor at a time grows.

    Args:
        models: What N, T and L are varied on.
        by_vocabulary: Models that differ in V alone.
        arm: The arm in the middle.
        repetitions: Measured rounds of all points, at least 1, after one that is not counted.

    Returns:
        For each factor: its sizes, seconds (quartiles) and TFLOP a prompt, and the exponents of both.
    """
    points: dict[tuple[str, int], tuple[CostModels, Arm, int | None]] = {}
    for factor, sizes in GROWTH.items():
        for size in sizes:
            changes: dict[str, Any] = {"N": {"num_particles": size}, "T": {}}.get(
                factor, {"budget": replace(arm.transport, steps=size)}
            )
            points[factor, size] = (models, replace(arm, **changes), size if factor == "T" else None)
    points |= {("V", size): (found, arm, None) for size, found in by_vocabulary.items()}
    names, seconds, tflops = list(points), {name: [] for name in points}, {}
    for repetition in range(-1, repetitions):
        for index in range(len(names)):
            name = names[(index + repetition) % len(names)]
            of, one, tokens = points[name]
            elapsed, outcome = timed(lambda of=of, one=one, tokens=tokens: of.answer(one, tokens))
            tflops[name] = of.tflops(one, outcome) / len(of.prompts)
            if repetition >= 0:
                seconds[name].append(elapsed / len(of.prompts))
        print(f"growth: {repetition + 1} of {repetitions} repetitions", file=sys.stderr)
    found: dict[str, Any] = {}
    for factor in dict.fromkeys(factor for factor, _ in names):
        own = [name for name in names if name[0] == factor]
        sizes = [size for _, size in own]
        found[factor] = {
            "sizes": sizes,
            "seconds_a_prompt": [quartiles(seconds[name]) for name in own],
            "tflop_a_prompt": [digits(tflops[name]) for name in own],
            "seconds_exponent": exponent(sizes, [statistics.median(seconds[name]) for name in own]),
            "tflop_exponent": exponent(sizes, [tflops[name] for name in own]),
        }
    return found


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Return the least-squares slope of log cost over log size: 1 is linear growth."""
    return round(statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope, 3)


def quartiles(values: list[float]) -> list[float]:
    """Return lower quartile, median and upper quartile."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [digits(one) for one in found]


def digits(value: float) -> float:
    """Return four significant digits."""
    return float(f"{value:.4g}")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall seconds of ``work``, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark and return the figures of the JSON line."""
    started = time.perf_counter()
    if arguments.tiny:
        shape, layers, dtype, vocabularies, tokens = TINY, 2, "float32", TINY_VOCABULARIES, TINY_TOKENS
        models = random_models(TINY, 64, layers=2, dtype=dtype, prompts=arguments.prompts, tokens=tokens)
    else:
        shape, layers, dtype, vocabularies, tokens = SMOLLM2, 4, arguments.dtype, VOCABULARIES, TOKENS
        models = real_models(arguments)
    by_vocabulary = {v: random_models(shape, v, layers=layers, dtype=dtype, tokens=tokens) for v in vocabularies}
    arms = cost_arms([name for name in arguments.decoders.split(",") if name], models.alpha)
    prior = {arm.draws: arm for arm in cost_arms(["prior"], models.alpha)[1:]}
    return {
        "decoders": decoder_costs(models, arms, arguments.repetitions),
        "growth": growth(models, by_vocabulary, prior[1], arguments.repetitions),
        "profile": profile_stages(models, prior[3]),
        "prompt_cache": prompt_cache(models, prior[3]),
        "setting": {
            "model": "tiny, random weights" if arguments.tiny else "default",
            "reward_model": None if arguments.tiny else arguments.reward_model,
            "dtype": dtype,
            "prompts": len(models.prompts),
            "prompt_tokens": [len(prompt) for prompt in models.prompts],
            "particles": PARTICLES,
            "response_tokens": tokens,
            "vocabulary_layers": layers,
            "repetitions": arguments.repetitions,
        },
        "hardware": hardware()
        | {
            "load_average": round(os.getloadavg()[0], 2),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        },
        "command": " ".join(["python -m benchmarks.decoder_cost", *sys.argv[1:]]),
        "wall_sec": round(time.perf_counter() - started, 1),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Cost of a transported response.")
    parser.add_argument("--reward_model", default="outputs/smollm2_sentiment/reward", help="folder of a reward model")
    parser.add_argument("--decoders", default=DECODERS, help="names, separated by commas")
    parser.add_argument("--repetitions", type=int, default=3, help="measured rounds, each of all arms")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of a batch")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of both models")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of random weights, to try the benchmark")
    parser.add_argument("--record", action="store_true", help="write docs/results/decoder_cost.json too")
    arguments = parser.parse_args(argv)
    if arguments.repetitions < 1 or arguments.prompts < 1:
        parser.error("--repetitions and --prompts must be at least 1")
    arguments.dtype = choose_dtype(arguments.dtype, "cpu")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, record if asked, and print the JSON line; returns the exit code."""
    arguments = parse(argv)
    folder = check_writable("docs/results") if arguments.record else Path()
    result = measure(arguments)
    if arguments.record:
        write_json_atomic(folder / "decoder_cost.json", result)
    print(json.dumps(result))
    return 0


def _responses(arm: Arm) -> int:
    """Texts that an arm writes for a prompt, its originals left out."""
    return arm.num_particles * arm.draws


def _two_rounds(arm: Arm) -> Arm:
    return replace(arm, budget=replace(arm.transport, rounds=min(2, arm.transport.rounds)))


def _peak_mib(work: Callable[[], Any]) -> float:
    return round(peak_bytes(work) / 2**20, 1)


if __name__ == "__main__":
    sys.exit(run_main(main))

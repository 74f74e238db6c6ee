"""The speed of one commit against another, as ratios of processor time in one run.

    python -m benchmarks.before_after --before ../before --after . [--jobs transport train sampling] [--record NAME]

Both are folders of this repository; the interpreter is this one. Commits take turns, so that a machine which is slow
for a while is slow for both. Ratios are after over before, one per turn; their median is given, and their range.

``transport``  a flow step of ``benchmarks.transport``, SmolLM2's shape, in processor seconds.
``train``      an optimiser step of ``vgf_llm.train`` on the embedded model with a learned value, in processor seconds:
               what eight steps take less what two take, over six.
``sampling``   tokens per second of ``benchmarks.sampling``, by what writes them; here more is better.

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import check_writable, write_json_atomic

_RECORDS = "docs/results"
_STEPS = (2, 8)
Figures = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the ratios."""
    arguments = _arguments(argv)
    if arguments.record:
        check_writable(_RECORDS)
    checkouts = {"before": Path(arguments.before).resolve(), "after": Path(arguments.after).resolve()}
    found: dict[str, Any] = {}
    for job in arguments.jobs:
        turns = []
        for turn in range(arguments.turns):
            order = list(checkouts) if turn % 2 == 0 else list(checkouts)[::-1]  # who comes first alternates
            figures = {name: JOBS[job](checkouts[name]) for name in order}
            turns.append(figures)
            print(f"{job}, turn {turn + 1}: {figures}", file=sys.stderr, flush=True)
        found[job] = {name: _ratios(turns, name) for name in turns[0]["before"]}
    record = {
        "ratios": found,
        "commits": {name: _commit(path) for name, path in checkouts.items()},
        "turns": arguments.turns,
        "hardware": hardware(),
        "command": "python -m benchmarks.before_after " + " ".join(sys.argv[1:] if argv is None else argv),
    }
    if arguments.record:
        write_json_atomic(Path(_RECORDS, f"{arguments.record}.json"), record)
    print(json.dumps(record))
    return 0


def _ratios(turns: list[dict[str, Figures]], name: str) -> dict[str, Any]:
    ratios = [figures["after"][name] / figures["before"][name] for figures in turns]
    return {
        "median": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "before": [round(figures["before"][name], 4) for figures in turns],
        "after": [round(figures["after"][name], 4) for figures in turns],
    }


def transport(checkout: Path) -> Figures:
    """Return the processor seconds of a flow step."""
    output, _ = _run(checkout, ["-m", "benchmarks.transport", "--repetitions", "5"])
    spread = json.loads(output.splitlines()[-1])["spread"]["processor_time"]
    return {"flow_step_sec": spread["flow"][1]}


def train(checkout: Path) -> Figures:
    """Return the processor seconds of an optimiser step."""
    spent = []
    for steps in _STEPS:
        with tempfile.TemporaryDirectory() as folder:
            flags = {
                "prompts": "recipes/smollm2_sentiment/data/prompts_train.jsonl",
                "num_prompts": 40,
                "rewards": "vader_compound",
                "value": "learned",
                "max_steps": steps,
                "per_device_train_batch_size": 2,
                "num_particles": 4,
                "logging_steps": 100,
                "dtype": "float32",
                "bf16": "false",
                "output_dir": folder,
            }
            command = [
                "-m",
                "vgf_llm.train",
                *(str(part) for key, value in flags.items() for part in (f"--{key}", value)),
            ]
            spent.append(_run(checkout, command)[1])
    return {"step_sec": (spent[1] - spent[0]) / (_STEPS[1] - _STEPS[0])}


def sampling(checkout: Path) -> Figures:
    """Return tokens per second at 32 sequences."""
    output, _ = _run(checkout, ["-m", "benchmarks.sampling", "--counts", "32", "--repetitions", "2"])
    found: dict[str, float] = json.loads(output.splitlines()[-1])["tokens_per_sec"]["32"]
    return {f"{name}_tokens_per_sec": float(value) for name, value in found.items()}


JOBS: dict[str, Callable[[Path], Figures]] = {"transport": transport, "train": train, "sampling": sampling}


def _run(checkout: Path, command: Sequence[str]) -> tuple[str, float]:
    """Run Python in a checkout; returns its standard output and its processor seconds, its children's included."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=checkout, env=environment, stdout=output, stderr=errors, text=True
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(
                f"{' '.join(command)} in '{checkout}' ended with {process.returncode}: {errors.read()[-2000:]}"
            )
        return output.read(), usage.ru_utime + usage.ru_stime


def _commit(checkout: Path) -> str:
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after", description="Compare two commits.")
    parser.add_argument("--before", required=True, help="folder of the earlier commit")
    parser.add_argument("--after", default=".", help="folder of the later commit")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="what is timed")
    parser.add_argument("--turns", type=int, default=3, help="turns of each job")
    parser.add_argument("--record", default="", help=f"also write {_RECORDS}/<record>.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

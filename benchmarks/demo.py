"""What a new user waits for: ``vgf-llm demo`` timed as a process, on this machine or held to AVX2.

    python -m benchmarks.demo [--record NAME]
    python -m benchmarks.demo --checkout ../before ../after      # folders with a .venv each, one after the other

For every run: ``wall_sec``; ``first_line_sec``, until the first line; ``longest_silence_sec``, between two lines on
either stream; ``peak_rss_gib``, the largest resident memory of the process. Every run starts with an empty
model cache and an empty output folder. ``--held_to avx2`` hides AVX-512, AMX and bfloat16 units from torch, oneDNN and
MKL (MKL obeys on Intel's processors alone, and is very slow where it does not). Standard output ends with the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import check_writable, write_json_atomic

_RECORDS = "docs/results"
_HELD_TO: dict[str, dict[str, str]] = {
    "nothing": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


@dataclass(frozen=True)
class Run:
    """One demo: which commit, how it ended, what was waited for (seconds) and its memory (GiB)."""

    checkout: str
    commit: str
    exit_status: int
    wall_sec: float
    first_line_sec: float
    longest_silence_sec: float
    peak_rss_gib: float
    last_lines: list[str]


def main() -> int:
    """Run the demo in every checkout.

    Returns:
        0, or 1 if a demo failed.
    """
    arguments = _arguments()
    if arguments.record:
        check_writable(_RECORDS)
    runs = [watch(Path(checkout), _HELD_TO[arguments.held_to]) for checkout in arguments.checkout]
    record: dict[str, Any] = {
        "runs": [asdict(run) for run in runs],
        "held_to": arguments.held_to,
        "hardware": hardware(),
        "command": "python -m benchmarks.demo " + " ".join(sys.argv[1:]),
    }
    if arguments.record:
        write_json_atomic(Path(_RECORDS, f"{arguments.record}.json"), record)
    print(json.dumps(record))
    return int(any(run.exit_status for run in runs))


def watch(checkout: Path, environment: dict[str, str]) -> Run:
    """Run ``checkout``'s demo and note when its lines come."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [str(checkout.resolve() / ".venv/bin/vgf-llm"), "demo", "--output_dir", f"{folder}/outputs"]
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=checkout,
            env={**os.environ, **environment, "VGF_LLM_CACHE": f"{folder}/cache", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        times = [started]
        assert process.stdout is not None
        for line in process.stdout:
            times.append(time.monotonic())
            lines.append(line.rstrip().replace(folder, "FOLDER").replace(str(checkout.resolve()), "CHECKOUT"))
            print(f"{times[-1] - started:7.1f} s  {lines[-1]}", file=sys.stderr, flush=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        times.append(time.monotonic())
    return Run(
        checkout=checkout.resolve().name,
        commit=_commit(checkout),
        exit_status=process.returncode,
        wall_sec=times[-1] - started,
        first_line_sec=times[1] - started,
        longest_silence_sec=max(after - before for before, after in zip(times, times[1:], strict=False)),
        peak_rss_gib=usage.ru_maxrss / 2**20,
        last_lines=lines[-30:],
    )


def _commit(checkout: Path) -> str:
    """Return the commit that is checked out."""
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def _arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="Time the demo as a user sees it.")
    parser.add_argument("--checkout", nargs="+", default=["."], help="folders of this repository, with a .venv each")
    parser.add_argument("--held_to", choices=sorted(_HELD_TO), default="nothing", help="hide the units of newer CPUs")
    parser.add_argument("--record", default="", help=f"also write {_RECORDS}/<record>.json")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())

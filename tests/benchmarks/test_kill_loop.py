"""The kill loop on one command of each kind: it kills, continues where it was stopped, and finds a loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill_loop import _look, summarise

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_three_kills_lose_nothing_and_a_second_call_continues(tmp_path):
    def loop(kills):
        flags = ["--kills", str(kills), "--minutes", "8", "--jobs", "reward", "secant", "--folder", str(tmp_path)]
        command = [sys.executable, "-m", "benchmarks.kill_loop", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    first = loop(2)
    assert first["kills"] >= 1 and first["faults"] == []
    rows = (tmp_path / "episodes.jsonl").read_text()
    second = loop(3)
    assert second["kills"] >= 3 and second["faults"] == [] and second["episodes"] > first["episodes"]
    assert (tmp_path / "episodes.jsonl").read_text().startswith(rows)


def test_a_lost_checkpoint_lost_steps_and_a_mixed_result_are_faults(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"mixed")
    (tmp_path / "checkpoint-2").mkdir()
    lost, faults = _look(tmp_path, "reward", {"result": "new", "old": None}, [2, 4], "null")
    assert lost == 3
    for part in ("no manifest", "checkpoint-4 was lost", "neither the old one nor the new one", "3 steps were lost"):
        assert any(part in fault for fault in faults), part
    row = {"job": "reward", "kills": 2, "while_writing": 1, "lost_steps": 3, "faults": faults}
    assert summarise([row])["jobs"]["reward"] == {
        "kills": 2,
        "episodes": 1,
        "kills_while_writing": 1,
        "faults": len(faults),
    }

"""Called rewards in training: columns arrive, components are logged, and a killed run pays for nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.training.launch import ROOT
from tests.training.tiny import settings, tiny_run, write_inputs
from vgf_llm.errors import ModelError
from vgf_llm.runs.files import read_jsonl, write_json_atomic
from vgf_llm.settings.parse import dump
from vgf_llm.training.rewards import NamedReward, Rewards

SEEN: list[tuple[str, str, str]] = []


def exact_match(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """Compare the first word with the row's answer, and note what was asked for."""
    SEEN.extend(zip(prompts, responses, answer, strict=True))
    return [float(response.split()[:1] == [right]) for response, right in zip(responses, answer, strict=True)]


def test_a_rows_answer_decides_its_reward(tmp_path: Path) -> None:
    """Every response is compared with the answer of its own row; what is logged is what that gives."""
    write_inputs(tmp_path)
    rows = [{"prompt": f"write about the {noun}", "answer": word} for noun, word in (("sea", "blue"), ("dog", "red"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = f'{{reward: "{__name__}:exact_match", name: right}}, {{reward: length_words, weight: 0.01}}'
    (tmp_path / "reward.yaml").write_text(
        f"sum: [{parts}]\nrequire: [{{reward: words_within, arguments: {{at_least: 3}}}}]"
    )
    SEEN.clear()
    tiny_run(tmp_path, prompts=str(tmp_path / "rows.jsonl"), rewards=[str(tmp_path / "reward.yaml")], max_steps=2)
    assert {(prompt, answer) for prompt, _, answer in SEEN} == {(row["prompt"], row["answer"]) for row in rows}
    lines = list(read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    assert all(0 <= line["reward_reward.right/original"] <= 1 for line in lines)
    for kind in ("original", "transported", "policy", "selected"):
        assert f"reward_reward.length_words/{kind}" in lines[0] and f"reward_reward.words_within/{kind}" in lines[0]


def test_rewards_that_float32_does_not_hold_are_refused() -> None:
    """1e39 is infinite as float32; so is 3e38 twice, where the weighted rewards are added."""

    class Texts:
        tokens_BNT = torch.zeros(1, 2, 1, dtype=torch.long)

        def texts(self, tokenizer: Any) -> list[list[str]]:
            return [["a", "b"]]

    def scores(*tops: float) -> dict[str, torch.Tensor]:
        members = [NamedReward(f"r{top}", 1.0, lambda p, r, top=top: [0.0, top], "rewards:r") for top in tops]
        return Rewards(members, cast(Any, None))(["the prompt"], cast(Any, Texts()))

    assert scores(3e38)["reward"].isfinite().all()
    with pytest.raises(
        ModelError, match=r"reward r1e\+39 \(rewards:r\) gave inf to response 1 of .*'the prompt'.*scale it"
    ):
        scores(1e39)
    with pytest.raises(ModelError, match="weighted and added, gave inf to response 1 of .*'the prompt'.*their weights"):
        scores(3e38, 3.1e38)


COUNTED = '''
import os, time
from reward_models.functions import per_response

@per_response
def counted(prompt, response, answer):
    """Share of cheerful words; every call is a line of a file before it is answered."""
    with open(os.environ["CALLS"], "a") as file:
        file.write(f"{prompt}|{response}|{answer}\\n")
        file.flush()
        os.fsync(file.fileno())
    time.sleep(0.01)
    return sum(word in {"good", "great", "happy", "love", "like"} for word in response.split()) / 8
'''


@pytest.mark.slow
def test_a_killed_run_does_not_pay_again_for_what_it_has_paid_for(tmp_path: Path) -> None:
    """Killed while it scores the fourth step, resumed from the second: only the call under way is made twice."""
    write_inputs(tmp_path)
    (tmp_path / "counting_reward.py").write_text(COUNTED)
    rows = [{"prompt": f"write about the {noun}", "answer": noun} for noun in ("sea", "dog", "cat", "rain")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(name: str) -> tuple[subprocess.Popen[bytes], Path]:
        config, calls = tmp_path / f"{name}.json", tmp_path / f"{name}.calls"
        changes = {
            "prompts": str(tmp_path / "rows.jsonl"),
            "rewards": ["counting_reward:counted"],
            "output_dir": str(tmp_path / name),
            "reward_cache": str(tmp_path / f"{name}.sqlite"),
            "reward_concurrency": 1,
            "max_steps": 5,
            "save_steps": 2,
        }
        write_json_atomic(config, dump(*settings(tmp_path, **changes)))
        path = os.pathsep.join([str(ROOT), str(tmp_path)])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CALLS": str(calls)}
        command = [sys.executable, "-m", "vgf_llm.train", "--config", str(config), "--resume", "true"]
        log = (tmp_path / f"{name}.log").open("ab")
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), calls

    def lines(calls: Path) -> list[str]:
        return calls.read_text().splitlines() if calls.exists() else []

    process, whole = start("whole")
    assert process.wait(120) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    assert max(Counter(lines(whole)).values()) == 1
    process, calls = start("killed")
    until = time.monotonic() + 120
    wanted = int(0.7 * len(lines(whole)))  # in the fourth step of five
    while len(lines(calls)) < wanted:
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "killed.log").read_text()[-3000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    paid = len(lines(calls))
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    process, _ = start("killed")
    assert process.wait(120) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert "going on from" in (tmp_path / "killed.log").read_text()
    counts = Counter(lines(calls))
    print(f"{paid} calls before the kill, {len(lines(calls)) - paid} after it; without a kill {len(lines(whole))}")
    assert sorted(counts) == sorted(Counter(lines(whole)))
    assert sum(counts.values()) <= len(lines(whole)) + 1  # the call that was under way
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "killed" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()

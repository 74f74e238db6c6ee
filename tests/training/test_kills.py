"""Runs that are killed, run out of disk, lose a process or find a broken checkpoint: nothing whole is ever lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.launch import ROOT, free_port
from tests.training.tiny import settings, tiny_run
from vgf_llm.cli import run_main
from vgf_llm.runs.compare import compare_checkpoints
from vgf_llm.runs.files import read_jsonl, write_json_atomic
from vgf_llm.runs.manifest import verify
from vgf_llm.settings.parse import dump
from vgf_llm.train import main

pytestmark = pytest.mark.slow
STEPS = 12
RUN: dict[str, Any] = {"max_steps": STEPS, "save_steps": 2, "save_total_limit": None}
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to, beside the model and prompts of all runs."""
    folder = tmp_path_factory.mktemp("kills")
    tiny_run(folder, output_dir=str(folder / "whole"), **RUN)
    return folder / "whole"


def command(whole: Path, output_dir: Path, **changes: Any) -> list[str]:
    """Arguments of the same run into another folder, with the recipe in a file as users have it."""
    config = output_dir.parent / f"{output_dir.name}.json"
    write_json_atomic(config, dump(*settings(whole.parent, output_dir=str(output_dir), **RUN | changes)))
    return ["-m", "vgf_llm.train", "--config", str(config)]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start in the background; what it prints goes to a file."""
    with open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> Any:
    """Look every few milliseconds; fail where the process ends before, or it takes too long."""
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert process.poll() is None, f"ended with {process.returncode}:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < until, f"not within {seconds} seconds:\n{log.read_text()[-3000:]}"
        time.sleep(0.002)
    return found


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints, after each is verified."""
    return sorted(verify(path).step for path in folder.glob("checkpoint-*"))


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL


def kill_while_saving(process: subprocess.Popen[bytes], folder: Path, log: Path) -> str:
    """Stop the process when a staging folder appears, and kill it if the folder is still there then."""

    def in_between() -> str | None:
        if not list(folder.glob(".checkpoint-*.partial")):
            return None
        os.killpg(process.pid, signal.SIGSTOP)
        if found := [path.name for path in folder.glob(".checkpoint-*.partial")]:
            return found[0]
        os.killpg(process.pid, signal.SIGCONT)
        return None

    name = wait_until(in_between, process, log)
    kill(process)
    return str(name)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    """Killed at a random moment, resumed and killed while it saves, resumed to the end: the last checkpoints agree."""
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = [*command(whole, folder), "--resume", "true"]
    seed = random.SystemRandom().randrange(10**6)  # the run above has seeded the common generator
    rng = random.Random(seed)
    step, delay = rng.randint(3, 7), rng.uniform(0, 0.2)  # a checkpoint is there, and more are to come
    print(f"seed {seed}: killed {delay:.3f} s after step {step}")
    process = start(arguments, log)
    wait_until(lambda: steps_logged(folder) >= step, process, log)
    time.sleep(delay)
    kill(process)
    saved = steps_saved(folder)
    process = start(arguments, log)
    name = kill_while_saving(process, folder, log)
    print(f"saved {saved}; then killed while {name} was written")
    assert (folder / name).exists()
    assert steps_saved(folder)[: len(saved)] == saved
    process = start(arguments, log)
    assert process.wait(90) == 0, log.read_text()[-3000:]
    assert "going on from" in log.read_text()
    assert compare_checkpoints(whole / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS}") == []
    for part in ("adapter_model.safetensors", "value/model.safetensors"):
        assert (whole / part).read_bytes() == (folder / part).read_bytes()
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [path.name for path in folder.glob(".checkpoint*")] == []


def test_broken_checkpoints_are_passed_over_by_name_and_refused_when_asked_for(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    arguments = command(whole, folder)[2:]
    flipped, cut = folder / "checkpoint-12" / "optimizer.pt", folder / "checkpoint-10" / "target.safetensors"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    os.truncate(cut, cut.stat().st_size - 1)
    for broken in (flipped, cut):
        assert run_main(main, [*arguments, "--resume", str(broken.parent)]) == 2
        assert f"{broken.parent.name}': {broken.name}" in capfd.readouterr().err
    assert run_main(main, [*arguments, "--resume", "true"]) == 0
    said = capfd.readouterr().err
    assert "checkpoint-12 is skipped" in said and "checkpoint-10 is skipped" in said
    assert f"going on from '{folder / 'checkpoint-8'}'" in said
    assert compare_checkpoints(whole / "checkpoint-12", folder / "checkpoint-12") == []


def test_a_full_disk_ends_the_run_at_once_with_its_name(whole: Path, tmp_path: Path) -> None:
    """A filesystem with room for two checkpoints and a half, in a mount namespace of its own."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (whole / "checkpoint-2").rglob("*") if path.is_file())
    mount = f"mount -t tmpfs -o size={int(2.5 * size)} tmpfs {disk}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount], timeout=20).returncode:
        pytest.skip("mount namespaces are forbidden here")
    run = " ".join([sys.executable, *command(whole, disk)])
    script = f"{mount} && {run}; code=$?; cp -r {disk} {kept}; exit $code"
    started = time.monotonic()
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    print(f"ended after {time.monotonic() - started:.1f} s: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 2, result.stderr[-3000:]
    assert "No space left on device" in result.stderr.splitlines()[-1], result.stderr[-6000:]
    assert "disk/.checkpoint-6.partial' cannot be written" in result.stderr.splitlines()[-1]
    assert steps_saved(kept) == [2, 4]


def process_of_rank(launcher: int, rank: int) -> int | None:
    """Process id of a rank under a launcher, once it is there."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    return None


def test_a_killed_rank_ends_the_others_with_its_name_and_the_run_can_be_resumed(whole: Path, tmp_path: Path) -> None:
    """Two processes with one prompt each take the steps that one takes with two."""
    folder, log = tmp_path / "run", tmp_path / "log"
    config = ROOT / "recipes" / "accelerate_configs" / "ddp.yaml"
    head = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config), "--num_processes", "2"]
    head += ["--mixed_precision", "no", "--main_process_port"]
    arguments = [*command(whole, folder, per_device_train_batch_size=1), "--resume", "true"]
    launcher = start([*head, str(free_port()), *arguments], log)
    wait_until(lambda: (folder / "checkpoint-4").exists(), launcher, log)
    rank = process_of_rank(launcher.pid, 1)
    assert rank is not None
    os.kill(rank, signal.SIGKILL)
    started = time.monotonic()
    assert launcher.wait(60) != 0
    said = log.read_text()
    print(f"the launcher ended {time.monotonic() - started:.1f} s after the kill")
    assert f"exitcode  : -9 (pid: {rank})" in said and "Signal 9 (SIGKILL)" in said and "rank      : 1" in said
    saved = steps_saved(folder)
    assert saved[:2] == [2, 4] and max(saved) < STEPS
    launcher = start([*head, str(free_port()), *arguments], log)
    assert launcher.wait(90) == 0, log.read_text()[-3000:]
    assert "going on from" in log.read_text()
    assert steps_saved(folder) == list(range(2, STEPS + 1, 2))
    expected, found = (load_file(run / f"checkpoint-{STEPS}" / "trained.safetensors") for run in (whole, folder))
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-5  # measured: 1.8e-7

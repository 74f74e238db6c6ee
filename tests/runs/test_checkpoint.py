"""A checkpoint is whole or absent: kills, full disks, changed bytes, rotation, and a changed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vgf_llm.errors import CheckpointError, ConfigError, OutputError
from vgf_llm.runs import checkpoint
from vgf_llm.runs.checkpoint import newest_whole, publish, rotate, saving, staging_folder, verify
from vgf_llm.runs.compare import compare_checkpoints
from vgf_llm.runs.manifest import check_identity

IDENTITY: dict[str, Any] = {"budget": {"nats": 2.0, "rounds": 1}, "dataset": "ab12", "world_size": 2}


def fill(folder: Path, step: int = 1) -> None:
    """What a trainer writes, two ranks, one subfolder."""
    generator = torch.Generator().manual_seed(step)
    save_file({"layer.weight": torch.randn(4, 4, generator=generator)}, folder / "model.safetensors")
    weight = torch.nn.Parameter(torch.randn(3, generator=generator))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(state, folder / "rng_state_0.pth")
    log = [{"step": step, "loss": 0.5, "train_runtime": 1.5, "sample_sec": 0.1}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    (folder / "ranks").mkdir()
    (folder / "ranks" / "journal_1.jsonl").write_text('{"row": 1}\n')


def save(output_dir: Path, step: int) -> Path:
    staging = staging_folder(output_dir, step)
    fill(staging, step)
    return publish(staging, output_dir, step, IDENTITY)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_checkpoint_verifies_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 7)
    manifest = verify(folder)
    assert folder.name == "checkpoint-7"
    assert (manifest.step, manifest.identity) == (7, IDENTITY)
    assert set(manifest.files) == {
        "model.safetensors",
        "optimizer.pt",
        "rng_state_0.pth",
        "trainer_state.json",
        "ranks/journal_1.jsonl",
    }
    assert names(tmp_path / "run") == ["checkpoint-7"]
    assert newest_whole(tmp_path / "run") == folder


def test_one_flipped_bit_in_any_file_is_found_and_its_file_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for position in (0, len(original) // 2, len(original) - 1):
            changed = bytearray(original)
            changed[position] ^= 1
            path.write_bytes(changed)
            if path.name == "manifest.json" and position == len(original) - 1:
                continue  # the final newline
            with pytest.raises(CheckpointError, match=path.name):
                verify(folder)
        path.write_bytes(original)
    verify(folder)


def test_a_budget_edited_in_the_manifest_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"nats": 2.0', '"nats": 4.0'))
    with pytest.raises(CheckpointError, match="manifest.json was changed"):
        verify(path.parent)


def test_verify_says_missing_truncated_and_half_written(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    journal = folder / "ranks" / "journal_1.jsonl"
    os.truncate(journal, 4)
    with pytest.raises(CheckpointError, match=r"ranks/journal_1.jsonl: size 4 instead of 11 bytes: truncated"):
        verify(folder)
    journal.unlink()
    with pytest.raises(CheckpointError, match=r"ranks/journal_1.jsonl is missing"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no manifest.json: half-written"):
        verify(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "checkpoint-9")


def test_a_manifest_of_another_format_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgf_llm.runs.manifest.FORMAT", 2)
    folder = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        verify(folder)


def test_newest_whole_skips_what_is_broken_by_name_and_deletes_nothing(tmp_path: Path, capsys) -> None:
    for step in (2, 10, 30):
        save(tmp_path, step)
    os.truncate(tmp_path / "checkpoint-30" / "optimizer.pt", 10)
    shutil.copytree(tmp_path / "checkpoint-30", tmp_path / ".checkpoint-40.partial")
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    message = capsys.readouterr().err
    assert "checkpoint-30 is skipped" in message
    assert "optimizer.pt: size 10 instead of" in message
    assert (tmp_path / "checkpoint-30").exists()
    assert newest_whole(tmp_path / "never_made") is None


def test_a_kill_while_writing_leaves_the_earlier_one_and_the_next_save_clears_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    fill(staging_folder(tmp_path, 2), 2)  # killed here
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"
    staging = staging_folder(tmp_path, 2)
    assert names(staging) == []
    staging_folder(tmp_path, 3)
    assert names(tmp_path) == [".checkpoint-3.partial", "checkpoint-1"]


def test_a_kill_between_the_two_renames_of_a_re_save_keeps_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 5)
    os.rename(tmp_path / "checkpoint-5", tmp_path / ".checkpoint-5.replaced")  # killed here
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-5"
    os.rename(tmp_path / "checkpoint-5", tmp_path / ".checkpoint-5.replaced")
    staging_folder(tmp_path, 6)
    verify(tmp_path / "checkpoint-5")


def test_a_re_save_replaces_the_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    before = verify(save(tmp_path, 5))
    staging = staging_folder(tmp_path, 5)
    fill(staging, 6)
    after = verify(publish(staging, tmp_path, 5, IDENTITY))
    assert before.files != after.files
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_failed_rename_of_a_re_save_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    staging = staging_folder(tmp_path, 5)
    fill(staging, 6)
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", refuse)
    with pytest.raises(OutputError, match="No space left on device"):
        publish(staging, tmp_path, 5, IDENTITY)
    assert names(tmp_path) == ["checkpoint-5"]
    verify(tmp_path / "checkpoint-5")


WRITERS = {
    "torch": "torch.save({'a': torch.zeros(500_000)}, path)",
    "safetensors": "safetensors.torch.save_file({'a': torch.zeros(500_000)}, path)",
    "text": "open(path, 'w').write('x' * 2_000_000)",
}
FULL_DISK = """
import os, sys, torch, safetensors.torch
from pathlib import Path
from vgf_llm.errors import OutputError
from vgf_llm.runs.checkpoint import newest_whole, publish, saving, staging_folder
run = Path(sys.argv[1])
staging = staging_folder(run, 1)
(staging / "model.bin").write_bytes(bytes(1000))
publish(staging, run, 1, {})
staging = staging_folder(run, 2)
path = str(staging / "state")
try:
    with saving(staging):
        %s
except OutputError as error:
    assert not staging.exists(), "staging is still there"
    assert newest_whole(run).name == "checkpoint-1"
    print("refused:", error)
"""


@pytest.mark.parametrize("writer", ["torch", "safetensors", "text"])
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path, writer: str) -> None:
    """A filesystem of one megabyte, in a mount namespace of its own; where that is forbidden, a file size limit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK % WRITERS[writer])
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    python = f"{sys.executable} {script} {disk}"
    command = ["unshare", "-rm", "sh", "-c", f"{mount} && exec {python}"]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount], timeout=20).returncode:
        command = ["sh", "-c", f"trap '' XFSZ; ulimit -f 500; exec {python}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert ".checkpoint-2.partial' cannot be written:" in result.stdout
    assert "earlier checkpoints are untouched" in result.stdout


def test_a_full_disk_while_the_manifest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    staging = staging_folder(tmp_path, 2)
    fill(staging, 2)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vgf_llm.runs.files.os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        publish(staging, tmp_path, 2, IDENTITY)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("x"), KeyboardInterrupt()])
def test_saving_lets_other_errors_pass(tmp_path: Path, error: BaseException) -> None:
    staging = staging_folder(tmp_path, 1)
    with pytest.raises(type(error)), saving(staging):
        raise error
    assert staging.exists()


def test_rotation_keeps_the_newest_by_step(tmp_path: Path) -> None:
    for step in (9, 10, 11, 100):
        save(tmp_path, step)
    assert rotate(tmp_path, None) == []
    assert [folder.name for folder in rotate(tmp_path, 2)] == ["checkpoint-9", "checkpoint-10"]
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-11"]
    with pytest.raises(ConfigError, match="save_total_limit 0"):
        rotate(tmp_path, 0)


def test_rotation_never_deletes_the_last_whole_one_nor_what_it_did_not_publish(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (3, 4):
        os.truncate(tmp_path / f"checkpoint-{step}" / "optimizer.pt", 5)
    (tmp_path / "checkpoint-0").mkdir()
    assert [folder.name for folder in rotate(tmp_path, 1)] == ["checkpoint-1", "checkpoint-3"]
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-2"
    assert (tmp_path / "checkpoint-0").exists()


def test_a_kill_while_deleting_leaves_only_a_hidden_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def killed(folder: Path) -> None:
        (folder / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    monkeypatch.undo()
    assert names(tmp_path) == [".checkpoint-1.trash", "checkpoint-2"]
    staging_folder(tmp_path, 3)
    assert names(tmp_path) == [".checkpoint-3.partial", "checkpoint-2"]


def test_a_changed_run_is_refused_with_every_key_and_how_to_allow_it(tmp_path: Path) -> None:
    manifest = verify(save(tmp_path, 1))
    assert check_identity(manifest, IDENTITY) == []
    changed = {"budget": {"nats": 4.0, "rounds": 1}, "dataset": "cd34", "world_size": 2, "seed": 1}
    with pytest.raises(ConfigError) as caught:
        check_identity(manifest, changed)
    message = str(caught.value)
    for part in ("budget.nats 2.0 -> 4.0", "dataset ab12 -> cd34", "seed (absent) -> 1", "--allow_changes"):
        assert part in message
    assert "rounds" not in message
    assert check_identity(manifest, changed, ["budget", "dataset", "seed"]) == [
        "budget.nats 2.0 -> 4.0",
        "dataset ab12 -> cd34",
        "seed (absent) -> 1",
    ]
    with pytest.raises(ConfigError, match=r'budget.nats 2.0 -> 4.0.*allow_changes \'\["budget.nats"\]'):
        check_identity(manifest, changed, ["dataset", "seed"])
    assert len(check_identity(manifest, changed, ["budget.nats", "dataset", "seed"])) == 3
    with pytest.raises(ConfigError, match="no key 'budgets'"):
        check_identity(manifest, IDENTITY, ["budgets"])


def test_equal_states_compare_equal_though_clocks_and_folders_differ(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        root.mkdir()
        random.seed(0)
        np.random.seed(0)
        fill(root)
    path = other / "trainer_state.json"
    path.write_text(path.read_text().replace("1.5", "2.5").replace("0.1", "0.2"))
    assert compare_checkpoints(one, other) == []


def test_every_difference_is_named(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one", 1), save(tmp_path / "other", 1)
    save_file({"layer.weight": -torch.zeros(4, 4), "b": torch.zeros(1)}, other / "model.safetensors")
    save_file({"layer.weight": torch.zeros(4, 4)}, one / "model.safetensors")
    state = torch.load(other / "optimizer.pt")
    state["state"][0]["exp_avg"][1] += 1e-7
    torch.save(state, other / "optimizer.pt")
    random.random()
    torch.save(
        torch.load(one / "rng_state_0.pth", weights_only=False) | {"python": random.getstate()},
        other / "rng_state_0.pth",
    )
    path = other / "trainer_state.json"
    path.write_text(path.read_text().replace("0.5", "0.25"))
    (other / "ranks" / "journal_1.jsonl").write_text("{}\n")
    (other / "extra.txt").write_text("")
    lines = compare_checkpoints(one, other)
    assert lines[0].startswith("extra.txt: only in")
    assert lines[1:4] == [
        "model.safetensors: b only in the second",
        "model.safetensors: layer.weight",
        "optimizer.pt: state.0.exp_avg",
    ]
    assert lines[4].startswith("ranks/journal_1.jsonl: bytes differ")
    assert "rng_state_0.pth: python.1" in lines
    assert lines[-1] == "trainer_state.json: log_history.0.loss 0.5 != 0.25"

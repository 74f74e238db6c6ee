"""Files that an earlier version wrote: half-finished runs are continued, results are loaded.

`make_files.py` says how files.tar.gz came about. What a resumed run ends with is compared with what the earlier version
itself ended with, within float32's rounding: the machine may be another one.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.compatibility.make_files import COMMANDS
from vgf_llm.cli import run_main
from vgf_llm.runs.files import read_jsonl

ARCHIVE = Path(__file__).parent / "files.tar.gz"
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files, in a folder that is the current one."""
    with tarfile.open(ARCHIVE) as file:
        file.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *more: str, output: str | None = None) -> None:
    """Run a command of the archive with today's code."""
    module, *arguments = COMMANDS[name]
    argv = [*arguments, "--output_dir", output or name, *more]
    assert run_main(importlib.import_module(module).main, argv) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a result."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected and set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=name)


@pytest.mark.parametrize("resume", ["true", "folder"])
@pytest.mark.parametrize("name", ["policy_lora", "policy_full"])
def test_a_policy_is_trained_on_from_its_checkpoint(old: Path, name: str, resume: str):
    expected = weights(old / name) | ({} if name == "policy_lora" else weights(old / name / "value"))
    for path in (old / name).glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(old / name / "value", ignore_errors=True)
    run(name, "--resume", "true" if resume == "true" else f"{name}/checkpoint-2")
    found = weights(old / name) | ({} if name == "policy_lora" else weights(old / name / "value"))
    assert_same(found, expected)
    assert (old / name / "checkpoint-4").is_dir()


@pytest.mark.parametrize("resume", ["true", "folder"])
@pytest.mark.parametrize("name", ["reward", "reward_lora", "value"])
def test_a_reward_or_value_is_trained_on_from_its_checkpoint(old: Path, name: str, resume: str, capsys: Any):
    """Its checkpoint has no manifest: it is taken without being verified, which is said."""
    expected = {key: tensor for key, tensor in weights(old / name).items() if not key.startswith("secant")}
    output = "reward_run" if name == "reward" else name
    for path in (old / output).glob("*.safetensors"):
        path.unlink()
    run(name, "--resume", "true" if resume == "true" else f"{output}/checkpoint-2", output=output)
    assert_same(weights(old / output), expected)
    assert "has no manifest.json (of an earlier version): taken without being verified" in capsys.readouterr().err
    assert (old / output / "checkpoint-4" / "manifest.json").is_file()
    if name == "value":
        target = load_file(old / output / "checkpoint-4" / "target.safetensors")
        assert_same(target, load_file(old / "expected" / name / "target.safetensors"))


def test_a_control_run_goes_on(old: Path):
    pytest.importorskip("h5py")
    run("control", "--resume", "true")
    found = load_file(old / "control" / "checkpoint-4" / "agent.safetensors")
    assert_same(found, load_file(old / "expected" / "control" / "agent.safetensors"))


@pytest.mark.parametrize(
    ("name", "texts"), [("evaluation", ("arm", "seed", "texts", "selected")), ("transport", ("index", "response"))]
)
def test_rows_are_added_to_those_that_are_there(old: Path, name: str, texts: tuple[str, ...]):
    before, expected = (read_jsonl(folder / name / "rows.jsonl") for folder in (old, old / "expected"))
    assert 0 < len(before) < len(expected)
    run(name, "--resume")
    found = read_jsonl(old / name / "rows.jsonl")
    assert found[: len(before)] == before and len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        assert all(row[key] == other[key] for key in texts)


def test_results_are_loaded(old: Path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from reward_models import load_reward_model
    from reward_models.card import read_card
    from reward_models.secant import load_secant_head
    from vgf_llm.models.loading import load_tokenizer

    for name in ("reward", "reward_lora", "value", "policy_full/value"):
        value = load_reward_model(old / name, tokenizer=load_tokenizer(str(old / name)))
        assert value.head.weight.abs().max() > 0
        if "/" not in name:
            assert read_card(old / name).adapter == (name == "reward_lora")
    head = load_secant_head(old / "reward", load_reward_model(old / "reward"))
    assert head.second.weight.abs().max() > 0
    assert AutoPeftModelForCausalLM.from_pretrained(str(old / "policy_lora")) is not None
    assert AutoModelForCausalLM.from_pretrained(str(old / "policy_full")) is not None


def test_a_checkpoint_of_an_earlier_run_is_verified_by_continuing_it_twice(old: Path, capsys: Any):
    """`vgf_config.json` of that version has a key that has another name now."""
    from vgf_llm import verify_resume

    assert json.loads((old / "policy_lora" / "vgf_config.json").read_text())["resume_from_checkpoint"] is False
    assert run_main(verify_resume.main, ["--checkpoint", "policy_lora/checkpoint-2", "--steps", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["differences"] == 0

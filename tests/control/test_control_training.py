"""Whole runs on a tiny task: the score rises, a stopped run goes on bit for bit, budgets are evaluated side by side."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.control import tiny
from vgf_llm.control import loaders
from vgf_llm.control.envs import Bounds
from vgf_llm.control.settings import AgentSettings, DataSettings, TrainSettings
from vgf_llm.control.train import run
from vgf_llm.errors import ConfigError
from vgf_llm.flow.budget import TransportBudget

SMALL = {
    "clone_hidden": [64, 64],
    "critic_hidden": [64, 64],
    "euler_steps": 5,
    "num_particles": 8,
    "learning_rate": 1e-3,
    "discount": 0.9,
    "average_rate": 0.02,
}
BOUNDS = Bounds(-2 * np.ones(2), 2 * np.ones(2))
DATA = DataSettings(env="tests.control.tiny:make", data="walk")


@pytest.fixture(autouse=True)
def _walk(monkeypatch):
    """The walk as it would come from a file; HDF5 itself is tested with the loaders."""
    rows = tiny.walk()
    monkeypatch.setattr(
        loaders, "load", lambda path, name, env, bounds: loaders.from_rows("walk", rows, bounds or BOUNDS)
    )


def settings(folder, **changes):
    chosen = {
        "output_dir": str(folder),
        "offline_steps": 6,
        "batch_size": 64,
        "eval_episodes": 3,
        "test_steps": [0, 1],
        "log_every_steps": 2,
        "save_every_steps": 3,
        "eval_every_steps": 3,
        "device": "cpu",
        **changes,
    }
    return TrainSettings(**chosen)


def test_the_score_rises(tmp_path):
    """A blind walk, of whose episodes few end well: after 5 steps no budget does more than the clone, after 400 all."""
    chosen = {"batch_size": 128, "eval_episodes": 25, "eval_every_steps": 400, "log_every_steps": 400}
    before, after = (
        {row["arm"]: row["score"] for row in run(settings(tmp_path, **chosen, **more), DATA, AgentSettings(**SMALL))}
        for more in ({"offline_steps": 5}, {"offline_steps": 400, "resume": True})
    )
    assert list(after) == ["clone", "best-of-8", "1 x 0.1"]
    for arm in ("best-of-8", "1 x 0.1"):
        assert after[arm] >= before[arm] + 20
        assert after[arm] >= after["clone"] + 10


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


VARIANTS = {
    "plain": ({}, {}),
    "gaussian expectile": ({}, {"clone": "gaussian", "critic_loss": "expectile", "select": "softmax"}),
    "cached": ({"clone_steps": 4, "cached_samples": 10}, {"critic_loss": "sql", "target_pool": "max"}),
    "amortised": ({}, {"amortised": True, "budget": TransportBudget(steps=2, step="adam", step_size=0.1)}),
    "online": ({"online_steps": 50, "online_warmup": 5, "eval_every_steps": 100, "save_every_steps": 15}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    """The first run is cut after its second checkpoint as a kill would; files and weights end up the same."""
    train, agent = VARIANTS[name]
    agent_settings = AgentSettings(**{**SMALL, **agent})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(settings(whole, **train), DATA, agent_settings)

    from vgf_llm.control import trainer

    saves = []

    def save_and_stop(folder, step, *rest):
        saves.append(step)
        saved(folder, step, *rest)
        if len(saves) == 1:
            raise KeyboardInterrupt

    saved = trainer.save
    monkeypatch.setattr(trainer, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(settings(cut, **train), DATA, agent_settings)
    with pytest.raises(ConfigError, match="holds checkpoint-.*set resume: true to continue"):
        run(settings(cut, **train), DATA, agent_settings)
    run(settings(cut, **train, resume=True), DATA, agent_settings)

    total = settings(cut, **train).total_steps
    assert saves[0] < total and saves[-1] == total
    first, second = (load_file(folder / f"checkpoint-{total}" / "agent.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)
    assert lines(whole, "evaluations.jsonl") == lines(cut, "evaluations.jsonl")
    kept = [{k: v for k, v in row.items() if k != "online_return"} for row in lines(cut, "metrics.jsonl")]
    assert kept == [{k: v for k, v in row.items() if k != "online_return"} for row in lines(whole, "metrics.jsonl")]


def test_another_agent_does_not_go_on_from_a_checkpoint(tmp_path):
    run(settings(tmp_path), DATA, AgentSettings(**SMALL))
    with pytest.raises(ConfigError, match="agent.discount 0.9 -> 0.8"):
        run(settings(tmp_path, resume=True), DATA, AgentSettings(**{**SMALL, "discount": 0.8}))
    longer = run(settings(tmp_path, resume=True, offline_steps=8), DATA, AgentSettings(**SMALL))
    assert longer[0]["step"] == 8


def test_a_checkpoint_is_evaluated_under_other_budgets(tmp_path):
    run(settings(tmp_path), DATA, AgentSettings(**SMALL))
    other = settings(tmp_path, test_steps=[2], test_step_sizes=[0.05, 0.2])
    rows = run(other, DATA, AgentSettings(**SMALL), only_evaluate=True)
    assert [row["arm"] for row in rows] == ["clone", "2 x 0.05", "2 x 0.2"]
    again = run(other, DATA, AgentSettings(**SMALL), only_evaluate=True)
    assert [row["returns"] for row in rows] == [row["returns"] for row in again]


def test_training_needs_no_environment(tmp_path):
    assert run(settings(tmp_path), DataSettings(data="walk"), AgentSettings(**SMALL)) == []
    assert not (tmp_path / "evaluations.jsonl").exists()

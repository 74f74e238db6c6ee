"""Whole runs on a tiny task: the score rises, a stopped run goes on bit for bit, budgets are evaluated side by side."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.control import tiny
from vgf_llm.control import loaders
from vgf_llm.control.envs import Bounds
from vgf_llm.control.report import summarise, table
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
    """400 steps on a blind walk (a percent of whose episodes end well): selection and flow beat the clone."""
    short = settings(
        tmp_path, offline_steps=400, batch_size=128, eval_episodes=40, eval_every_steps=400, log_every_steps=400
    )
    scores = {row["arm"]: row["score"] for row in run(short, DATA, AgentSettings(**SMALL))}
    assert list(scores) == ["clone", "best-of-8", "1 x 0.1"]
    assert scores["best-of-8"] >= scores["clone"] + 10
    assert scores["1 x 0.1"] >= scores["clone"] + 10


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
    with pytest.raises(ConfigError, match="go on with --resume"):
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


def evaluation(arm, successes, steps=0, size=None):
    return {
        "step": 10,
        "arm": arm,
        "flow_steps": steps,
        "step_size": size,
        "moved": 0.0,
        "returns": [-1.0] * len(successes),
        "successes": successes,
    }


def test_seeds_are_joined_and_the_best_budget_is_chosen_on_the_others(tmp_path):
    """Three seeds of two episodes. On seed 0 the step wins (100 against 50), on 1 and 2 best-of-2 does.

    Others of seed 0: best-of-2 has 100, the step 0 -> best-of-2, which scores 50 on seed 0. Others of seed 1:
    best-of-2 (50 + 100) / 2, the step (100 + 0) / 2 -> best-of-2, 100; the same for seed 2: mean 250 / 3.
    """
    arms = {"clone": [0.0, 0.0], "best-of-2": [1.0, 1.0], "1 x 0.1": [0.0, 0.0]}
    for seed in range(3):
        found = {**arms, "best-of-2": [1.0, 0.0], "1 x 0.1": [1.0, 1.0]} if seed == 0 else arms
        (tmp_path / str(seed)).mkdir()
        rows = [
            evaluation(arm, value, int(arm[0] == "1"), 0.1 if arm[0] == "1" else None) for arm, value in found.items()
        ]
        (tmp_path / str(seed) / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = summarise([tmp_path / str(seed) for seed in range(3)])
    best = result["arms"]["best budget"]
    assert best["chosen"] == ["best-of-2"] * 3
    assert best["score"][0] == pytest.approx(250 / 3, abs=0.01)
    assert result["arms"]["clone"]["score"] == [0, 0, 0]
    assert result["arms"]["1 x 0.1"]["minus_best_of_n"][0] == pytest.approx(100 / 3 - 250 / 3, abs=0.01)
    assert "| best-of-2 | 83.3 [" in table(result)


def test_of_budgets_that_always_succeed_the_faster_is_chosen(tmp_path):
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        rows = [
            evaluation(arm, [1.0, 1.0], int(arm[0] == "1"), 0.1 if arm[0] == "1" else None) | {"returns": [total] * 2}
            for arm, total in (("clone", -9.0), ("best-of-2", -5.0), ("1 x 0.1", -4.0))
        ]
        (tmp_path / str(seed) / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = summarise([tmp_path / str(seed) for seed in range(2)])["arms"]
    assert arms["best budget"]["chosen"] == ["1 x 0.1"] * 2
    assert arms["1 x 0.1"]["return_minus_best_of_n"] == [1.0, 1.0, 1.0]

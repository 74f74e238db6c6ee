"""What a run takes up again, and what it refuses before or while it trains."""

import pytest

from tests.control import tiny
from tests.control.test_control_training import BOUNDS, DATA, SMALL, settings
from vgf_llm.control import loaders
from vgf_llm.control.settings import AgentSettings, DataSettings
from vgf_llm.control.train import run
from vgf_llm.errors import ConfigError, DivergedError
from vgf_llm.flow.budget import TransportBudget

AGENT = AgentSettings(**SMALL)
ONLINE = {"online_steps": 6, "online_warmup": 2, "eval_every_steps": 100}


@pytest.fixture(autouse=True)
def _walk(monkeypatch):
    rows = tiny.walk()
    monkeypatch.setattr(
        loaders, "load", lambda path, name, env, bounds: loaders.from_rows("walk", rows, bounds or BOUNDS)
    )


def test_a_finished_run_tells_its_last_evaluation_again(tmp_path):
    first = run(settings(tmp_path), DATA, AGENT)
    again = run(settings(tmp_path, resume=True), DATA, AGENT)
    assert [row["returns"] for row in again] == [row["returns"] for row in first] != []


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path):
    run(settings(tmp_path), DATA, AGENT)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match="checkpoint-6 lies beyond the 4 steps"):
        run(settings(tmp_path, resume=True, offline_steps=4), DATA, AGENT)
    assert (tmp_path / "config.json").read_text() == before


def test_an_offline_run_goes_online_and_an_online_run_goes_on_for_longer(tmp_path):
    run(settings(tmp_path), DATA, AGENT)
    assert run(settings(tmp_path, resume=True, **ONLINE), DATA, AGENT)[0]["step"] == 12
    longer = {**ONLINE, "online_steps": 9}
    assert run(settings(tmp_path, resume=True, **longer), DATA, AGENT)[0]["step"] == 15
    with pytest.raises(ConfigError, match="online.offline_steps 6 -> 8"):
        run(settings(tmp_path, resume=True, **longer, offline_steps=8), DATA, AGENT)


def test_a_run_with_a_cache_goes_online_without_it(tmp_path):
    run(settings(tmp_path, clone_steps=2, cached_samples=8), DATA, AGENT)
    online = settings(tmp_path, resume=True, clone_steps=2, allow_changes=["cached_samples"], **ONLINE)
    assert run(online, DATA, AGENT)[0]["step"] == 14


def test_another_environment_goes_on_only_when_it_is_allowed(tmp_path):
    run(settings(tmp_path), DATA, AGENT)
    other = DataSettings(env="tests.control.tiny:Corner", data="walk")
    with pytest.raises(ConfigError, match="data.env tests.control.tiny:make -> tests.control.tiny:Corner"):
        run(settings(tmp_path, resume=True, offline_steps=8), other, AGENT)
    allowed = settings(tmp_path, resume=True, offline_steps=8, allow_changes=["data.env"])
    assert run(allowed, other, AGENT)[0]["step"] == 8


def test_a_cache_smaller_than_the_cloud_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cached_samples must be 0 or at least num_particles \(8\), got 5"):
        run(settings(tmp_path, clone_steps=2, cached_samples=5), DATA, AGENT)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_diverges_stops_before_it_is_saved(steps, tmp_path):
    agent = AgentSettings(**{**SMALL, "learning_rate": 1e30, "budget": TransportBudget(steps=steps)})
    with pytest.raises(DivergedError, match=r"step \d+: .* not finite; lower learning_rate"):
        run(settings(tmp_path, eval_every_steps=100, offline_steps=12), DATA, agent)
    assert list(tmp_path.glob("checkpoint-*")) == []
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("key, value", [("nats", 1.0), ("rounds", 2), ("max_token_nats", 0.5)])
def test_limits_of_decoding_are_refused_where_nothing_is_decoded(key, value):
    with pytest.raises(ValueError, match=f"budget.{key} must be left out: it limits the decoding of tokens"):
        AgentSettings(budget=TransportBudget(**{key: value}))


@pytest.mark.parametrize(
    "change", [{"reward_shift": float("nan")}, {"score_min": float("inf")}, {"score_min": 2.0, "score_max": 2.0}]
)
def test_data_settings_out_of_range_name_their_key(change):
    with pytest.raises(ValueError, match=list(change)[-1]):
        DataSettings(**change)

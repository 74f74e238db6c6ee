"""The real command: an engine that is killed under load, a server that is told to end, and what it refuses to start."""

from __future__ import annotations

import math
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.serving.command import client, serve
from tests.serving.conftest import chat, wait_until
from vgf_llm import serve as command
from vgf_llm.cli import main
from vgf_llm.errors import ConfigError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.serving.settings import LimitSettings, ServeSettings
from vgf_llm.settings import ModelSettings

CHAT = "/v1/chat/completions"
LONG = chat(max_tokens=100, transport={"num_particles": 8, "draws": 4, "rounds": 4, "decoder": "pivot"})


def asked_while_the_engine_is_killed(own, clients=12):
    """Every client's status and seconds from the kill to its answer."""
    with ThreadPoolExecutor(clients) as pool, client(own) as http:
        first = http.post(CHAT, json=chat())
        assert first.status_code == 200

        def ask(seed):
            told = http.post(CHAT, json={**LONG, "seed": seed})
            return told, time.monotonic()

        waiting = [pool.submit(ask, seed) for seed in range(clients)]
        wait_until(lambda: "vgf_requests_running 8.0" in http.get("/metrics").text)
        engine = own.engine()
        killed = time.monotonic()
        engine.send_signal(signal.SIGKILL)
        found = [one.result(timeout=60) for one in waiting]
    for told, at in found:
        assert told.status_code == 503, told.text
        assert at - killed < 10
    said = [told.json()["error"]["message"] for told, _ in found]
    assert all("died" in one and str(engine.pid) not in one for one in said), said
    assert f"died: its process {engine.pid} ended with exit code -9" in "".join(own.said)
    return first.json()["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_an_engine_that_is_killed_fails_who_waits_and_another_one_is_started(served_models):
    pytest.importorskip("vllm")
    with serve(served_models) as own:
        before = asked_while_the_engine_is_killed(own)
        own.wait_for("another engine runs")
        with client(own) as http:
            assert http.get("/health").status_code == 200
            again = http.post(CHAT, json=chat())
            assert again.json()["choices"][0]["message"]["content"] == before
            assert "vgf_engine_restarts_total 1.0" in http.get("/metrics").text
        family = own.family()
        with ThreadPoolExecutor(16) as pool, client(own) as http:  # told to end while it answers
            asked = [LONG | {"seed": seed, "stream": seed % 2 == 1} for seed in range(16)]
            last = [pool.submit(http.post, CHAT, json=one) for one in asked]
            wait_until(lambda: "vgf_requests_running 8.0" in http.get("/metrics").text)
            own.process.send_signal(signal.SIGTERM)
            assert own.process.wait(60) == 0
            ends = [one.result() for one in last]
        assert {one.status_code for one in ends[::2]} <= {200, 503}
        assert all("[DONE]" in one.text or '"stopping"' in one.text for one in ends[1::2])
        assert any('"stopping"' in one.text for one in ends[1::2])
        assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.mark.slow
def test_an_engine_that_is_killed_ends_a_server_that_is_to_exit(served_models):
    pytest.importorskip("vllm")
    with serve(served_models, "--on_engine_death", "exit") as own:
        asked_while_the_engine_is_killed(own)
        assert own.process.wait(30) == 1


@pytest.mark.slow
def test_ctrl_c_while_another_engine_starts_leaves_no_process_behind(served_models):
    pytest.importorskip("vllm")
    with serve(served_models) as own, client(own) as http:
        engine = own.engine()
        engine.kill()
        wait_until(lambda: http.get("/health").status_code == 503)
        wait_until(lambda: any(one.pid > engine.pid for one in own.family()), 60)
        family = own.family()
        own.process.send_signal(signal.SIGINT)
        assert own.process.wait(40) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []


def test_what_cannot_be_served_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.delenv("VGF_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"host 0.0.0.0 can be reached by others: set VGF_API_KEY"):
        command.main(["--host", "0.0.0.0"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of host 127.0.0.1 cannot be listened on"):
            command.main(["--port", str(port)])
    pytest.importorskip("starlette", reason="the server's packages are not installed (extra serve)")
    with pytest.raises(ConfigError, match="reward_model is not set"):
        command.main(["--port", "0"])


def test_what_is_infinite_is_refused():
    """A recipe can say so, a flag cannot; every answer repeats its budget, and JSON has no infinity."""
    with pytest.raises(ValueError, match=r"budget.max_token_nats must be finite to be served, got inf"):
        ServeSettings(budget=TransportBudget(max_token_nats=math.inf))
    with pytest.raises(ValueError, match="nats must be at least 0 and finite, got inf"):
        LimitSettings(nats=math.inf)


@pytest.mark.parametrize("key", ["two words", "ünknown", "tab\t", "\u00a0"])
def test_a_key_that_nobody_can_send_is_refused(monkeypatch, key):
    monkeypatch.setenv("VGF_API_KEY", key)
    with pytest.raises(ConfigError, match="VGF_API_KEY must be of visible ASCII"):
        command.main(["--port", "0"])


def test_a_path_is_not_told_to_clients():
    models = ModelSettings(model_name_or_path="/somewhere/own/model")
    assert command.served_name(ServeSettings(), models) == "model"
    assert command.served_name(ServeSettings(), ModelSettings(model_name_or_path="a/model")) == "a/model"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"decoder_options": {"foo": 1}}, "no option 'foo'"), ({"decoder": "pivot"}, "needs budget.kernel none")],
)
def test_a_default_that_no_request_could_use_is_refused_at_the_start(served_pipeline, options, said):
    from vgf_llm.serving.service import Service

    settings = ServeSettings(budget=TransportBudget(kernel="rbf"), **options)
    with pytest.raises(ConfigError, match=said):
        Service(served_pipeline, settings, lambda: None)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--max_running", "0"], "max_running must be at least 1"),
        (["--max_waiting", "-1"], "max_waiting must be at least 0"),
        (["--limits.timeout_sec", "0"], "timeout_sec must be above 0"),
        (
            ["--limits.num_particles", "4"],
            "limits.num_particles must be at least num_particles, which is 8, got 4",
        ),
        (["--num_particles", "40"], "num_particles must be at most limits.num_particles, which is 32, got 40"),
        (["--budget.steps", "9"], "--budget.steps: budget.steps must be at most limits.steps, which is 8, got 9"),
        (["--on_engine_death", "weep"], "on_engine_death"),
        (["--max_new_tokens", "300"], "max_new_tokens must be at most limits.max_tokens, which is 256, got 300"),
    ],
)
def test_settings_out_of_range_are_refused(flags, said, capsys):
    assert main(["serve", *flags]) == 2
    assert said in capsys.readouterr().err

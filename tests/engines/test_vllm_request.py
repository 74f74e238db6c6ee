"""A request as vLLM is asked: by plan or greedily at temperature 0, else under its distribution and seed."""

import torch

from vgf_llm.engines.engine import EngineRequest
from vgf_llm.engines.vllm_request import request_fields
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.choosing import Draws

SAMPLING = SamplingSettings(temperature=0.7, top_k=12, top_p=0.9, max_new_tokens=9)
ENDS = {"stop_token_ids": [2, 5], "stop": ["."], "ignore_eos": True}


def test_a_distribution_comes_with_a_seed_that_vllm_takes():
    fields = request_fields(EngineRequest([1], 9, sampling=SAMPLING, seed=-1, eos_ids=(2, 5), stop=(".",)))
    distribution = {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "seed": 2**63 - 1}
    assert fields == {"max_tokens": 9, **distribution, **ENDS, "logit_bias": None, "prompt_logprobs": None}


def test_a_plan_picks_at_temperature_0_whatever_the_distribution():
    [plan] = Draws(SAMPLING, torch.tensor([1])).plans(torch.tensor([0]), 9)
    for request in (EngineRequest([1], 9, plan=plan, sampling=SAMPLING, seed=3), EngineRequest([1], 9, seed=3)):
        fields = request_fields(request)
        assert fields["temperature"] == 0.0 and "seed" not in fields and "top_k" not in fields


def test_what_is_read_and_what_is_barred_is_said():
    fields = request_fields(EngineRequest([1], 1, prompt_logprobs=4, barred=range(7, 9)))
    assert fields["prompt_logprobs"] == 4 and fields["logit_bias"] == {7: -100.0, 8: -100.0}

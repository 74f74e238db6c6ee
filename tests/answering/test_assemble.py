"""The one maker of the implicit policy: what it puts together, and what it is told to take instead."""

import pytest
import torch

from reward_models.modelling import RewardModel
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.errors import ConfigError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import BlockDecoder, ReferenceSampler, TorchReference, row_seeds

PROMPTS, BUDGET = [[1, 10, 11, 12], [1, 20]], TransportBudget(nats=3.0)


@pytest.fixture
def parts(tiny_lm):
    value = RewardModel.from_base(tiny_lm, num_layers=1).freeze()
    return TorchReference(tiny_lm, SamplingSettings(top_k=12, max_new_tokens=6), (2, 5), 0), value


class OwnPolicy(ImplicitPolicy):
    pass


def test_it_answers_as_the_policy_put_together_by_hand(parts):
    reference, value = parts
    made = make_policy(OwnPolicy, reference, value, BUDGET, "block", {"block_tokens": 2}, draws=2, select="softmax")
    decoder = BlockDecoder(reference, value.embedding_table_VD, block_tokens=2)
    by_hand = ImplicitPolicy(ReferenceSampler(reference), value, decoder, BUDGET, select="softmax", draws=2)
    assert type(made) is OwnPolicy and made.length_unit == by_hand.length_unit
    seeds_BN = row_seeds(0, [0, 1], 3)
    here, there = made(PROMPTS, seeds_BN), by_hand(PROMPTS, seeds_BN)
    assert torch.equal(here.transported.tokens_BNT, there.transported.tokens_BNT)
    assert torch.equal(here.selected_index_B, there.selected_index_B)


def test_a_given_sampler_draws_the_originals(parts):
    reference, value = parts
    sampler = ReferenceSampler(reference)
    policy = make_policy(ImplicitPolicy, reference, value, BUDGET, sampler=sampler, length_unit=2.0)
    assert policy.sampler is sampler and policy.length_unit == 2.0


def test_an_option_that_the_decoder_does_not_have_is_named(parts):
    with pytest.raises(ConfigError, match="'prior' has no option 'block_tokens'"):
        make_policy(ImplicitPolicy, *parts, BUDGET, "prior", {"block_tokens": 2})

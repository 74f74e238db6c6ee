"""The FLOP formula against the operations that PyTorch counts while the real calls run.

Counted are matrix products, attention's among them. The formula leaves out attention over the context (here 1 to 2%),
the head's share of a prompt that is charged and not computed, the tilt's inner products with a shortlist, and what
padding costs: rows of a batch that have ended, or that are kept to another length (``pivot``), ride along. So the model
is wide, the prompt short, the responses never end, and ``pivot`` has one row.
"""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from reward_models.modelling import RewardModel
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.evaluation.arms import Arm
from vgf_llm.evaluation.flops import PromptWork, Sizes, arm_flops
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.decoders.make import make_decoder
from vgf_llm.text.sampler import ReferenceSampler

PROMPT = [3, 4, 5]
NEVER_DRAWN = 10_000  # no token of the vocabulary, so that every response has its full length


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    reference = TorchReference(model, SamplingSettings(top_k=12, max_new_tokens=16), (NEVER_DRAWN,), 0)
    return reference, RewardModel.from_base(model, num_layers=2).freeze()


def counted_and_formula(parts, arm, keep_distributions=True):
    """FLOPs of sampling and of the policy as PyTorch counts them, and as the results table has them."""
    reference, value = parts
    reference._last_prefix = None  # the prompt is part of the bill
    decoder = make_decoder(arm.decoder, reference, value, arm.decoder_options)
    sampler = ReferenceSampler(reference)
    policy = ImplicitPolicy(sampler, value, decoder, arm.transport, draws=arm.draws)
    seeds = row_seeds(0, [0], arm.num_particles)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        samples = sampler.sample([PROMPT], seeds)
        outcome = policy.improve(
            samples if keep_distributions else dataclasses.replace(samples, distribution=None), seeds
        )
    assert (outcome.transported.lengths_BN == 16).all()
    sizes = Sizes.of(reference.model, value)
    sampled = float(outcome.originals.lengths_BN.sum())
    return counter.get_total_flops(), arm_flops(arm, sizes, len(PROMPT), sampled, PromptWork.of(outcome.work, 0))


ARMS = {
    "best-of-N": Arm(num_particles=4),
    "prior": Arm(num_particles=4, budget=TransportBudget(nats=4.0)),
    "prior, 3 draws": Arm(num_particles=4, draws=3, budget=TransportBudget(nats=4.0)),
    "prior, 2 rounds of 2 steps": Arm(num_particles=4, budget=TransportBudget(nats=4.0, rounds=2, steps=2)),
    "edit": Arm(num_particles=4, decoder="edit", budget=TransportBudget(rounds=6)),
    "edit_greedy": Arm(
        num_particles=4,
        decoder="edit_greedy",
        decoder_options={"proposals": 6, "checked": 2},
        budget=TransportBudget(rounds=3),
    ),
    "pivot": Arm(num_particles=1, decoder="pivot", budget=TransportBudget(rounds=6)),
    "block": Arm(
        num_particles=4, decoder="block", decoder_options={"block_tokens": 4}, budget=TransportBudget(nats=8.0)
    ),
}


@pytest.mark.parametrize("name", ARMS)
def test_formula_agrees_with_the_operations_that_are_run(parts, name):
    counted, formula = counted_and_formula(parts, ARMS[name])
    assert formula == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", ["prior", "edit", "edit_greedy", "pivot", "block"])
def test_a_text_without_distributions_costs_one_forward_more(parts, name):
    arm = ARMS[name]
    counted, formula = counted_and_formula(parts, arm, keep_distributions=False)
    with_distributions, formula_with_distributions = counted_and_formula(parts, arm)
    assert formula == pytest.approx(counted, rel=0.05)
    assert formula - formula_with_distributions == pytest.approx(counted - with_distributions, rel=0.05)

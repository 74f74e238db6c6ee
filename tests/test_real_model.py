"""The embedded pretrained model: what tiny models cannot show. Run by `make test-slow`."""

import pytest
import torch

from reward_models.modelling import RewardModel
from tests.text.moves import make_move
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.data.prompts import encode_prompt
from vgf_llm.evaluation.controls import flipped_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.models.loading import eos_token_ids, fingerprint, load_causal_lm, load_tokenizer
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import PriorDecoder, TorchReference, row_seeds
from vgf_llm.text.sampler import ReferenceSampler

pytestmark = pytest.mark.slow
TEXTS = ["Write one sentence about the sea.", "Describe a wooden chair in one sentence, please."]


@pytest.fixture(scope="module")
def parts():
    tokenizer, model = load_tokenizer(), load_causal_lm()
    reference = TorchReference(
        model, SamplingSettings(max_new_tokens=16), eos_token_ids(model, tokenizer), tokenizer.pad_token_id
    )
    value = RewardModel.from_base(model, num_layers=3, pooling="mean").freeze()
    return tokenizer, reference, value, [encode_prompt(tokenizer, text) for text in TEXTS]


def policy(parts, budget, **kwargs):
    _, reference, value, _ = parts
    return ImplicitPolicy(
        ReferenceSampler(reference), value, PriorDecoder(reference, value.embedding_table_VD), budget, **kwargs
    )


def test_the_embedded_tokenizer_can_stop_and_pad(parts):
    tokenizer, reference, _, ids = parts
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id not in reference.eos_ids
    assert tokenizer.decode(ids[0]).endswith("assistant\n")
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer())


def test_samples_are_fluent_and_do_not_depend_on_the_batch(parts):
    tokenizer, reference, _, prompts = parts
    seeds = row_seeds(0, [0, 1], 6)
    together = ReferenceSampler(reference).sample(prompts, seeds)
    alone = ReferenceSampler(reference).sample(prompts[1:], seeds[1:, 3:4])
    assert together.texts(tokenizer)[1][3] == alone.texts(tokenizer)[0][0]
    nll = -reference.logps(reference.prefix(prompts), together).sum() / together.mask_BNT.sum()
    assert 0.5 < nll.item() < 3.5


def test_budget_zero_returns_the_samples_token_for_token_and_selects_best_of_n(parts):
    _, reference, value, prompts = parts
    seeds = row_seeds(3, [0, 1], 6)
    samples = ReferenceSampler(reference).sample(prompts, seeds)
    outcome = policy(parts, TransportBudget.none())(prompts, seeds)
    values = value.score(value.prefix(prompts), samples.tokens_BNT, samples.mask_BNT)
    assert torch.equal(outcome.transported.tokens_BNT, samples.tokens_BNT)
    assert torch.equal(outcome.selected_index_B, values.argmax(1))
    assert torch.equal(outcome.selected.tokens_BNT[:, 0], samples.tokens_BNT[torch.arange(2), values.argmax(1)])


def test_a_zero_displacement_is_decoded_to_the_samples_token_for_token(parts):
    _, reference, value, prompts = parts
    samples = ReferenceSampler(reference).sample(prompts, row_seeds(5, [0, 1], 8))
    still = torch.zeros(*samples.tokens_BNT.shape, value.embedding_table_VD.shape[1])
    decoder = PriorDecoder(reference, value.embedding_table_VD)
    decoded = decoder.decode(
        decoder.prepare(prompts), make_move(value, samples, still, nats=4.0, seeds_BN=row_seeds(6, [0, 1], 8))
    )
    assert torch.equal(decoded.responses.tokens_BNT, samples.tokens_BNT)
    assert decoded.nats_BN.abs().max().item() < 1e-4


def test_the_measured_distance_grows_with_the_budget(parts):
    seeds = row_seeds(1, [0, 1], 8)
    spent = [policy(parts, TransportBudget(nats=n))(parts[3], seeds).nats_BN.mean().item() for n in (0.5, 2.0, 6.0)]
    assert 0.2 < spent[0] < spent[1] < spent[2] < 7.0


def test_flow_raises_a_value_and_its_negative_lowers_it(parts):
    """A value that is linear in the particles (a random input skip): the tilt must move the cloud either way."""
    _, reference, _, prompts = parts
    value = RewardModel.from_base(reference.model, num_layers=1, pooling="mean", input_skip=True)
    with torch.no_grad():
        value.skip_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    parts = (parts[0], reference, value.freeze(), prompts)
    seeds = row_seeds(2, [0, 1], 8)
    up = policy(parts, TransportBudget(nats=4.0))(prompts, seeds)
    down = policy(parts, TransportBudget(nats=4.0), gradient=flipped_gradient())(prompts, seeds)
    base = up.original_values_BN.mean()
    assert down.transported_values_BN.mean() < base < up.transported_values_BN.mean()

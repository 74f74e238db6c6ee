"""``edit`` and ``pivot`` against p(y | x) exp(R(y) / alpha), with every response of a tiny model written out."""

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reward_models.modelling import RewardModel
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.evaluation.controls import no_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import EditDecoder, EditGreedyDecoder, PivotDecoder, TorchReference, row_seeds
from vgf_llm.text.particles import exact_gradient
from vgf_llm.text.responses import concatenate
from vgf_llm.text.sampler import ReferenceSampler

PAD, EOS, VOCABULARY, LENGTH, ALPHA = 0, 1, 6, 3, 1.0
PROMPT = [3, 4]


@pytest.fixture(scope="module")
def parts():
    """A random model over six tokens, and a reward whose spread over responses is about 1."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    reference = TorchReference(model, SamplingSettings(top_k=5, max_new_tokens=LENGTH), (EOS,), PAD)
    value = RewardModel.from_base(model, num_layers=1, pooling="mean", input_skip=True)
    with torch.no_grad():
        value.skip_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return reference, value.freeze()


def all_responses():
    """Every response: up to two tokens and EOS, or three tokens; any token but EOS may stand inside."""
    inside = [token for token in range(VOCABULARY) if token != EOS]
    for length in range(LENGTH):
        yield from ((*body, EOS) for body in itertools.product(inside, repeat=length))
    yield from itertools.product(inside, repeat=LENGTH)


@torch.no_grad()
def enumerated(reference, value):
    """Every response with log p under the truncated distribution, by plain uncached forwards, and its reward."""
    table = {}
    for response in all_responses():
        sequence = torch.tensor([*PROMPT, *response])
        logits = reference.model(sequence.unsqueeze(0)).logits[0, len(PROMPT) - 1 : -1]
        kept = logits.topk(5)
        logp = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values.log_softmax(-1))
        mask = torch.tensor([[[False] * len(PROMPT) + [True] * len(response)]])
        reward = value(sequence.unsqueeze(0), response_mask=mask[0])
        own = logp.gather(-1, sequence[len(PROMPT) :].unsqueeze(-1)).sum()
        table[response] = (float(own), float(reward))
    return table


def distribution(table, alpha, lengths=None):
    """p exp(R / alpha), normalised; with ``lengths`` (shares by length) within each length."""
    weight = {y: math.exp(logp + r / alpha) for y, (logp, r) in table.items()}
    if lengths is None:
        total = sum(weight.values())
        return {y: w / total for y, w in weight.items()}
    totals: dict[int, float] = {}
    for y, w in weight.items():
        totals[movable(y)] = totals.get(movable(y), 0) + w
    return {y: w / totals[movable(y)] * lengths[movable(y)] for y, w in weight.items() if w}


def movable(y):
    """An edit keeps the number of tokens that are not EOS."""
    return len([token for token in y if token != EOS])


def frequencies(responses):
    rows = as_tuples(responses)
    return {y: count / len(rows) for y, count in Counter(rows).items()}


def as_tuples(responses):
    pairs = zip(responses.tokens_BNT[0].tolist(), responses.mask_BNT[0].tolist(), strict=True)
    return [tuple(token for token, kept in zip(row, keep, strict=True) if kept) for row, keep in pairs]


def total_variation(one, other):
    return sum(abs(one.get(y, 0) - other.get(y, 0)) for y in set(one) | set(other)) / 2


def run(parts, decoder, gradient=exact_gradient, *, chains, burn_in, more=0):
    """Frequencies of the originals and of the chains after ``burn_in`` rounds, pooled over ``more`` further stops."""
    reference, value = parts
    budget = TransportBudget(rounds=burn_in, temperature=ALPHA, nats=1e6, max_token_nats=0.3)
    policy = ImplicitPolicy(ReferenceSampler(reference), value, decoder, budget, gradient=gradient)
    outcome = policy([PROMPT], row_seeds(0, [0], chains))
    stops, originals = [outcome.transported], frequencies(outcome.originals)
    policy.budget = TransportBudget(rounds=5, temperature=ALPHA, nats=1e6, max_token_nats=0.3)
    for stop in range(more):
        stops.append(policy.improve(stops[-1], row_seeds(1 + stop, [0], chains)).transported)
    return originals, frequencies(concatenate(stops))


def of_each_length(table, originals):
    """An edit never changes a length, so its target is conditional on it."""
    shares = dict.fromkeys(range(LENGTH + 1), 0.0)
    for y, share in originals.items():
        shares[movable(y)] += share
    return distribution(table, ALPHA, shares)


def test_samples_follow_the_enumerated_distribution(parts):
    table = enumerated(*parts)
    assert sum(math.exp(logp) for logp, _ in table.values()) == pytest.approx(1, abs=1e-5)
    samples = ReferenceSampler(parts[0]).sample([PROMPT], row_seeds(0, [0], 20_000))
    p = {y: math.exp(logp) for y, (logp, _) in table.items()}
    assert total_variation(frequencies(samples), p) < 0.03


@pytest.mark.parametrize("decoder", [EditDecoder, PivotDecoder])
def test_a_few_rounds_go_most_of_the_way(parts, decoder):
    """From 0.35 away to within 0.09, of which the sampling noise of 3,000 chains is 0.05."""
    table = enumerated(*parts)
    before, after = run(parts, decoder(parts[0], parts[1].embedding_table_VD), chains=3_000, burn_in=25)
    target = distribution(table, ALPHA) if decoder is PivotDecoder else of_each_length(table, before)
    assert total_variation(before, target) > 0.25
    assert total_variation(after, target) < 0.09


def test_greedy_edits_only_climb(parts):
    """R / alpha + log p of no response falls, and the mean ends above that of the optimum's own samples."""
    table = enumerated(*parts)
    decoder = EditGreedyDecoder(parts[0], parts[1].embedding_table_VD, proposals=4, checked=2)
    budget = TransportBudget(rounds=4, temperature=ALPHA)
    outcome = ImplicitPolicy(ReferenceSampler(parts[0]), parts[1], decoder, budget)([PROMPT], row_seeds(0, [0], 500))
    rise = [
        sum(table[after]) - sum(table[before])
        for before, after in zip(as_tuples(outcome.originals), as_tuples(outcome.transported), strict=True)
    ]
    assert min(rise) > -1e-4 and sum(rise) / len(rise) > 0.5
    optimum = of_each_length(table, frequencies(outcome.originals))
    climbed = frequencies(outcome.transported)
    assert sum(share * sum(table[y]) for y, share in climbed.items()) > sum(
        share * sum(table[y]) for y, share in optimum.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("tilted_tokens", [1, 3])
def test_pivot_reaches_the_kl_regularised_optimum(parts, tilted_tokens):
    """Total variation below 0.02, where the start is 0.35 away."""
    decoder = PivotDecoder(parts[0], parts[1].embedding_table_VD, tilted_tokens=tilted_tokens)
    before, after = run(parts, decoder, chains=6_000, burn_in=50, more=12)
    target = distribution(enumerated(*parts), ALPHA)
    assert total_variation(before, target) > 0.25
    assert total_variation(after, target) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [exact_gradient, no_gradient()])
def test_edit_reaches_the_optimum_of_each_length_whatever_the_direction(parts, gradient):
    """The direction proposes, the test decides: it changes the speed and not the distribution."""
    decoder = EditDecoder(parts[0], parts[1].embedding_table_VD)
    before, after = run(parts, decoder, gradient, chains=6_000, burn_in=70, more=14)
    target = of_each_length(enumerated(*parts), before)
    assert total_variation(before, target) > 0.25
    assert total_variation(after, target) < 0.02

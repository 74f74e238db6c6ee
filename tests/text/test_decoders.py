"""Decoders and the implicit policy on tiny models: identities, distributions, budgets."""

import dataclasses

import pytest
import torch

from reward_models.modelling import RewardModel
from tests.text.moves import make_move
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.evaluation.controls import flipped_gradient, random_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import NearestDecoder, PriorDecoder, TorchReference, row_seeds
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.tilt import kl_divergence, tilt

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]


@pytest.fixture
def reference(any_lm):
    return TorchReference(any_lm, SamplingSettings(top_k=12, max_new_tokens=9), eos_ids=(2, 5), pad_id=0)


@pytest.fixture
def value(any_lm):
    return RewardModel.from_base(any_lm, num_layers=1).freeze()


def policy(reference, value, budget, decoder=None, **kwargs):
    decoder = decoder or PriorDecoder(reference, value.embedding_table_VD)
    return ImplicitPolicy(ReferenceSampler(reference), value, decoder, budget, **kwargs)


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(reference):
    seeds = row_seeds(0, [0, 1, 2], 4)
    together = ReferenceSampler(reference).sample(PROMPTS, seeds)
    alone = ReferenceSampler(reference).sample(PROMPTS[1:2], seeds[1:2, 2:3])
    length = int(alone.lengths_BN.max())
    assert torch.equal(together.tokens_BNT[1, 2, :length], alone.tokens_BNT[0, 0, :length])
    assert together.lengths_BN[1, 2] == alone.lengths_BN[0, 0]


def test_sampling_follows_the_distribution(reference):
    """20,000 first tokens against the truncated softmax; the largest standard error is 0.0035."""
    samples = ReferenceSampler(dataclasses_replace_length(reference, 1)).sample(PROMPTS[:1], row_seeds(0, [0], 20_000))
    logits = reference.model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    kept = logits.topk(12)
    expected = torch.zeros_like(logits).scatter_(0, kept.indices, kept.values.softmax(-1))
    found = torch.bincount(samples.tokens_BNT.flatten(), minlength=len(logits)) / 20_000
    assert (found - expected).abs().max().item() < 0.015


def dataclasses_replace_length(reference, length):
    sampling = dataclasses.replace(reference.sampling, max_new_tokens=length)
    return TorchReference(reference.model, sampling, reference.eos_ids, reference.pad_id)


def test_several_eos_ids_end_a_response_and_nothing_follows(reference):
    samples = ReferenceSampler(reference).sample(PROMPTS, row_seeds(1, [0, 1, 2], 32))
    ended = samples.eos_BNT.any(-1)
    assert ended.any() and not ended.all()
    assert {2, 5} & set(samples.tokens_BNT[samples.eos_BNT].tolist())
    assert (samples.eos_BNT.sum(-1) <= 1).all()
    last = samples.tokens_BNT.gather(-1, samples.lengths_BN.unsqueeze(-1) - 1).squeeze(-1)
    assert torch.isin(last[ended], torch.tensor([2, 5])).all()
    assert (samples.tokens_BNT[~samples.mask_BNT] == 0).all()


def test_logps_agree_with_a_plain_forward(reference):
    samples = ReferenceSampler(reference).sample(PROMPTS, row_seeds(0, [0, 1, 2], 2))
    logps = reference.logps(reference.prefix(PROMPTS), samples)
    for b, prompt in enumerate(PROMPTS):
        length = int(samples.lengths_BN[b, 1])
        response = samples.tokens_BNT[b, 1, :length]
        with torch.no_grad():
            logits = reference.model(torch.cat([torch.tensor(prompt), response]).unsqueeze(0)).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logps[b, 1, :length], expected, atol=1e-5, rtol=0)
        assert (logps[b, 1, length:] == 0).all()


def test_zero_budget_is_best_of_n_token_for_token(reference, value):
    outcome = policy(reference, value, TransportBudget.none())(PROMPTS, row_seeds(0, [0, 1, 2], 6))
    assert outcome.transported is outcome.originals
    best = outcome.original_values_BN.argmax(1)
    assert torch.equal(outcome.selected_index_B, best)
    assert torch.equal(outcome.selected.tokens_BNT[:, 0], outcome.originals.tokens_BNT[torch.arange(3), best])
    assert torch.equal(outcome.selected_values_B, outcome.original_values_BN.amax(1))


@pytest.mark.parametrize("decoder", ["prior", "nearest"])
def test_zero_displacement_gives_every_token_back(reference, value, decoder):
    samples = ReferenceSampler(reference).sample(PROMPTS, row_seeds(0, [0, 1, 2], 16))
    table = value.embedding_table_VD
    decoder = PriorDecoder(reference, table) if decoder == "prior" else NearestDecoder(table, (0, 2, 5))
    still = torch.zeros(*samples.tokens_BNT.shape, table.shape[1])
    decoded = decoder.decode(
        decoder.prepare(PROMPTS),
        make_move(value, samples, still, nats=3.0, seeds_BN=row_seeds(9, [0, 1, 2], 16)),
    )
    assert torch.equal(decoded.responses.tokens_BNT, samples.tokens_BNT)
    assert torch.equal(decoded.responses.mask_BNT, samples.mask_BNT)


def test_zero_nats_gives_every_token_back(reference, value):
    outcome = policy(reference, value, TransportBudget(nats=0.0))(PROMPTS, row_seeds(0, [0, 1, 2], 8))
    assert torch.equal(outcome.transported.tokens_BNT, outcome.originals.tokens_BNT)
    assert outcome.nats_BN.abs().max().item() < 1e-5


def test_prior_follows_its_tilted_distribution(reference, value):
    """First tokens of 20,000 pairs: y ~ p and one direction for all imply y' ~ q; EOS keeps its probability."""
    one_token = dataclasses_replace_length(reference, 1)
    table = value.embedding_table_VD
    seeds = row_seeds(4, [0], 20_000)
    samples = ReferenceSampler(one_token).sample(PROMPTS[:1], seeds)
    direction = torch.randn(table.shape[1])
    delta = direction.expand(1, 20_000, 1, -1) * samples.movable_BNT.unsqueeze(-1)
    decoder = PriorDecoder(one_token, table)
    move = make_move(value, samples, delta, nats=0.4, max_token_nats=10.0, seeds_BN=row_seeds(5, [0], 20_000))
    decoded = decoder.decode(decoder.prepare(PROMPTS[:1]), move)
    assert 0.3 < decoded.nats_BN[samples.movable_BNT[..., 0]].mean().item() < 0.41
    distribution = one_token.shortlists(decoder.prepare(PROMPTS[:1]), samples)
    eos = torch.isin(distribution.ids, torch.tensor([2, 5]))
    # b_v = <Delta, e_v> - <Delta, e_y>: the second term is the same for all v, so every moved row has the same q
    bonus = (table @ direction)[distribution.ids[0, 0]]
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        q = tilt(distribution.logps[0, 0], bonus, torch.tensor(middle), eos[0, 0])
        low, high = (middle, high) if kl_divergence(q, distribution.logps[0, 0]) < 0.4 else (low, middle)
    size = int(distribution.ids.max()) + 1
    p = torch.zeros(size).scatter_add_(0, distribution.ids[0, 0], distribution.logps[0, 0].exp())
    q = torch.zeros(size).scatter_add_(0, distribution.ids[0, 0], q.exp())
    found = torch.bincount(decoded.responses.tokens_BNT.flatten(), minlength=size)[:size] / 20_000
    assert (found - q).abs().max().item() < 0.015
    assert abs(found[[2, 5]].sum().item() - p[[2, 5]].sum().item()) < 0.006


def test_nats_spent_grow_with_the_budget_and_changed_tokens_follow(reference, value):
    seeds = row_seeds(0, [0, 1, 2], 16)
    spent, changed = [], []
    for nats in (0.0, 0.3, 1.0, 3.0):
        outcome = policy(reference, value, TransportBudget(nats=nats, max_token_nats=5.0))(PROMPTS, seeds)
        spent.append(outcome.nats_BN.mean().item())
        changed.append(
            (outcome.transported.tokens_BNT[:, :, :1] != outcome.originals.tokens_BNT[:, :, :1]).sum().item()
        )
    assert spent == sorted(spent) and spent[0] < 1e-4 < spent[1]
    assert changed == sorted(changed) and changed[0] == 0 < changed[-1]


def test_the_gradient_raises_the_value_and_its_negative_lowers_it(reference, value):
    seeds = row_seeds(0, list(range(3)), 64)
    budget = TransportBudget(nats=2.0)
    up = policy(reference, value, budget)(PROMPTS, seeds)
    down = policy(reference, value, budget, gradient=flipped_gradient())(PROMPTS, seeds)
    noise = policy(reference, value, budget, gradient=random_gradient(0))(PROMPTS, seeds)
    base = up.original_values_BN.mean().item()
    means = [outcome.transported_values_BN.mean().item() for outcome in (down, noise, up)]
    assert means[0] < base < means[2]
    assert means[0] < means[1] < means[2]


def test_selected_value_is_never_below_best_of_n(reference, value):
    for rounds in (1, 3):
        outcome = policy(reference, value, TransportBudget(nats=2.0, rounds=rounds))(
            PROMPTS, row_seeds(2, [0, 1, 2], 4)
        )
        assert (outcome.selected_values_B >= outcome.original_values_BN.amax(1)).all()


@pytest.mark.parametrize("kernel", ["none", "rbf"])
@pytest.mark.parametrize("step", ["sgd", "adam", "normalised"])
def test_every_kind_of_step_and_kernel_runs_and_leaves_eos_and_padding(reference, value, step, kernel):
    budget = TransportBudget(steps=3, step_size=0.5, step=step, kernel=kernel)
    nearest = NearestDecoder(value.embedding_table_VD, (0, 2, 5))
    outcome = policy(reference, value, budget, nearest)(PROMPTS, row_seeds(0, [0, 1, 2], 8))
    before, after = outcome.originals, outcome.transported
    assert torch.equal(before.mask_BNT, after.mask_BNT)
    assert torch.equal(before.tokens_BNT[before.eos_BNT], after.tokens_BNT[before.eos_BNT])
    assert not torch.isin(after.tokens_BNT[after.movable_BNT], torch.tensor([0, 2, 5])).any() or step != "normalised"
    assert (outcome.displacement_BN > 0).any()
    assert outcome.nats_BN.isnan().all()


def test_nearest_projects_to_the_closest_row(value):
    table = value.embedding_table_VD
    from vgf_llm.text.responses import Responses

    tokens = torch.tensor([[[10, 11, 12, 2]]])
    responses = Responses([[1]], tokens, torch.ones_like(tokens, dtype=torch.bool), (2,), 0)
    delta = torch.zeros(1, 1, 4, table.shape[1])
    delta[0, 0, 1] = (table[40] - table[11]) * 0.9
    delta[0, 0, 2] = table[2] - table[12]  # onto EOS itself: excluded, so another token
    decoded = NearestDecoder(table, (0, 2)).decode(
        None, make_move(None, responses, delta, nats=0.0, seeds_BN=torch.zeros(1, 1))
    )
    result = decoded.responses.tokens_BNT[0, 0].tolist()
    assert result[0] == 10 and result[1] == 40 and result[3] == 2
    assert result[2] not in (0, 2)


def test_softmax_and_random_selection_stay_in_the_pool(reference, value):
    seeds = row_seeds(0, [0, 1, 2], 8)
    for select in ("softmax", "random"):
        outcome = policy(reference, value, TransportBudget(nats=1.0), select=select)(PROMPTS, seeds)
        assert ((outcome.selected_index_B >= 0) & (outcome.selected_index_B < 16)).all()
    with pytest.raises(ValueError, match="select must be"):
        policy(reference, value, TransportBudget.none(), select="best")

"""Several texts of each moved particle: the first is coupled to its original, the others are independent draws."""

import dataclasses

import pytest
import torch
from torch.nn.functional import pad

from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from vgf_llm.answering import answer as answering
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.errors import ConfigError
from vgf_llm.evaluation.controls import no_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import BlockDecoder, EditDecoder, PivotDecoder, PriorDecoder, TorchReference, Work, row_seeds
from vgf_llm.text.responses import changed_tokens
from vgf_llm.text.sampler import ReferenceSampler

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]
ROWS = 20_000


@pytest.fixture
def parts():
    model = build_llama()
    reference = TorchReference(model, SamplingSettings(top_k=12, max_new_tokens=9), eos_ids=(2, 5), pad_id=0)
    return reference, RewardModel.from_base(model, num_layers=1).freeze()


def run(parts, budget, *, prompts=PROMPTS, n=6, seed=0, decoder=PriorDecoder, **options):
    reference, value = parts
    policy = ImplicitPolicy(
        ReferenceSampler(reference), value, decoder(reference, value.embedding_table_VD), budget, **options
    )
    return policy(prompts, row_seeds(seed, list(range(len(prompts))), n))


def tokens(responses):
    return pad(responses.tokens_BNT, (0, 9 - responses.tokens_BNT.shape[-1]))


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_first_draw_of_each_particle_is_that_of_one_draw(parts, rounds):
    budget = TransportBudget(nats=3.0, rounds=rounds)
    one, three = run(parts, budget), run(parts, budget, draws=3)
    assert three.transported.tokens_BNT.shape[:2] == (3, 18) == three.transported_values_BN.shape
    assert three.nats_RBN.shape == (rounds, 3, 18) == three.displacement_RBN.shape
    assert torch.equal(tokens(three.transported)[:, ::3], tokens(one.transported))
    if rounds == 1:
        assert torch.equal(three.nats_BN[:, ::3], one.nats_BN)
    assert (changed_tokens(one.transported, one.originals) > 0).any()
    others = tokens(three.transported).view(3, 6, 3, 9)
    assert (others[:, :, 1] != others[:, :, 2]).any(-1).float().mean() > 0.9


def test_a_particle_that_was_not_moved_gives_its_original_and_a_fresh_sample(parts):
    """One token, 20,000 rows: the second draw follows p, and equals the first with probability sum_v p(v)^2."""
    reference, value = parts
    sampling = dataclasses.replace(reference.sampling, max_new_tokens=1)
    one_token = TorchReference(reference.model, sampling, reference.eos_ids, reference.pad_id)
    outcome = run((one_token, value), TransportBudget(), prompts=PROMPTS[:1], n=ROWS, draws=2, gradient=no_gradient())
    first, second = outcome.transported.tokens_BNT[0, :, 0].view(ROWS, 2).unbind(1)
    assert torch.equal(first, outcome.originals.tokens_BNT[0, :, 0])
    distribution = outcome.originals.distribution
    p = torch.zeros(len(value.embedding_table_VD)).scatter_(
        0, distribution.ids[0, 0, 0], distribution.logps[0, 0, 0].exp()
    )
    assert (torch.bincount(second, minlength=len(p)) / ROWS - p).abs().max().item() < 0.015
    assert (first == second).float().mean().item() == pytest.approx(p.square().sum().item(), abs=0.012)
    assert (outcome.nats_BN == 0).all()


@pytest.mark.parametrize("decoder", [PriorDecoder, BlockDecoder])
def test_selected_value_is_never_below_best_of_n(parts, decoder):
    outcome = run(parts, TransportBudget(nats=2.0, rounds=2), decoder=decoder, draws=2)
    assert (outcome.selected_values_B >= outcome.original_values_BN.amax(1)).all()
    assert (outcome.selected_values_B >= outcome.transported_values_BN.amax(1)).all()


def test_generate_names_the_sample_that_a_draw_came_from(parts, tiny_tokenizer):
    """The pool written out: 4 originals, then 2 rounds of 4 particles with 3 draws each, side by side."""
    pool = [(0, particle, 0) for particle in range(4)]
    pool += [(r, particle, draw) for r in (1, 2) for particle in range(4) for draw in range(3)]
    rounds_seen = set()
    for seed in range(8):
        outcome = run(parts, TransportBudget(nats=2.0, rounds=2), n=4, seed=seed, draws=3, select="random")
        originals = outcome.originals.texts(tiny_tokenizer)
        for b, row in enumerate(answering.outcome_rows(["a", "b", "c"], outcome, tiny_tokenizer)):
            rounds, particle, draw = pool[int(outcome.selected_index_B[b])]
            rounds_seen.add(rounds)
            assert row["rounds"] == rounds and row["source"] == originals[b][particle]
            nats = outcome.nats_RBN[:rounds, b, 3 * particle + draw].sum().item()
            assert row["distance"]["nats"] == pytest.approx(nats, abs=1e-3)
    assert rounds_seen == {0, 1, 2}


@pytest.mark.parametrize("decoder", [PriorDecoder, BlockDecoder])
def test_without_a_direction_coupled_texts_stay_and_values_are_right(parts, decoder):
    outcome = run(parts, TransportBudget(nats=3.0, rounds=2), decoder=decoder, gradient=no_gradient())
    plain = run(parts, TransportBudget.none())
    assert torch.equal(tokens(outcome.transported), tokens(plain.originals))
    assert (outcome.nats_BN == 0).all() and (outcome.displacement_BN == 0).all()
    torch.testing.assert_close(outcome.original_values_BN, plain.original_values_BN, atol=1e-5, rtol=0)


def test_at_least_one_draw(parts):
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        run(parts, TransportBudget(), draws=0)


def test_work_is_counted_on_the_host_wherever_the_responses_are():
    """A fake CUDA tensor stands for responses on a GPU: adding counts of two devices would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        lengths_BN = torch.ones(2, 3, device="cuda")
        work = Work.none(2) + Work.of(lengths_BN, reference=1, value=2)
    assert work.reference_B.device.type == "cpu" and work.value_B.shape == (2,)


@pytest.mark.parametrize("name", ["edit", "pivot"])
def test_a_kernel_is_refused_where_a_test_takes_the_direction_back(parts, name):
    reference, value = parts
    decoder = {"edit": EditDecoder, "pivot": PivotDecoder}[name](reference, value.embedding_table_VD)
    policy = ImplicitPolicy(ReferenceSampler(reference), value, decoder, TransportBudget(kernel="rbf"))
    with pytest.raises(ConfigError, match=f"decoder '{name}' needs budget.kernel none"):
        policy(PROMPTS, row_seeds(0, [0, 1, 2], 4))

"""One-pass transported sampling, with every response of a tiny model written out."""

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vgf_llm.errors import SettingError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.bonus import TableBonus
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.stream import Steering, StreamSampler, TiltedDraws, bonus_variance, expected_left, steered_multiplier
from vgf_llm.text.tilt import tilt

PAD, EOS, VOCABULARY, LENGTH = 0, 1, 6, 3
PROMPT = [3, 4]
BONUS_V = torch.tensor([0.3, 5.0, -0.6, 0.9, 0.0, -0.2])


@pytest.fixture(scope="module")
def reference():
    """A random model over six tokens."""
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
    return TorchReference(model, SamplingSettings(top_k=5, max_new_tokens=LENGTH), (EOS,), PAD)


@torch.no_grad()
def enumerated(reference, nats, cap):
    """Return q and the nats of every response, by plain uncached forwards and the steering written out for one row."""
    found = {}
    inside = [token for token in range(VOCABULARY) if token != EOS]
    texts = [(*body, EOS) for length in range(LENGTH) for body in itertools.product(inside, repeat=length)]
    for text in [*texts, *itertools.product(inside, repeat=LENGTH)]:
        logq, spent, seen = 0.0, 0.0, []
        for t, token in enumerate(text):
            logits_V = reference.model(torch.tensor([PROMPT + list(text[:t])])).logits[0, -1]
            values, ids = logits_V.topk(5)
            logp = values.log_softmax(-1)
            is_eos = ids == EOS
            b = BONUS_V[ids].masked_fill(is_eos, 0)
            variance = float(bonus_variance(logp[None], b[None], is_eos[None]))
            mean = sum(seen) / len(seen) if seen else variance
            s = math.sqrt(2 * max(nats - spent, 0) / ((LENGTH - t) * mean))

            def kl_of(s, logp=logp, b=b, is_eos=is_eos):
                logq_K = tilt(logp, b, torch.tensor(s), is_eos)
                return float((logq_K.exp() * (logq_K - logp)).sum()), logq_K

            used, most = s, min(cap, nats - spent)
            if kl_of(s)[0] > most:
                low, high = 0.0, s
                for _ in range(60):
                    middle = (low + high) / 2
                    low, high = (low, middle) if kl_of(middle)[0] > most else (middle, high)
                used = low
            kl, logq_K = kl_of(used)
            spent += kl
            seen.append(2 * kl / s**2 if s > 0 else variance)
            place = (ids == token).nonzero()
            logq = logq + float(logq_K[place[0, 0]]) if len(place) else -math.inf
        found[text] = (math.exp(logq), spent)
    return found


@pytest.mark.parametrize(("nats", "cap"), [(0.6, 1.0), (3.0, 0.3), (0.05, 1.0)])
def test_texts_follow_the_tilted_distribution_and_state_their_nats(reference, nats, cap):
    expected = enumerated(reference, nats, cap)
    assert sum(q for q, _ in expected.values()) == pytest.approx(1, abs=1e-5)
    n = 4000
    streamed = StreamSampler(reference, TableBonus(BONUS_V), Steering(nats, cap)).stream([PROMPT], row_seeds(1, [0], n))
    texts = [
        tuple(row[keep].tolist())
        for row, keep in zip(streamed.responses.tokens_BNT[0], streamed.responses.mask_BNT[0], strict=True)
    ]
    for text, spent in zip(texts, streamed.nats_BN[0].tolist(), strict=True):
        assert spent == pytest.approx(expected[text][1], abs=1e-4)
        assert spent <= nats + 1e-4
    counts = Counter(texts)
    common = [text for text, (q, _) in expected.items() if q * n >= 5]
    rest = n * (1 - sum(expected[text][0] for text in common))
    chi2 = sum((counts[text] - n * expected[text][0]) ** 2 / (n * expected[text][0]) for text in common)
    if rest > 5:
        chi2 += (n - sum(counts[text] for text in common) - rest) ** 2 / rest
    freedom = len(common)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_without_nats_a_text_is_the_samplers_own(reference):
    seeds_BN = row_seeds(5, [0, 1], 8)
    prompts = [PROMPT, [2, 5, 4]]
    plain = ReferenceSampler(reference).sample(prompts, seeds_BN)
    streamed = StreamSampler(reference, TableBonus(BONUS_V), Steering(0.0, 1.0)).stream(prompts, seeds_BN)
    assert torch.equal(streamed.responses.tokens_BNT, plain.tokens_BNT)
    assert float(streamed.nats_BN.abs().max()) == 0


def test_a_text_depends_on_its_prompt_and_seed_alone(reference):
    sampler = StreamSampler(reference, TableBonus(BONUS_V), Steering(1.0, 1.0, variance=0.2))
    seeds_BN = row_seeds(7, [0, 1], 6)
    together = sampler.stream([PROMPT, [2, 5, 4]], seeds_BN)
    alone = sampler.stream([[2, 5, 4]], seeds_BN[1:, 2:3])
    width = alone.responses.tokens_BNT.shape[-1]
    assert torch.equal(alone.responses.tokens_BNT[0, 0], together.responses.tokens_BNT[1, 2, :width])
    assert float(alone.nats_BN) == pytest.approx(float(together.nats_BN[1, 2]), abs=1e-5)


def test_the_end_keeps_its_probability_whatever_its_bonus(reference):
    n = 4000
    sampler = StreamSampler(reference, TableBonus(BONUS_V), Steering(2.0, 2.0))
    first = sampler.stream([PROMPT], row_seeds(2, [0], n)).responses.tokens_BNT[0, :, 0]
    with torch.no_grad():
        logits_V = reference.model(torch.tensor([PROMPT])).logits[0, -1]
    values, ids = logits_V.topk(5)
    probability = float(values.softmax(-1)[ids == EOS].sum())
    assert float((first == EOS).float().mean()) == pytest.approx(probability, abs=0.03)


def test_steering_by_hand():
    s_R = steered_multiplier(torch.tensor([2.0, 0.0, 1.0]), 4.0, torch.tensor([0.25, 1.0, 0.0]))
    assert s_R.tolist() == pytest.approx([2.0, 0.0, 0.0])
    assert expected_left(torch.tensor([1, 3, 3]), 4).tolist() == pytest.approx([7 / 3, 2.0, 1.0, 1.0])


def test_a_bonus_sees_what_the_output_layer_reads(reference):
    seen = []

    class Source:
        reads_hidden, passes = True, 0.0

        def begin(self, prompts, rows_per_prompt):
            def bonus(shortlist, hidden_RD, last_token_R):
                seen.append((hidden_RD.clone(), None if last_token_R is None else last_token_R.clone()))
                return torch.zeros_like(shortlist.logps)

            return bonus

    streamed = StreamSampler(reference, Source(), Steering(1.0, 1.0)).stream([PROMPT], row_seeds(3, [0], 4))
    tokens_NT, mask_NT = streamed.responses.tokens_BNT[0], streamed.responses.mask_BNT[0]
    assert seen[0][1] is None
    for t, (hidden_ND, last_N) in enumerate(seen):
        for row in range(4):
            if t and not mask_NT[row, t - 1] or t and int(tokens_NT[row, t - 1]) == EOS:
                assert int(last_N[row]) == -1
                continue
            text = tokens_NT[row, :t].tolist()
            with torch.no_grad():
                whole = reference.model.model(torch.tensor([PROMPT + text])).last_hidden_state[0, -1]
            torch.testing.assert_close(hidden_ND[row], whole, atol=1e-5, rtol=1e-4)
            assert last_N is None or int(last_N[row]) == text[-1]


def test_a_token_that_could_not_vary_says_nothing_of_those_that_can():
    """The first position has one token alone; the nats are spent at the open one after it."""
    logits = {0: torch.tensor([[9.0, -99, -99, -99]]), 1: torch.tensor([[1.0, 1.0, 1.0, 1.0]])}
    bonus = TableBonus(torch.tensor([0.0, 1.0, 2.0, 3.0])).begin([[0]], 1)
    draws = TiltedDraws(
        SamplingSettings(top_k=2, max_new_tokens=2), torch.tensor([5]), (7,), bonus, Steering(0.2, math.inf)
    )
    draws(logits[0], 0)
    assert float(draws.nats_R) == pytest.approx(0, abs=1e-6)
    draws(logits[1], 1)
    assert float(draws.nats_R) > 0.1


@pytest.mark.parametrize(("nats", "cap"), [(math.inf, 1.0), (math.nan, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_steering_refuses_what_is_not_a_budget(nats, cap):
    with pytest.raises(SettingError):
        Steering(nats, cap)

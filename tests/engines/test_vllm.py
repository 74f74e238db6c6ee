"""The real vLLM engine on the tiny model: tokens, distributions and nats as in transformers, for every decoder."""

from __future__ import annotations

import _thread
import dataclasses
import os
import signal
import threading
import time

import pytest
import torch
from torch.nn.functional import pad

from tests.conftest import build_llama, build_tokenizer
from tests.engines.conftest import EOS_IDS, TINY_ENGINE, WIDTH, quiet_vllm
from tests.text.moves import make_move
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.engines.engine import EngineError, EngineRequest, RequestRefusedError
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.engines.engine_thread import EngineThread
from vgf_llm.errors import ConfigError
from vgf_llm.evaluation.controls import random_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.models.loading import load_skeleton
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import (
    BlockDecoder,
    EditDecoder,
    EditGreedyDecoder,
    PivotDecoder,
    PriorDecoder,
    TorchReference,
    row_seeds,
)
from vgf_llm.text.choosing import Draws
from vgf_llm.text.plans import RowPlan
from vgf_llm.text.responses import Responses
from vgf_llm.text.sampler import ReferenceSampler

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]
SAMPLING = SamplingSettings(top_k=12, top_p=0.9, temperature=0.9, max_new_tokens=9)
N = 8

DECODERS = {
    "prior": (PriorDecoder, {}, TransportBudget(nats=3.0, rounds=2)),
    "prior, maximal": (PriorDecoder, {"coupling": "maximal"}, TransportBudget(nats=3.0)),
    "prior, a token": (PriorDecoder, {"multiplier": "token"}, TransportBudget(nats=2.0)),
    "prior, dropped": (PriorDecoder, {"after_change": "drop"}, TransportBudget(nats=3.0)),
    "block": (BlockDecoder, {"block_tokens": 3}, TransportBudget(nats=3.0)),
    "pivot": (PivotDecoder, {"tilted_tokens": 2}, TransportBudget(rounds=3, temperature=0.3)),
    "edit": (EditDecoder, {}, TransportBudget(rounds=3, temperature=0.3)),
    "edit_greedy": (EditGreedyDecoder, {}, TransportBudget(rounds=2, temperature=0.3)),
}


def answer(reference, value, decoder, options, budget, *, seed=0, n=N, draws=1, prompts=PROMPTS):
    policy = ImplicitPolicy(
        ReferenceSampler(reference),
        value,
        decoder(reference, value.embedding_table_VD, **options),
        budget,
        gradient=random_gradient(0),  # the tiny value's own is too small to change much
        draws=draws,
    )
    return policy(prompts, row_seeds(seed, list(range(len(prompts))), n))


def tokens(responses):
    return pad(responses.tokens_BNT, (0, 9 - responses.tokens_BNT.shape[-1]))


@pytest.mark.parametrize("name", DECODERS)
def test_an_engine_writes_the_same_tokens(tiny_engine, name):
    decoder, options, budget = DECODERS[name]
    draws = 2 if decoder is PriorDecoder else 1
    here, there = (
        answer(reference, tiny_engine.value, decoder, options, budget, draws=draws)
        for reference in tiny_engine.both(SAMPLING)
    )
    assert torch.equal(tokens(here.originals), tokens(there.originals))
    assert torch.equal(tokens(here.transported), tokens(there.transported))
    assert torch.equal(here.transported.mask_BNT, there.transported.mask_BNT)
    assert torch.equal(here.selected_index_B, there.selected_index_B)
    torch.testing.assert_close(here.nats_BN, there.nats_BN, atol=1e-4, rtol=0, equal_nan=True)
    torch.testing.assert_close(here.transported_values_BN, there.transported_values_BN, atol=1e-4, rtol=0)
    changed = tokens(there.transported) != tokens(there.originals).repeat_interleave(draws, 1)
    assert changed.any()
    assert torch.equal(here.work.reference_B, there.work.reference_B)


def test_the_kept_distributions_are_those_of_the_transformers_backend(tiny_engine):
    seeds = row_seeds(0, [0, 1, 2], N)
    here, there = (ReferenceSampler(one).sample(PROMPTS, seeds) for one in tiny_engine.both(SAMPLING))
    mask = here.mask_BNT
    assert torch.equal(here.distribution.ids[mask], there.distribution.ids[mask])
    torch.testing.assert_close(here.distribution.logps[mask], there.distribution.logps[mask], atol=1e-4, rtol=0)


def test_distributions_and_likelihoods_of_given_texts(tiny_engine):
    here, there = tiny_engine.both(SAMPLING)
    written = ReferenceSampler(here).sample(PROMPTS, row_seeds(0, [0, 1, 2], N))
    foreign = written.with_tokens(torch.randint(6, 40, written.tokens_BNT.shape))  # off the list here and there
    for responses in (written, foreign):
        likelihoods = [one.logps(one.prefix(PROMPTS), responses) for one in (here, there)]
        torch.testing.assert_close(*likelihoods, atol=1e-4, rtol=0)
        distributions = [one.shortlists(one.prefix(PROMPTS), responses) for one in (here, there)]
        mask = responses.mask_BNT.flatten(0, 1)
        torch.testing.assert_close(distributions[0].logps[mask], distributions[1].logps[mask], atol=1e-4, rtol=0)
        assert torch.equal(distributions[0].ids[mask], distributions[1].ids[mask])
    assert not torch.isinf(distributions[0].logps[..., -1][mask]).all()


def test_budgets_and_plain_requests_side_by_side(tiny_engine):
    """Rows of three policies and plain requests in one batch: each is what it is alone."""
    _, there = tiny_engine.both(SAMPLING)
    gathered: list[EngineRequest] = []
    engine = there.engine

    class Recorder:
        name = engine.name

        def run(self, requests):
            gathered.extend(requests)
            return engine.run(requests)

    there.engine = Recorder()
    for nats in (0.5, 2.0, 6.0):
        answer(there, tiny_engine.value, PriorDecoder, {}, TransportBudget(nats=nats), n=2)
    plain = [
        EngineRequest(prompt, 9, sampling=SAMPLING, seed=7 + i, logprobs=3) for i, prompt in enumerate(PROMPTS * 3)
    ]
    everything = [request for pair in zip(gathered, plain * 9, strict=False) for request in pair]
    alone = [engine.run([request])[0] for request in everything]
    together = engine.run(everything)
    assert [text.tokens for text in together] == [text.tokens for text in alone]
    assert len({tuple(text.tokens) for text in together}) > 10


def test_more_requests_than_the_engine_writes_at_a_time(tiny_engine):
    """200 rows through 64 places: they come and go and change places, and none is mixed up."""
    here, there = (
        answer(one, tiny_engine.value, PriorDecoder, {}, TransportBudget(nats=2.0), n=67)
        for one in tiny_engine.both(SAMPLING)
    )
    assert torch.equal(tokens(here.transported), tokens(there.transported))


def test_a_text_ends_at_any_eos_or_where_a_stop_string_stands(tiny_engine):
    engine, sampling = tiny_engine.engine, SamplingSettings(top_k=0, max_new_tokens=30)
    ask = EngineRequest(PROMPTS[0], 30, sampling=sampling, seed=1)
    free = engine.run([ask])[0].tokens
    assert len(free) == 30
    later = [token for token in free if token not in free[:3]]
    ended = engine.run([dataclasses.replace(ask, eos_ids=(later[0], later[-1]))])[0].tokens
    assert ended == free[: free.index(later[0]) + 1]
    word = next(token for token in free[3:] if token > 6)
    stopped = engine.run([dataclasses.replace(ask, stop=(build_tokenizer().decode([word]),))])[0].tokens
    assert stopped == free[: free.index(word) + 1]


def test_seeds_of_the_engines_own_sampler(tiny_engine):
    ask = EngineRequest(PROMPTS[0], 9, sampling=SamplingSettings(top_k=0), seed=1)
    one, again, other = tiny_engine.engine.run([ask, ask, dataclasses.replace(ask, seed=2)])
    assert one.tokens == again.tokens != other.tokens
    for seed in (-1, 2**63 + 5):  # vLLM takes -1 for no seed, and only 64 bits with their sign
        one, again = tiny_engine.engine.run([dataclasses.replace(ask, seed=seed)] * 2)
        assert one.tokens == again.tokens


def test_a_plan_is_checked_once_and_not_on_the_engines_thread(tiny_engine, monkeypatch):
    from vgf_llm.engines.vllm_engine import _parameters
    from vgf_llm.engines.vllm_processor import PlanProcessor

    [plan] = Draws(SAMPLING, torch.tensor([1])).plans(torch.tensor([0]), 9)
    parameters = _parameters(EngineRequest([1], 9, plan=plan))
    monkeypatch.setattr(RowPlan, "decoded", None)
    PlanProcessor.validate_params(parameters)
    with pytest.raises(RequestRefusedError, match="refuses request 0: the rule of a draw row holds"):
        tiny_engine.engine.run([EngineRequest([1], 9, plan=dataclasses.replace(plan, rule={}))])


def test_a_text_that_fills_all_positions_but_the_one_that_is_reserved_is_read(tiny_engine):
    here, there = tiny_engine.both(SAMPLING)
    tokens_BNT, prompts = torch.full((1, 1, 9), 7), [[1] * (64 - 9 - there.reserved_positions)]
    responses = Responses(prompts, tokens_BNT, torch.ones_like(tokens_BNT, dtype=torch.bool), EOS_IDS, 0)
    likelihoods = [one.logps(one.prefix(prompts), responses) for one in (here, there)]
    torch.testing.assert_close(*likelihoods, atol=1e-4, rtol=0)


def test_an_untruncated_distribution_is_refused(tiny_engine):
    with pytest.raises(ConfigError, match="top_k must be at least 1 with backend vllm"):
        EngineReference(tiny_engine.engine, load_skeleton(str(tiny_engine.folder)), SamplingSettings(top_k=0), (2,), 0)


def test_a_request_that_is_too_long_is_refused_and_the_next_one_answered(tiny_engine):
    engine, good = tiny_engine.engine, EngineRequest(PROMPTS[0], 3, sampling=SAMPLING, seed=1)
    with pytest.raises(EngineError, match="refuses request 1: .*maximum context length"):
        engine.run([good, EngineRequest([7] * 65, 3), good])
    assert len(engine.run([good])[0].tokens) == 3


def test_a_plan_for_another_table_is_noticed(tiny_engine):
    """The engine has the value's table; a policy with one of another width, or other numbers, must not go on."""
    _, there = tiny_engine.both(SAMPLING)
    table_VD = tiny_engine.value.embedding_table_VD
    for wrong_VD in (torch.randn_like(table_VD) * table_VD.std(), table_VD[:, :64].contiguous()):
        samples = ReferenceSampler(there).sample(PROMPTS, row_seeds(0, [0, 1, 2], N))
        decoder = PriorDecoder(there, wrong_VD)
        delta = torch.randn(*samples.tokens_BNT.shape, wrong_VD.shape[1]) * samples.movable_BNT[..., None]
        move = make_move(None, samples, delta, nats=8.0, seeds_BN=row_seeds(1, [0, 1, 2], N))
        with pytest.raises(EngineError, match="otherwise than planned"):
            decoder.decode(decoder.prepare(PROMPTS), move)
    assert ReferenceSampler(there).sample(PROMPTS, row_seeds(0, [0], 1)[:, :1].expand(3, 1)) is not None


def test_an_engine_that_hangs_ends_in_an_error():
    worker, free = EngineThread("engine under test"), threading.Event()
    with pytest.raises(EngineError, match="the engine under test hangs: it gave no sign of life"):
        worker.call(lambda tick: free.wait(), timeout_sec=0.2)
    with pytest.raises(EngineError, match="is not used again"):
        worker.call(lambda tick: None, timeout_sec=1.0)
    free.set()


def test_an_interrupted_job_ends_and_the_next_one_is_done():
    def endless(tick):
        while True:
            tick()
            time.sleep(0.01)

    worker = EngineThread("engine under test")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell started this in the background
    try:
        threading.Timer(0.3, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            worker.call(endless, timeout_sec=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert worker.call(lambda tick: "next", timeout_sec=60) == "next"
    worker.stop()


@pytest.mark.slow
def test_a_request_that_cannot_be_sent_fails_its_own_caller_only(tiny_folder, monkeypatch):
    pytest.importorskip("vllm")
    from vgf_llm.engines.vllm_engine import VLLMEngine

    quiet_vllm(os.environ)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = VLLMEngine(str(tiny_folder), TINY_ENGINE, max_length=64)
    ask = EngineRequest(PROMPTS[0], 50, sampling=SAMPLING, seed=1)
    with pytest.raises(RequestRefusedError, match="refuses request 1: OverflowError"):
        engine.run([ask, dataclasses.replace(ask, sampling=SamplingSettings(top_k=2**64))])
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert len(engine.run([ask])[0].tokens) == 50
    engine.close()


@pytest.mark.slow
def test_an_engine_whose_process_is_killed_ends_in_an_error(tiny_folder, monkeypatch):
    pytest.importorskip("vllm")
    from vgf_llm.engines.vllm_engine import VLLMEngine

    quiet_vllm(os.environ)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = VLLMEngine(str(tiny_folder), TINY_ENGINE, max_length=64)
    ask = EngineRequest(PROMPTS[0], 50, sampling=SAMPLING, seed=1)
    assert len(engine.run([ask])[0].tokens) == 50
    process = engine._worker.processes[0]
    started = time.monotonic()
    process.kill()
    with pytest.raises(EngineError, match=f"died: its process {process.pid} ended with exit code -9"):
        while True:
            engine.run([ask] * 64)
    assert time.monotonic() - started < 10
    engine.close()


@pytest.mark.slow
def test_lora_by_request(tiny_folder, tmp_path):
    """Tokens under an adapter are those of the merged model."""
    pytest.importorskip("vllm")
    from peft import LoraConfig, get_peft_model

    from vgf_llm.engines.vllm_engine import VLLMEngine

    quiet_vllm(os.environ)
    adapted = get_peft_model(
        build_llama(width=WIDTH), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path)
    engine = VLLMEngine(str(tiny_folder), TINY_ENGINE, adapters=[str(tmp_path)], max_length=64)
    merged = TorchReference(adapted.merge_and_unload().eval(), SAMPLING, EOS_IDS, 0)
    base = TorchReference(build_llama(width=WIDTH), SAMPLING, EOS_IDS, 0)
    skeleton, seeds = load_skeleton(str(tiny_folder)), row_seeds(0, [0, 1, 2], N)
    found = {}
    for here, adapter in ((merged, str(tmp_path)), (base, None)):
        there = EngineReference(engine, skeleton, SAMPLING, EOS_IDS, 0, adapter=adapter)
        samples = [tokens(ReferenceSampler(one).sample(PROMPTS, seeds)) for one in (here, there)]
        assert torch.equal(*samples)
        found[adapter] = samples[0]
    assert not torch.equal(*found.values())
    with pytest.raises(EngineError, match="has no adapter 'other'"):
        engine.run([EngineRequest(PROMPTS[0], 1, adapter="other")])
    engine.close()

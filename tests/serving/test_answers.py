"""The official client against a real server: chat, completions, streams, budgets, seeds, stop strings."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.serving.conftest import MODEL, SAMPLING, chat
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.data.prompts import encode_prompt, encode_response
from vgf_llm.engines.engine import EngineRequest
from vgf_llm.text import row_seeds
from vgf_llm.text.decoders.make import make_decoder
from vgf_llm.text.sampler import ReferenceSampler

openai = pytest.importorskip("openai", reason="the openai client is not installed (it comes with vLLM)")
CHAT = "/v1/chat/completions"
PLAIN = {"steps": 0, "num_particles": 1}
MESSAGES = [{"role": "user", "content": "write about the sea"}]


def ask(running, transport=None, **fields):
    extra = {} if transport is None else {"transport": transport}
    fields = {"model": MODEL, "messages": MESSAGES, "seed": 3, **fields}
    return running.openai().chat.completions.create(**fields, extra_body=extra)


def test_a_chat_answer_is_the_implicit_policys(running, served_pipeline):
    answer = ask(running)
    own, budget = served_pipeline, running.server.service.settings.budget
    prompt = encode_prompt(own.tokenizer, MESSAGES)
    decoder = make_decoder("prior", own.reference, own.value)
    policy = ImplicitPolicy(ReferenceSampler(own.reference), own.value, decoder, budget, gradient=own.gradient, draws=2)
    outcome = policy([prompt], row_seeds(3, [0], 4))
    told = answer.transport
    assert answer.choices[0].message.content == outcome.selected.texts(own.tokenizer)[0][0]
    assert told["value"] == pytest.approx(float(outcome.selected_values_B), abs=1e-3)
    assert told["original_value"] == pytest.approx(float(outcome.original_values_BN.max()), abs=1e-3)
    assert told["mean_original_value"] == pytest.approx(float(outcome.original_values_BN.mean()), abs=1e-3)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == int(outcome.selected.lengths_BN)
    assert answer.model == MODEL and answer.id.startswith("chatcmpl-")
    assert told["seed"] == 3 and told["budget"]["nats"] == 3.0 and told["budget"]["num_particles"] == 4
    assert set(told["seconds"]) == {"queue", "sample", "score", "transport", "decode", "total"}


def test_more_budget_moves_further(running):
    """Along a random model's gradient: far, if not up; and never below what best-of-N would have answered."""
    nats = []
    for spent in (0, 1.0, 8.0):
        transport = {"nats": spent, "num_particles": 8, "draws": 4}
        told = [ask(running, transport, seed=seed).transport for seed in range(6)]
        assert all(one["value"] >= one["original_value"] for one in told)
        nats.append([one["nats"] for one in told])
    assert max(nats[0]) == 0 < max(nats[1]) <= 1.001 < max(nats[2]) <= 8.001


def test_budget_0_with_one_particle_is_the_engines_own_answer(running, served_pipeline):
    engine, own = running.engine, served_pipeline
    prompt = encode_prompt(own.tokenizer, MESSAGES)
    request = EngineRequest(prompt, 8, sampling=SAMPLING, seed=3, eos_ids=own.reference.eos_ids)
    text = own.tokenizer.decode(engine.run([request])[0].tokens, skip_special_tokens=True)
    answer = ask(running, PLAIN)
    assert answer.choices[0].message.content == text == answer.transport["original"]
    assert answer.transport["nats"] == 0 and answer.transport["value"] == answer.transport["original_value"]
    assert set(answer.transport["seconds"]) == {"queue", "sample", "score", "total"}


def test_greedy_is_the_transformers_models(running, served_pipeline, tiny_greedy):
    answer = ask(running, PLAIN, temperature=0, max_tokens=20)
    prompt = encode_prompt(served_pipeline.tokenizer, MESSAGES)
    assert answer.choices[0].message.content == tiny_greedy(prompt, 20)


@pytest.fixture
def tiny_greedy(served_pipeline, served_models):
    from vgf_llm.models.loading import load_causal_lm

    model = load_causal_lm(served_models.model_name_or_path)

    def write(prompt, tokens):
        written = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=list(served_pipeline.reference.eos_ids),
        )
        return served_pipeline.tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)

    return write


def test_completions_take_text_or_tokens_without_a_template(running, served_pipeline):
    client, tokenizer = running.openai(), served_pipeline.tokenizer
    ids = tokenizer("the old sea")["input_ids"]
    answers = [
        client.completions.create(model=MODEL, prompt=prompt, seed=5, max_tokens=6) for prompt in ("the old sea", ids)
    ]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert answers[0].usage.prompt_tokens == len(ids) and answers[0].id.startswith("cmpl-")
    assert answers[0].transport["original_value"] <= answers[0].transport["value"]


def test_a_stream_ends_in_the_same_text_with_its_transport(running):
    whole = ask(running)
    chunks = list(ask(running, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    last = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content][-1]
    assert last.transport["value"] == whole.transport["value"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 5


def test_a_completions_stream(running):
    fields = {"model": MODEL, "prompt": "the old sea", "seed": 5}
    client = running.openai()
    chunks = list(client.completions.create(**fields, stream=True))
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == client.completions.create(**fields).choices[0].text


@pytest.mark.parametrize("transport", [PLAIN, {"steps": 0}, {}], ids=["plain", "best of n", "transported"])
def test_a_text_ends_before_a_stop_string_and_its_value_is_that_of_what_is_left(running, served_pipeline, transport):
    free = ask(running, transport, max_tokens=20)
    words = free.choices[0].message.content.split()
    stop = next(word for word in words[2:] if word not in words[:2])
    found = ask(running, transport, max_tokens=20, stop=[stop, "never said"])
    text, own = found.choices[0].message.content, served_pipeline
    assert stop not in text and stop not in found.transport["original"]
    if transport == PLAIN:
        assert text.split() == words[: words.index(stop)] and found.choices[0].finish_reason == "stop"
    ids, prefix = (
        encode_response(own.tokenizer, text, eos=False),
        own.value.prefix([encode_prompt(own.tokenizer, MESSAGES)]),
    )
    ends = [ids, [*ids, own.tokenizer.eos_token_id]]  # at the stop string, or by itself
    values = [
        float(own.value.score(prefix, torch.tensor([[one]]), torch.ones(1, 1, len(one)).bool())) for one in ends if one
    ]
    assert any(found.transport["value"] == pytest.approx(value, abs=1e-3) for value in values)


@pytest.mark.parametrize("transport", [{"steps": 0}, {}], ids=["best of n", "transported"])
def test_the_answer_to_a_stop_string_is_selected_by_the_value_of_what_is_returned(running, transport):
    for seed in range(8):
        free = ask(running, transport, seed=seed, max_tokens=16).choices[0].message.content.split()
        told = ask(running, transport, seed=seed, max_tokens=16, stop=[free[0][-1], free[-1]]).transport
        assert told["value"] >= told["original_value"] >= told["mean_original_value"]
        assert told["source_value"] <= told["original_value"]
        if transport:
            assert told["value"] == told["original_value"]


def test_nats_0_keeps_the_temperature_that_selects(running):
    def values(transport):
        return [ask(running, transport, seed=seed).transport["value"] for seed in range(8)]

    own = {"select": "softmax", "temperature": 1e-4}
    assert values({"nats": 0, **own}) == values({"steps": 0, **own}) == values({"nats": 0})
    assert ask(running, {"nats": 0, **own}).transport["budget"]["temperature"] == 1e-4


def test_a_negative_seed_is_a_seed_of_the_plain_answer_too(running):
    said = {ask(running, PLAIN, seed=-1).choices[0].message.content for _ in range(3)}
    assert len(said) == 1 != len({ask(running, PLAIN, seed=-seed).choices[0].message.content for seed in (1, 2, 3)})


def test_every_decoder_answers(running):
    for decoder, more in {"block": {}, "pivot": {"rounds": 2}, "edit": {}, "edit_greedy": {}, "nearest": {}}.items():
        told = ask(running, {"decoder": decoder, "num_particles": 2, "draws": 1, **more}).transport
        assert told["budget"]["decoder"] == decoder and told["value"] >= told["original_value"] - 1e-3


def test_an_answer_without_a_seed_can_be_had_again(running):
    first, other = ask(running, seed=None), ask(running, seed=None)
    again = ask(running, seed=first.transport["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content
    assert again.transport["value"] == first.transport["value"]
    assert first.transport["seed"] != other.transport["seed"]


def test_an_answer_is_the_same_alone_and_among_neighbours(running):
    kinds = [PLAIN, {"steps": 0}, {}, {"nats": 8, "rounds": 2, "draws": 3}, {"num_particles": 2, "decoder": "pivot"}]
    asked = [(kinds[i % len(kinds)], i) for i in range(20)]

    def answered(transport, seed):
        found = ask(running, transport, seed=seed, max_tokens=12)
        return found.choices[0].message.content, found.transport["value"], found.transport["nats"]

    alone = [answered(*one) for one in asked]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda one: answered(*one), asked))
    assert [one[0] for one in together] == [one[0] for one in alone]
    for one, other in zip(alone, together, strict=True):
        assert one[1:] == pytest.approx(other[1:], abs=2e-3, nan_ok=True) or one[2] is None
    assert len({text for text, *_ in alone}) > 15


def test_models_health_and_metrics(running):
    client = running.openai()
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")
    ask(running)
    with running.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        text = http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['vgf_requests_total{endpoint="/v1/chat/completions",status="200"}']) >= 1
    assert float(lines['vgf_stage_seconds_count{stage="decode"}']) >= 1
    assert float(lines['vgf_tokens_total{kind="completion"}']) >= 1
    assert float(lines["vgf_nats_total"]) > 0
    assert float(lines["vgf_engine_up"]) == 1 and float(lines["vgf_requests_running"]) == 0


def test_a_conversation_with_text_parts(running):
    parts = [{"type": "text", "text": "write about "}, {"type": "text", "text": "the sea"}]
    answer = ask(running, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == ask(running).choices[0].message.content


def test_what_clients_send_along_and_what_asks_for_nothing_changes_nothing(running):
    nothing = {"tools": [], "response_format": {"type": "text"}, "store": False, "metadata": {"from": "a test"}}
    system = [{"role": "system", "content": "rain"}, {"role": "user", "content": "the cat"}]
    developer = [{**system[0], "role": "developer"}, system[1]]
    with running.http() as http:
        plain, more = (
            http.post(CHAT, json=chat() | {"messages": messages} | along).json()
            for messages, along in ((system, {}), (developer, nothing))
        )
    assert plain["choices"] == more["choices"]


def test_requests_are_logged_without_what_they_say_and_have_an_id(running, capfd):
    with running.http() as http:
        told = http.post(CHAT, json=chat("the secret cat"))
    said = capfd.readouterr().err
    assert re.search(rf"POST {CHAT} 200 \d+\.\d\d s {told.headers['x-request-id']}\n", said)
    assert "secret" not in said


def test_curl_sees_json_of_utf8(running):
    with running.http() as http:
        body = json.dumps(chat("the sea ünïcode")).encode()
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "transport",
    [
        {"step_size": 1e6, "temperature": 1e-6, "steps": 8},
        {"step": "adam", "step_size": 1e6, "steps": 3},
        {"step": "normalised", "step_size": 1e6, "rounds": 4},
        {"kernel": "rbf", "bandwidth": 1e-6, "temperature": 1e6},
        {"kernel": "rbf", "bandwidth": 1e6, "max_token_nats": 1e-9},
        {"nats": 1e-12},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_answered(running, transport):
    told = ask(running, transport).transport
    assert told["value"] >= told["original_value"] and told["nats"] <= 3.001

"""Servers as rewards: a real HTTP server on the loopback, busy, broken, wrong or talkative."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reward_models import attempts
from reward_models.endpoint import EndpointReward, EndpointSettings
from reward_models.foreign import text_reward
from reward_models.inputs import check_rewards
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.settings import RewardCallSettings

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
PROMPTS = [PromptText(TALK, {"answer": "4"}, "a.jsonl, row 1"), PromptText("3 + 3?", {"answer": "6"}, "a.jsonl, row 2")]
TEMPLATE = "Question: {{ messages[-1].content }}\nRight: {{ answer }}\nAnswer: {{ response }}\nScore it from 0 to 10."
KEY = "sk-secret-0123"


class Server:
    """What was asked, and what is answered: a function of path and body to (code, answer)."""

    def __init__(self):
        self.asked, self.answer = [], lambda path, body: (200, {})
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((self.path, self.headers.get("Authorization"), body))
                code, answer = server.answer(self.path, body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    found = Server()
    monkeypatch.setenv("REWARD_URL", f"{found.url}/v1/")
    monkeypatch.setenv("REWARD_API_KEY", KEY)
    monkeypatch.setattr(attempts, "_FIRST_WAIT_SEC", 0.01)
    yield found
    found.http.shutdown()
    found.http.server_close()


def says(text):
    return lambda path, body: (200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


def judge(folder, **more):
    (folder / "judge.txt").write_text(TEMPLATE)
    lines = {"kind": "judge", "model": "m", "template": str(folder / "judge.txt")} | more
    (folder / "judge.yaml").write_text(json.dumps({"endpoint": lines, "weight": 0.1}))
    return str(folder / "judge.yaml")


def test_a_judge_reads_the_template_and_its_number_is_the_reward(server, tmp_path):
    server.answer = lambda path, body: says("Good.\nScore: 8" if "Answer: 4" in str(body) else "**Score:** 2.5/10")(
        path, body
    )
    path = judge(tmp_path, chat_template_kwargs={"enable_thinking": False})
    check_rewards([path], prompts=PROMPTS)
    assert text_reward(path)(PROMPTS, ["4", "5"]) == pytest.approx([0.8, 0.25])
    asked, key, body = next(one for one in server.asked if "Answer: 4" in str(one))
    assert (asked, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    text = "Question: 2 + 2?\nRight: 4\nAnswer: 4\nScore it from 0 to 10."
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 512, "temperature": 0.0,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def test_our_own_server_takes_a_judges_request(server, tmp_path):
    schema = pytest.importorskip("vgf_llm.serving.schema", reason="the extra serve is not installed")
    server.answer = says("7")
    assert text_reward(judge(tmp_path))(PROMPTS[:1], ["4"]) == pytest.approx([0.7])
    schema.parse(schema.ChatBody, json.dumps(server.asked[0][2]).encode())


@pytest.mark.parametrize(
    ("kind", "answer", "path", "more"),
    [
        ("classify", {"data": [{"probs": [1.5]}]}, "/classify", {}),
        ("classify", {"data": [{"probs": [0.5, 2.0]}]}, "/classify", {"outputs": {"0": 1.0, "1": 0.5}}),
        ("pooling", {"data": [{"data": [1.5]}]}, "/pooling", {}),
        ("pooling", {"data": [{"data": [[9.0], [1.5]]}]}, "/pooling", {}),
        ("score", {"data": [{"score": 1.5}]}, "/score", {}),
    ],
)
def test_a_reward_model_scores_the_conversation(server, kind, answer, path, more):
    server.answer = lambda *_: (200, answer)
    reward = EndpointReward(EndpointSettings(kind, "m", **more))
    assert reward(TALK, "4") == 1.5
    asked, _, body = server.asked[0]
    assert asked == path and body["use_activation"] is False
    if kind == "score":
        assert body["text_1"] == "Be brief.\n\nHuman: 2 + 2?\n\nAssistant:" and body["text_2"] == "4"
    else:
        assert body["messages"] == [*TALK, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("said", "pattern", "number"),
    [
        ("7", None, 7), (" **-1.5** ", None, -1.5), ("I give 3 of 10. Score: 4", None, 4), ("rating is 9", None, 9),
        ("Score: 1, no: Score: 2", None, 2), ("Score: -3", None, -3), ("<7>", r"<(\d)>", 7),
        ("Score (0-10): 7", None, 7), ("Rating (1-5): 4", None, 4), ("**Rating 1 to 5:** 4", None, 4),
        ("Score [out of 10]: 8.", None, 8), ("Score: 7. See Score (0-10).", None, 7), ("Score (strict): 3/10", None, 3),
        (".5", None, 0.5), ("Score: .5", None, 0.5), ("Score: \u22122", None, -2), ("\u22121.5", None, -1.5),
        ("Score: 1e-3", None, 0.001), ("1e-3", None, 0.001), ("<\u22127>", r"<(\S\d)>", -7),
    ],
)  # fmt: skip
def test_numbers_of_a_judge(server, tmp_path, said, pattern, number):
    (tmp_path / "t.txt").write_text("{{ response }}")
    settings = EndpointSettings("judge", "m", template=str(tmp_path / "t.txt"), pattern=pattern)
    assert EndpointReward(settings).parsed(said) == number


@pytest.mark.parametrize("said", ["1,000", "Score: 1,000", "Score: 10,5", "Score (0-10): high", "Score: 3-4"])
def test_what_may_be_several_numbers_is_refused(server, tmp_path, said):
    (tmp_path / "t.txt").write_text("{{ response }}")
    reward = EndpointReward(EndpointSettings("judge", "m", template=str(tmp_path / "t.txt")))
    with pytest.raises(ModelError, match="no number as 'score: <number>'"):
        reward.parsed(said)


def test_a_cut_answer_is_refused_whatever_it_says(server, tmp_path):
    choice = {"message": {"content": "Score: 1"}, "finish_reason": "length"}
    server.answer = lambda *_: (200, {"choices": [choice]})
    with pytest.raises(ModelError, match="its answer was cut after 5 tokens .*; raise max_tokens; it was .*row 1"):
        text_reward(judge(tmp_path, max_tokens=5))(PROMPTS[:1], ["4"])


def test_a_template_that_cannot_be_filled_in_is_named_with_its_row_and_asks_nothing(server, tmp_path):
    path = judge(tmp_path)
    (tmp_path / "judge.txt").write_text("{{ answer.right.first }} {{ response }}")
    with pytest.raises(ConfigError, match="judge.txt' cannot be filled in .UndefinedError: .*a.jsonl, row 1"):
        text_reward(path, calls=RewardCallSettings(reward_retries=3))(PROMPTS[:1], ["4"])
    assert server.asked == []


def test_a_cached_score_is_of_one_server_or_of_a_stated_version(server, tmp_path, monkeypatch):
    calls = RewardCallSettings(reward_cache=str(tmp_path / "cache.sqlite"))
    server.answer = says("5")

    def asked(path, variable="REWARD_URL", url=f"{server.url}"):
        monkeypatch.setenv(variable, url)
        text_reward(path, calls=calls)(PROMPTS[:1], ["4"])
        return len(server.asked)

    other = f"{server.url}/v1/../v1"
    assert [asked(judge(tmp_path)), asked(judge(tmp_path)), asked(judge(tmp_path), url=other)] == [1, 1, 2]
    stated = judge(tmp_path, version="2026-01")
    assert [asked(stated), asked(stated, url=other)] == [3, 3]
    assert asked(judge(tmp_path, version="2026-02")) == 4


def test_a_server_on_this_machine_is_asked_without_a_proxy(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.answer = says("5")
    assert text_reward(judge(tmp_path))(PROMPTS[:1], ["4"]) == [0.5]


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hidden@host:1",
        "http://hidden host",
        "http://hidden\n.org",
        "http://hidden:port",
        "http://h?key=hidden",
    ],
)
def test_a_malformed_url_is_refused_without_showing_it(tmp_path, monkeypatch, url):
    monkeypatch.setenv("REWARD_URL", url)
    with pytest.raises(ConfigError, match="the URL in the .* REWARD_URL (has a user|is malf)") as raised:
        check_rewards([judge(tmp_path)])
    assert "hidden" not in str(raised.value)


def test_a_malformed_key_is_refused_without_showing_it(server, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_API_KEY", f"{KEY}\n")
    with pytest.raises(ConfigError, match="the key in the environment variable REWARD_API_KEY has") as raised:
        check_rewards([judge(tmp_path)])
    assert KEY not in str(raised.value) and server.asked == []


def test_an_answer_without_a_number_is_named(server, tmp_path):
    server.answer = says("I would give 3 of 10 or 4 of 10.")
    with pytest.raises(ModelError, match="no number as 'score: <number>' in its answer 'I would .*a.jsonl, row 1"):
        text_reward(judge(tmp_path))(PROMPTS[:1], ["4"])
    server.answer = lambda *_: (200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    with pytest.raises(ModelError, match="answered nothing .it ended by 'length'.; raise max_tokens"):
        text_reward(judge(tmp_path))(PROMPTS[:1], ["4"])


def test_a_busy_server_is_asked_again_and_what_was_paid_is_kept(server, tmp_path):
    answers = iter([(503, {"error": "busy"}), (200, {"choices": [{"message": {"content": "5"}}]})])
    server.answer = lambda *_: next(answers)
    calls = RewardCallSettings(reward_cache=str(tmp_path / "cache.sqlite"))
    path = judge(tmp_path)
    assert text_reward(path, calls=calls)(PROMPTS[:1], ["4"]) == [0.5]
    assert text_reward(path, calls=calls)(PROMPTS[:1], ["4"]) == [0.5]
    assert len(server.asked) == 2
    assert KEY.encode() not in (tmp_path / "cache.sqlite").read_bytes()
    (tmp_path / "judge.txt").write_text(TEMPLATE + " Be strict.")  # another judge
    server.answer = says("4")
    assert text_reward(path, calls=calls)(PROMPTS[:1], ["4"]) == pytest.approx([0.4])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": f"{KEY} is wrong"}), r"answers /v1/chat/completions with 401: .*\*\*\* is wrong.*REWARD_API"),
        ((429, {"error": "slow down"}), r"in 2 attempts: the server of \$REWARD_URL answers .* with 429: .*slow down"),
        ((200, b"<html>"), "with something else than JSON; is it the right URL"),
        ((200, {"object": "error"}), "the server's answer has no choices.0: .*does it serve"),
    ],
)  # fmt: skip
def test_faults_of_a_server_are_named_without_its_secrets(server, tmp_path, answer, message):
    server.answer = lambda *_: answer
    reward = text_reward(judge(tmp_path), calls=RewardCallSettings(reward_retries=1))
    with pytest.raises(ModelError, match=message) as raised:
        reward(PROMPTS[:1], ["4"])
    assert KEY not in str(raised.value) and server.url not in str(raised.value)


def test_a_server_that_is_not_there_is_named_by_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the server of \$REWARD_URL cannot be reached.*a.jsonl, row 1") as raised:
        text_reward(judge(tmp_path), calls=RewardCallSettings(reward_retries=0))(PROMPTS[:1], ["4"])
    assert "127.0.0.1" not in str(raised.value)


def test_faults_of_the_settings_come_before_any_request(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_URL", "127.0.0.1:8000")
    with pytest.raises(ConfigError, match="REWARD_URL does not start with http://"):
        check_rewards([judge(tmp_path)])
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:8000")
    path = judge(tmp_path)
    with pytest.raises(ConfigError, match="judge_m takes 'answer', and the prompts' rows have no such column"):
        check_rewards([path], prompts=[PromptText("p")])
    for template, message in (
        ("{{ answer }}", "does not hold {{ response }}"),
        ("{{ response }", "judge.txt', line 1: "),
    ):
        path = judge(tmp_path)
        (tmp_path / "judge.txt").write_text(template)
        with pytest.raises(ConfigError, match=message):
            check_rewards([path])
    with pytest.raises(ConfigError, match="pattern 'a' needs a group"):
        check_rewards([judge(tmp_path, pattern="a")])
    with pytest.raises(ConfigError, match="a judge needs a template"):
        check_rewards([judge(tmp_path, template=None)])

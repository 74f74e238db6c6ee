"""Called rewards: arguments by name, async, several at a time, late ones, and retries."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from reward_models import attempts
from reward_models.calling import CalledReward
from reward_models.functions import call_function, check_columns, per_response
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ConfigError, DataError, ModelError, SettingError
from vgf_llm.settings import RewardCallSettings

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 3?"}]
PROMPTS = [PromptText("2 + 2?", {"answer": "4", "level": 1}, "a.jsonl, row 1"), PromptText(TALK, {"answer": "6"})]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(attempts, "_FIRST_WAIT_SEC", 0.01)


# Arguments ---------------------------------------------------------------------------------------------------------


def test_messages_rows_and_columns_are_filled_by_name():
    seen = {}

    def reward(prompts, responses, messages, rows, answer, level=None):
        seen.update(prompts=prompts, messages=messages, rows=rows, answer=answer, level=level)
        return [1.0] * len(responses)

    assert call_function(reward, PROMPTS, ["4", "5"]) == [1.0, 1.0]
    assert seen["messages"] == [[{"role": "user", "content": "2 + 2?"}], TALK]
    assert seen["rows"] == [{"answer": "4", "level": 1}, {"answer": "6"}]
    assert (seen["answer"], seen["level"]) == (["4", "6"], [1, None])
    assert seen["prompts"][1].startswith("Be brief.")


def test_the_conversation_may_come_first_and_one_response_may_be_scored_per_call():
    def batched(messages, responses, rows):
        pairs = zip(messages, responses, rows, strict=True)
        return [len(turns) + float(response == row["answer"]) for turns, response, row in pairs]

    @per_response
    def single(messages, response, row, answer):
        return len(messages) + float(response == row["answer"] == answer)

    @per_response(version="1")
    async def later(prompt, response, *, row):
        await asyncio.sleep(0)
        return len(prompt) * float(response == row["answer"])

    async def all_at_once(prompts, responses, answer):
        return [float(response == right) for response, right in zip(responses, answer, strict=True)]

    assert call_function(batched, PROMPTS, ["4", "5"]) == [2.0, 2.0]
    assert call_function(single, PROMPTS, ["4", "5"]) == [2.0, 2.0]
    assert call_function(later, PROMPTS, ["4", "5"]) == [6.0, 0.0]
    assert call_function(all_at_once, PROMPTS, ["4", "5"]) == [1.0, 0.0]


def test_a_column_is_filled_by_name_wherever_it_stands_and_never_with_responses():
    def exact(responses, answer):
        return [float(response == right) for response, right in zip(responses, answer, strict=True)]

    def between(prompts, answer, responses):
        return exact(responses, answer)

    def limited(responses, least=2.0):
        assert least == 2.0
        return [least] * len(responses)

    @per_response
    def single(response, answer):
        return float(response == answer)

    def plain(questions, answers):  # the first two, whatever they are called
        return [float(len(question) + len(answer)) for question, answer in zip(questions, answers, strict=True)]

    for reward in (exact, between, single):
        assert call_function(reward, PROMPTS, ["4", "5"]) == [1.0, 0.0]
        with pytest.raises(ConfigError, match="takes 'answer', and the prompts' rows have no such column"):
            call_function(reward, ["p"], ["r"])
    assert call_function(limited, PROMPTS, ["4", "5"]) == [2.0, 2.0]
    assert call_function(plain, ["ab"], ["c"]) == [3.0]


def test_a_row_without_a_column_that_is_needed_is_named():
    def reward(prompts, responses, level):
        return [float(one) for one in level]

    with pytest.raises(
        DataError, match="the prompt 'Be brief.*: no column 'level', which reward function reward takes"
    ):
        call_function(reward, PROMPTS, ["4", "5"])
    with pytest.raises(DataError, match="b.jsonl, row 7: no column 'level'"):
        check_columns(reward, [PROMPTS[0], PromptText("p", {"answer": "4"}, "b.jsonl, row 7")])
    assert CalledReward(reward, constants={"level": 2})(PROMPTS, ["4", "5"]) == [2.0, 2.0]


def test_arguments_that_are_the_same_for_all_stand_for_columns():
    def reward(prompts, responses, answer, factor):
        return [
            float(response == right) * times for response, right, times in zip(responses, answer, factor, strict=True)
        ]

    assert CalledReward(reward, constants={"factor": 3})(PROMPTS, ["4", "5"]) == [3.0, 0.0]
    with pytest.raises(ConfigError, match="arguments: reward does not take 'facter'; it takes answer, factor"):
        CalledReward(reward, constants={"facter": 3})
    with pytest.raises(ConfigError, match="reward takes 'factor', and .* no such column; columns: answer, level"):
        check_columns(CalledReward(reward), PROMPTS)


# Time, attempts, several at a time ------------------------------------------------------------------------------------


def test_calls_run_side_by_side_up_to_the_limit_and_come_back_in_order():
    running, most = 0, 0

    @per_response
    async def reward(prompt, response):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02 * (3 - int(response)))
        running -= 1
        return int(response)

    calls = RewardCallSettings(reward_concurrency=2)
    assert CalledReward(reward, calls)(["p"] * 3, ["0", "1", "2"]) == [0.0, 1.0, 2.0]
    assert most == 2


def test_a_call_that_fails_is_tried_again_and_a_fault_of_the_code_is_not():
    tries = []

    @per_response
    def busy(prompt, response):
        tries.append(response)
        if len(tries) < 3:
            raise ConnectionError("busy")
        return 1.0

    @per_response
    def broken(prompt, response):
        tries.append(response)
        return {}["tone"]

    assert CalledReward(busy, RewardCallSettings(reward_retries=2))(["p"], ["r"]) == [1.0]
    assert tries == ["r"] * 3
    tries.clear()
    with pytest.raises(ModelError, match="busy raised ConnectionError in 2 attempts: busy; for a.jsonl, row 1: the"):
        CalledReward(busy, RewardCallSettings(reward_retries=1))(PROMPTS[:1], ["r"])
    tries.clear()
    with pytest.raises(ModelError, match="broken raised KeyError: 'tone'; for a.jsonl, row 1: the prompt '2 . 2"):
        CalledReward(broken, RewardCallSettings())(PROMPTS[:1], ["r"])
    assert tries == ["r"]


@pytest.mark.parametrize("kind", ["async", "thread", "batch"])
def test_a_late_call_is_given_up_and_named(kind):
    @per_response
    async def waits(prompt, response):
        await asyncio.sleep(30)

    @per_response
    def sleeps(prompt, response):
        time.sleep(30)

    def batch(prompts, responses):
        time.sleep(30)

    calls = RewardCallSettings(reward_timeout_sec=0.05, reward_retries=1)
    reward = CalledReward({"async": waits, "thread": sleeps, "batch": batch}[kind], calls)
    started = time.monotonic()
    with pytest.raises(ModelError, match="late in 2 attempts: no answer in 0.05 s, for .*'2 . 2.*raise reward_timeout"):
        reward(PROMPTS[:1], ["r"])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("kind", "responses", "limit_sec", "warns"),
    [
        ("blocks", 3, None, True), ("blocks", 1, 5.0, True), ("blocks", 1, None, False),
        ("awaits", 3, 5.0, False), ("thread", 3, 5.0, False),
    ],
)  # fmt: skip
def test_a_coroutine_that_holds_up_the_others_is_told_once(monkeypatch, capsys, kind, responses, limit_sec, warns):
    """Each waits for 0.6 s, and the loop may stand still for 0.3 s."""
    monkeypatch.setattr(attempts, "_STALL_SEC", 0.3)
    monkeypatch.setattr(attempts, "_POLL_SEC", 0.05)

    @per_response
    async def blocks(prompt, response):
        time.sleep(0.6)
        return 1.0

    @per_response
    async def awaits(prompt, response):
        await asyncio.sleep(0.6)
        return 1.0

    @per_response
    def thread(prompt, response):
        time.sleep(0.6)
        return 1.0

    function = {"blocks": blocks, "awaits": awaits, "thread": thread}[kind]
    name = f"{kind} {responses} {limit_sec}"
    for _ in range(2):
        calls = RewardCallSettings(reward_timeout_sec=limit_sec, reward_concurrency=3)
        assert CalledReward(function, calls, name=name)(["p"] * responses, ["r"] * responses) == [1.0] * responses
    told = capsys.readouterr().err
    assert told.count("warning: reward blocks is async, and waits for over a second without await") == int(warns)
    assert ("drop `async`" in told) == warns


def test_a_function_without_a_limit_is_called_in_the_thread_of_its_caller():
    """It may set an alarm, which Python allows in the main thread alone."""

    def alarmed(prompts, responses):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return [1.0]

    assert CalledReward(alarmed, RewardCallSettings())(["p"], ["r"]) == [1.0]


@pytest.mark.parametrize("name", ["reward_timeout_sec", "reward_concurrency"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(SettingError, match=f"{name} must be"):
        RewardCallSettings(**{name: 0})

"""Called rewards: arguments by name, async, several at a time, late ones, retries, and a cache that loses nothing."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from reward_models import attempts
from reward_models.calling import CalledReward
from reward_models.foreign import text_reward
from reward_models.functions import call_function, check_columns, per_response
from reward_models.reward_cache import RewardCache, reward_key
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ConfigError, DataError, ModelError, OutputError, SettingError
from vgf_llm.settings import RewardCallSettings

ROOT = Path(__file__).parents[2]
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 3?"}]
PROMPTS = [PromptText("2 + 2?", {"answer": "4", "level": 1}, "a.jsonl, row 1"), PromptText(TALK, {"answer": "6"})]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(attempts, "_FIRST_WAIT_SEC", 0.01)


def cached(path, **more):
    return RewardCallSettings(reward_cache=str(path / "rewards.sqlite"), **more)


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


# The cache ---------------------------------------------------------------------------------------------------------


def test_a_reward_is_paid_once_for_what_it_depends_on(tmp_path):
    asked = []

    def reward(prompts, responses, answer):
        asked.extend(zip(prompts, responses, answer, strict=True))
        return [float(len(response)) for response in responses]

    reward.version = "1"
    assert CalledReward(reward, cached(tmp_path))(PROMPTS * 2, ["4", "55", "4", "666"]) == [1.0, 2.0, 1.0, 3.0]
    assert len(asked) == 3  # one of four is asked for twice
    other_level = PromptText("2 + 2?", {"answer": "4", "level": 9})  # a column that is not read
    assert CalledReward(reward, cached(tmp_path))([other_level], ["4"]) == [1.0]
    assert len(asked) == 3
    assert CalledReward(reward, cached(tmp_path))([PromptText("2 + 2?", {"answer": "5"})], ["4"]) == [1.0]
    reward.version = "2"
    assert CalledReward(reward, cached(tmp_path))([other_level], ["4"]) == [1.0]
    assert len(asked) == 5


def test_the_content_of_a_functions_file_is_its_version(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "calls = []\ndef reward(prompts, responses):\n    calls.append(1)\n    return [1.0] * len(responses)\n"
    (tmp_path / "judge_file.py").write_text(text)
    import judge_file

    assert CalledReward(judge_file.reward, cached(tmp_path))(["p"], ["r"]) == [1.0]
    assert CalledReward(judge_file.reward, cached(tmp_path))(["p"], ["r"]) == [1.0]
    (tmp_path / "judge_file.py").write_text(text + "# stricter\n")
    assert CalledReward(judge_file.reward, cached(tmp_path))(["p"], ["r"]) == [1.0]
    assert len(judge_file.calls) == 2


MADE = """
    class Length:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, prompts, responses):
            return [self.factor * len(response) for response in responses]

    def scaled(factor):
        return lambda prompts, responses: [factor * len(response) for response in responses]

    one, two = scaled(1), scaled(2)
    three, four = Length(3), Length(FOUR)
"""


def test_functions_that_are_made_alike_keep_entries_of_their_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "made_rewards.py"
    path.write_text(textwrap.dedent(MADE.replace("FOUR", "4")))

    def found(*names):
        return [text_reward(f"made_rewards:{name}", calls=cached(tmp_path))(["p"], ["r"])[0] for name in names]

    assert found("one", "two", "three", "four") == [1.0, 2.0, 3.0, 4.0]
    path.write_text(textwrap.dedent(MADE.replace("FOUR", "44")))
    monkeypatch.delitem(sys.modules, "made_rewards")
    importlib.invalidate_caches()
    assert found("four", "one") == [44.0, 1.0]  # the file of an object is its module's


@pytest.mark.parametrize("fault", ["raises", "nan", "text", "late"])
def test_what_was_paid_for_is_kept_before_an_error_is_raised(tmp_path, fault):
    asked = []

    @per_response(version="1")
    async def reward(prompt, response):
        asked.append(response)
        if response == "bad":
            if fault == "raises":
                raise RuntimeError("no")
            if fault == "late":
                await asyncio.sleep(30)
            return float("nan") if fault == "nan" else "good"
        await asyncio.sleep(0.02)
        return 1.0

    calls = cached(tmp_path, reward_concurrency=4, reward_retries=0, reward_timeout_sec=0.5)
    with pytest.raises(ModelError, match="reward .*'bad'") as raised:
        CalledReward(reward, calls)(PROMPTS[:1] * 3, ["a", "bad", "b"])
    assert "a.jsonl, row 1" in str(raised.value)
    asked.clear()
    assert CalledReward(reward, calls)(PROMPTS[:1] * 2, ["a", "b"]) == [1.0, 1.0]
    assert asked == []


@pytest.mark.parametrize("bad", [float("nan"), None, RuntimeError("no")])
def test_no_further_call_is_paid_for_after_a_bad_one(bad):
    asked = []

    @per_response
    def reward(prompt, response):
        asked.append(response)
        if response == "1" and isinstance(bad, Exception):
            raise bad
        return bad if response == "1" else 1.0

    with pytest.raises(ModelError, match="'1'"):
        calls = RewardCallSettings(reward_concurrency=1, reward_retries=0)
        CalledReward(reward, calls)(["p"] * 50, [str(number) for number in range(50)])
    assert asked == ["0", "1"]


def test_a_batch_keeps_its_good_rewards(tmp_path):
    asked = []

    def reward(prompts, responses):
        asked.append(list(responses))
        return [float("inf") if response == "bad" else 1.0 for response in responses]

    with pytest.raises(ModelError, match="returned inf for response 1 .'bad'. to a.jsonl, row 1, the prompt '2 . 2"):
        CalledReward(reward, cached(tmp_path))([PROMPTS[1], PROMPTS[0]], ["a", "bad"])
    with pytest.raises(ModelError, match="returned 0 rewards for 1 responses"):
        CalledReward(lambda prompts, responses: [], cached(tmp_path))(["p"], ["r"])
    assert CalledReward(reward, cached(tmp_path))([PROMPTS[1]], ["a"]) == [1.0]
    assert asked == [["a", "bad"]]


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "rewards.sqlite").write_text("not a database, but long enough to be read as the header of one" * 20)
    with pytest.raises(OutputError, match="reward_cache '.*rewards.sqlite' cannot be used .file is not a database."):
        RewardCache(tmp_path / "rewards.sqlite").check()
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a INTEGER)")
    connection.close()
    with pytest.raises(OutputError, match="is a database of something else"):
        RewardCache(other).check()


def test_a_cache_that_another_process_makes_at_the_same_time_is_shared(tmp_path, monkeypatch):
    """The other one makes its table between this one's look at the version and its lock."""
    path, plain, others = tmp_path / "rewards.sqlite", sqlite3.connect, []

    class Slow(sqlite3.Connection):
        def execute(self, query, *more):
            found = super().execute(query, *more)
            if query != "PRAGMA user_version" or others:
                return found
            others.append(path)
            row = found.fetchone()
            found.close()
            RewardCache(path).put("reward", {"other": 1.0})
            return SimpleNamespace(fetchone=lambda: row)

    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: plain(*args, **more, factory=Slow))
    RewardCache(path).put("reward", {"mine": 2.0})
    assert others and RewardCache(path).get(["mine", "other"]) == {"mine": 2.0, "other": 1.0}


def test_texts_of_one_conversation_that_differ_are_scored_apart(tmp_path):
    """A dialogue as text and as messages is one conversation, and a function reads its text."""
    asked = []

    def reward(prompts, responses):
        asked.extend(prompts)
        return [float(len(prompt)) for prompt in prompts]

    texts = ["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman:  Hi\n\nAssistant:"]
    assert CalledReward(reward, cached(tmp_path))(texts, ["r"] * 2) == [float(len(text)) for text in texts]
    assert asked == texts


def test_a_key_tells_everything_apart():
    key = ("judge", "1", "a", [{"role": "user", "content": "a"}], "b", {"answer": "4"})
    others = [(*key[:i], other, *key[i + 1 :]) for i, other in enumerate(("judge2", "2", "a ", [], "c", {"answer": 4}))]
    keys = {reward_key(*one) for one in [key, *others]}
    assert len(keys) == 7
    assert reward_key(
        "j", "1", "", [{"content": "\ud83d", "role": "user"}], "", {}
    )  # half a character, from a data file


WRITER = """
    import sys
    from reward_models.reward_cache import RewardCache
    cache, start = RewardCache(sys.argv[1]), int(sys.argv[2])
    for number in range(start, start + 10_000):
        cache.put("reward", {str(number): float(number)})
        print(number, flush=True)
"""


def test_two_processes_write_and_a_kill_loses_nothing_that_was_kept(tmp_path):
    path = tmp_path / "rewards.sqlite"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(start)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for start in (0, 100_000)
    ]
    try:
        for process in processes:
            for _ in range(15):  # both are in the middle of it
                assert process.stdout is not None and process.stdout.readline()
    finally:
        for process in processes:
            process.kill()
    said = [line for process in processes for line in process.communicate()[0].split()]
    kept = RewardCache(path).get([str(number) for start in (0, 100_000) for number in range(start, start + 10_000)])
    assert len(kept) >= 30 and all(kept[number] == float(number) for number in said)
    assert all(float(key) == value for key, value in kept.items())

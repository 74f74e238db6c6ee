"""The cache of called rewards: its key, the errors before which it is written, and several processes at once."""

from __future__ import annotations

import asyncio
import importlib
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from reward_models import attempts
from reward_models.calling import CalledReward
from reward_models.foreign import text_reward
from reward_models.functions import per_response
from reward_models.reward_cache import RewardCache, reward_key
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ModelError, OutputError
from vgf_llm.settings import RewardCallSettings

ROOT = Path(__file__).parents[2]
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 3?"}]
PROMPTS = [PromptText("2 + 2?", {"answer": "4", "level": 1}, "a.jsonl, row 1"), PromptText(TALK, {"answer": "6"})]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(attempts, "_FIRST_WAIT_SEC", 0.01)


def cached(path, **more):
    return RewardCallSettings(reward_cache=str(path / "rewards.sqlite"), **more)


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

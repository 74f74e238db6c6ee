"""Many callers at one engine: each gets their own texts, and one who leaves, asks too much or hangs harms nobody."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vgf_llm.engines.deadline import AbandonedError, Deadline, DeadlineError
from vgf_llm.engines.engine import EngineError, EngineRequest, RequestRefusedError
from vgf_llm.engines.engine_thread import EngineThread
from vgf_llm.settings import SamplingSettings

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]
LONG = 48  # tokens: some tenths of a second


def asked(seed, tokens=9):
    sampling = SamplingSettings(top_k=0, max_new_tokens=tokens)
    return [EngineRequest(prompt, tokens, sampling=sampling, seed=seed + i) for i, prompt in enumerate(PROMPTS)]


def texts(engine, requests, deadline=None):
    return [text.tokens for text in engine.run(requests, deadline)]


def wait_until(holds, seconds=10.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_callers_of_many_threads_get_their_own_texts(tiny_engine):
    engine = tiny_engine.engine
    alone = {seed: texts(engine, asked(seed)) for seed in range(16)}
    most = []
    with ThreadPoolExecutor(16) as pool:
        found = {seed: pool.submit(texts, engine, asked(seed)) for seed in range(16)}
        while not all(one.done() for one in found.values()):
            most.append(engine.unfinished)
            time.sleep(0.001)
    assert {seed: one.result() for seed, one in found.items()} == alone
    assert max(most) > 3  # several callers' requests were written side by side


def test_a_caller_who_leaves_takes_their_requests_along(tiny_engine):
    engine, deadline = tiny_engine.engine, Deadline(60)
    with ThreadPoolExecutor(2) as pool:
        leaving = pool.submit(texts, engine, asked(0, LONG) * 20, deadline)
        staying = pool.submit(texts, engine, asked(1))
        wait_until(lambda: engine.unfinished)
        deadline.abandon()
        with pytest.raises(AbandonedError):
            leaving.result(timeout=5)
        assert staying.result(timeout=30) == texts(engine, asked(1))
    wait_until(lambda: engine.unfinished == 0)
    assert not engine._llm.llm_engine.has_unfinished_requests()


def test_time_that_is_up_ends_the_wait(tiny_engine):
    engine = tiny_engine.engine
    with pytest.raises(DeadlineError, match=r"no answer within 0.2 s"):
        texts(engine, asked(0, LONG) * 60, Deadline(0.2))
    wait_until(lambda: engine.unfinished == 0)


def test_a_refused_request_fails_its_own_caller_only(tiny_engine):
    engine = tiny_engine.engine
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(texts, engine, asked(1, LONG))
        wait_until(lambda: engine.unfinished)
        with pytest.raises(RequestRefusedError, match="refuses request 1: .*maximum context length"):
            engine.run([asked(0)[0], EngineRequest([7] * 65, 3)])
        with pytest.raises(RequestRefusedError, match="refuses request 0: TypeError"):
            engine.run([EngineRequest(["one"], 3)])
        with pytest.raises(RequestRefusedError, match="refuses request 1: .*max_tokens"):
            engine.run([asked(0)[0], EngineRequest([7], 0)])
        assert good.result(timeout=30) == texts(engine, asked(1, LONG))
    assert engine.run([]) == []


class _Counts:
    """A batch that writes nothing until it may, and counts what is added between steps."""

    def __init__(self):
        self.free, self.names, self.added = threading.Event(), [], [[]]

    def add(self, name, request):
        self.names.append(name)
        self.added[-1].append(request)

    def step(self):
        time.sleep(0.01)
        self.added.append([])
        return [(name, name) for name in self.names] if self.free.is_set() else []

    def abort(self, names):
        pass

    def wake(self):
        pass


def test_a_large_call_neither_holds_up_the_steps_nor_other_callers():
    thread = EngineThread("engine under test")
    thread.batch = batch = _Counts()
    with ThreadPoolExecutor(3) as pool:
        large = pool.submit(thread.run, ["large"] * 500, 60)
        wait_until(lambda: batch.names)
        small = pool.submit(thread.run, ["small"] * 20, 60)
        wait_until(lambda: len(batch.names) == 520)
        assert thread.unfinished == 520
        batch.free.set()
        assert len(large.result(timeout=5)) == 500 and len(small.result(timeout=5)) == 20
    thread.stop()
    assert max(map(len, batch.added)) <= 16
    last = max(step for step, added in enumerate(batch.added) if "small" in added)
    assert "large" in batch.added[last + 1]


def test_a_caller_who_leaves_before_all_of_theirs_are_in_the_batch():
    thread, deadline = EngineThread("engine under test"), Deadline(60)
    thread.batch = batch = _Counts()
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(thread.run, ["large"] * 5000, 60, deadline)
        wait_until(lambda: batch.names)
        deadline.abandon()
        with pytest.raises(AbandonedError):
            leaving.result(timeout=5)
    wait_until(lambda: thread.unfinished == 0)
    assert len(batch.names) < 5000
    thread.stop()


class _Stuck:
    """A batch whose step never comes back, as an engine hangs."""

    def __init__(self):
        self.free = threading.Event()

    def add(self, name, request):
        pass

    def step(self):
        self.free.wait()
        raise RuntimeError("woken")

    def abort(self, names):
        pass

    def wake(self):
        self.free.set()


def test_every_caller_of_an_engine_that_hangs_gets_an_error_though_new_ones_come():
    thread = EngineThread("engine under test")
    thread.batch = _Stuck()
    with ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        waiting = [pool.submit(thread.run, ["one"], 0.5)]
        while time.monotonic() - started < 1.0 and not waiting[0].done():
            waiting.append(pool.submit(thread.run, ["more"], 0.5))
            time.sleep(0.1)
        for one in waiting:
            with pytest.raises(EngineError, match="gave no sign of life"):
                one.result(timeout=5)
        assert time.monotonic() - started < 3
    with pytest.raises(EngineError, match="is not used again"):
        thread.check(0.5)
    thread.stop()


def test_an_idle_engine_is_not_taken_to_hang():
    thread = EngineThread("engine under test")
    time.sleep(0.3)
    thread.check(0.1)
    assert thread.call(lambda tick: "done", 0.1) == "done"
    thread.stop()
    with pytest.raises(EngineError, match="is not used again: it was closed"):
        thread.call(lambda tick: "late", 0.1)

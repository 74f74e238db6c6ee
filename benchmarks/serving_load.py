"""Clients that ask a server side by side, each answer held against what the same question got alone."""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

_TIMEOUT_SEC = 300.0
_ROUNDING = 2e-3  # of values and nats in float32, when the batch is another one
_LONGEST_WAIT_SEC = 5.0  # after a 429, whatever Retry-After says: the load must stay on


@dataclass(frozen=True)
class AnswerRequest:
    """One request that can be repeated.

    Attributes:
        kind: Its budget's name.
        body: What is sent to chat completions, seed included.
    """

    kind: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a client got: the text with value and nats, or the status of an error; and how long it took.

    Attributes:
        kind: The question's.
        text: None for an error.
        value: Of the text.
        nats: Spent on it; None without a distribution.
        seconds: From the first attempt to the answer, 429s and the waits after them included.
        at_sec: Of the first attempt, since the load began.
        turned_away: 429s before it.
        error: What came instead of a text.
    """

    kind: str
    text: str | None
    value: float
    nats: float | None
    seconds: float
    at_sec: float
    turned_away: int = 0
    error: str = ""

    def differs_from(self, other: Reply) -> str:
        """Return what is another than in an answer to the same question: text, value or nats; empty for none."""
        if self.text != other.text:
            return "text"
        return next(
            (name for name in ("value", "nats") if not _is_close(getattr(self, name), getattr(other, name))), ""
        )


@dataclass
class Load:
    """What happened under load.

    Attributes:
        replies: Answers and errors, in the order they came.
        different: Answers that were another text than alone, value or nats, as (question, reply, what).
        memory: (seconds since the start, MiB of the server, MiB of its engine), about once a second.
    """

    replies: list[Reply] = field(default_factory=list)
    different: list[tuple[AnswerRequest, Reply, str]] = field(default_factory=list)
    memory: list[tuple[float, float, float]] = field(default_factory=list)


def ask(client: httpx.Client, question: AnswerRequest, *, stream: bool, started: float) -> Reply:
    """Ask until there is an answer or an error; after a 429 again, when the server says."""
    asked, turned_away = time.monotonic(), 0

    def reply(text: str | None, told: dict[str, Any] | None, error: str = "") -> Reply:
        value, nats = (0.0, None) if told is None else (told["value"], told["nats"])
        return Reply(question.kind, text, value, nats, time.monotonic() - asked, asked - started, turned_away, error)

    while True:
        try:
            answer = client.post("/v1/chat/completions", json={**question.body, "stream": stream})
        except httpx.HTTPError as error:
            return reply(None, None, repr(error))
        if answer.status_code != 429:
            break
        turned_away += 1
        time.sleep(min(float(answer.headers["retry-after"]), _LONGEST_WAIT_SEC))
    if answer.status_code != 200:
        return reply(None, None, f"{answer.status_code} {answer.text}")
    text, told = _streamed(answer.text) if stream else _whole(answer.json())
    return reply(None, None, f"a stream without an end: {answer.text}") if told is None else reply(text, told)


def _is_close(value: float | None, other: float | None) -> bool:
    """Return whether two figures are one but for rounding in another batch."""
    if value is None or other is None:
        return value is other
    return math.isclose(value, other, rel_tol=_ROUNDING, abs_tol=_ROUNDING)


def _whole(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return body["choices"][0]["message"]["content"], body["transport"]


def _streamed(events: str) -> tuple[str, dict[str, Any] | None]:
    """Return the text and the transport of a stream; None for the latter where it did not end well."""
    text, told, ended = "", None, False
    for line in events.splitlines():
        if line == "data: [DONE]":
            ended = True
        elif line.startswith("data: "):
            body = json.loads(line.removeprefix("data: "))
            for choice in body.get("choices", ()):
                text += choice["delta"].get("content", "")
            told = body.get("transport", told)
    return text, told if ended else None


def alone(url: str, questions: Sequence[AnswerRequest]) -> dict[int, Reply]:
    """Return what each question gets when nothing else is asked, by its place.

    Raises:
        RuntimeError: If one gets an error.
    """
    found = {}
    with httpx.Client(base_url=url, timeout=_TIMEOUT_SEC) as client:
        for index, question in enumerate(questions):
            reply = ask(client, question, stream=False, started=time.monotonic())
            if reply.text is None:
                raise RuntimeError(f"a question asked alone got no answer: {reply}")
            found[index] = reply
    return found


def under_load(
    url: str,
    questions: Sequence[AnswerRequest],
    known: dict[int, Reply],
    *,
    clients: int,
    seconds: float,
    resident_mib: Callable[[], tuple[float, float]],
) -> Load:
    """Let clients ask at random for some seconds, every other one as a stream; returns when the last has its answer."""
    load, lock, started = Load(), threading.Lock(), time.monotonic()
    ended = threading.Event()

    def one_client(number: int) -> None:
        choice = random.Random(number)
        with httpx.Client(base_url=url, timeout=_TIMEOUT_SEC) as client:
            while time.monotonic() - started < seconds:
                index = choice.randrange(len(questions))
                reply = ask(client, questions[index], stream=number % 2 == 1, started=started)
                with lock:
                    load.replies.append(reply)
                    if reply.text is not None and (what := reply.differs_from(known[index])):
                        load.different.append((questions[index], reply, what))

    def watch() -> None:
        while not ended.wait(1.0):
            with contextlib.suppress(psutil.NoSuchProcess):  # the server is gone, which its clients report
                load.memory.append((time.monotonic() - started, *resident_mib()))

    threads = [threading.Thread(target=one_client, args=(number,)) for number in range(clients)]
    watching = threading.Thread(target=watch)
    for thread in (*threads, watching):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    watching.join()
    return load


def resident_mib(server: psutil.Process) -> tuple[float, float]:
    """Return the resident memory of a server and of the processes that it has now, its engine's, in MiB."""
    return _mib(server), sum(_mib(one) for one in server.children(recursive=True))


def _mib(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / 2**20
    except psutil.NoSuchProcess:  # an engine that died; another one may follow
        return 0.0

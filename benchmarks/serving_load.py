"""Clients that ask a server side by side, each answer held against what the same question got alone."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

_TIMEOUT_SEC = 300.0
_LONGEST_WAIT_SEC = 5.0  # after a 429, whatever Retry-After says: the load must stay on


@dataclass(frozen=True)
class Question:
    """One request that can be repeated.

    Attributes:
        kind: Its budget's name.
        body: What is sent to chat completions, seed included.
    """

    kind: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a client got: the text with value and nats, or the status of an error; and how long it took."""

    kind: str
    text: str | None
    value: float
    nats: float | None
    seconds: float
    at_sec: float
    error: str = ""


@dataclass
class Load:
    """What happened under load.

    Attributes:
        replies: Answers and errors, in the order they came.
        different: Answers that were another text than alone, as (question, reply).
        turned_away: 429s; each was asked again.
        memory: (seconds since the start, MiB of the server, MiB of its engine), about once a second.
    """

    replies: list[Reply] = field(default_factory=list)
    different: list[tuple[Question, Reply]] = field(default_factory=list)
    turned_away: int = 0
    memory: list[tuple[float, float, float]] = field(default_factory=list)


def ask(client: httpx.Client, question: Question, *, stream: bool, started: float) -> Reply | None:
    """Ask once; None after a 429."""
    asked = time.monotonic()
    try:
        answer = client.post("/v1/chat/completions", json={**question.body, "stream": stream})
    except httpx.HTTPError as error:
        return Reply(question.kind, None, 0, None, time.monotonic() - asked, asked - started, repr(error))
    seconds = time.monotonic() - asked
    if answer.status_code == 429:
        time.sleep(min(float(answer.headers["retry-after"]), _LONGEST_WAIT_SEC))
        return None
    if answer.status_code != 200:
        return Reply(question.kind, None, 0, None, seconds, asked - started, f"{answer.status_code} {answer.text}")
    text, told = _streamed(answer.text) if stream else _whole(answer.json())
    if told is None:
        return Reply(question.kind, None, 0, None, seconds, asked - started, f"a stream without an end: {answer.text}")
    return Reply(question.kind, text, told["value"], told["nats"], seconds, asked - started)


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


def alone(url: str, questions: Sequence[Question]) -> dict[int, Reply]:
    """Return what each question gets when nothing else is asked, by its place.

    Raises:
        RuntimeError: If one gets an error.
    """
    found = {}
    with httpx.Client(base_url=url, timeout=_TIMEOUT_SEC) as client:
        for index, question in enumerate(questions):
            reply = ask(client, question, stream=False, started=time.monotonic())
            if reply is None or reply.text is None:
                raise RuntimeError(f"a question asked alone got no answer: {reply}")
            found[index] = reply
    return found


def under_load(
    url: str,
    questions: Sequence[Question],
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
                while (reply := ask(client, questions[index], stream=number % 2 == 1, started=started)) is None:
                    with lock:
                        load.turned_away += 1
                with lock:
                    load.replies.append(reply)
                    if reply.text is not None and reply.text != known[index].text:
                        load.different.append((questions[index], reply))

    def watch() -> None:
        while not ended.wait(1.0):
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


def resident_mib(server: psutil.Process, engine: Sequence[psutil.Process]) -> tuple[float, float]:
    """Return the resident memory of a server and of its engine's processes, in MiB."""
    return server.memory_info().rss / 2**20, sum(one.memory_info().rss for one in engine) / 2**20

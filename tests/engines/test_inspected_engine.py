"""What an engine writes is seen by the inspector first; what it reads, and its weights, are its own business."""

import pytest

from vgf_llm.engines.engine import EngineRequest, EngineText
from vgf_llm.engines.inspected_engine import InspectedEngine

READ = EngineRequest([1, 2], 1, prompt_logprobs=4)


class Recorder:
    """An engine that writes the number of tokens it was asked for, and remembers its calls."""

    name = "recorder"

    def __init__(self):
        self.calls = []

    def run(self, requests, deadline=None):
        self.calls.append(("run", deadline))
        return [EngineText([7] * request.max_tokens) for request in requests]

    def check(self):
        self.calls.append("check")

    def push_adapter(self, folder):
        self.calls.append(("adapter", folder))
        return f"adapter at {folder}"

    def push_weights(self, folder):
        self.calls.append(("weights", folder))

    def close(self):
        self.calls.append("close")


def inspected():
    seen = []
    recorder = Recorder()
    return InspectedEngine(recorder, lambda requests, texts: seen.append((requests, texts))), recorder, seen


def test_the_inspector_sees_what_is_written_and_not_what_is_read():
    engine, recorder, seen = inspected()
    write = EngineRequest([1], 3, logprobs=2)
    texts = engine.run([write, READ])
    assert [len(text.tokens) for text in texts] == [3, 1]
    assert seen == [([write], [texts[0]])]
    assert engine.run([READ])[0].tokens == [7] and engine.run([]) == [] and len(seen) == 1
    assert engine.name == recorder.name


def test_texts_that_the_inspector_refuses_do_not_reach_the_caller():
    def refuse(requests, texts):
        raise ValueError("of other weights")

    with pytest.raises(ValueError, match="of other weights"):
        InspectedEngine(Recorder(), refuse).run([EngineRequest([1], 3)])


def test_all_else_is_the_engines():
    engine, recorder, _ = inspected()
    deadline = object()
    engine.run([READ], deadline)
    assert engine.push_adapter("a") == "adapter at a"
    engine.push_weights("w")
    engine.check()
    engine.close()
    assert recorder.calls == [("run", deadline), ("adapter", "a"), ("weights", "w"), "check", "close"]

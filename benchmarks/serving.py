"""The server under load: is every answer the one that its seed gets alone, does memory grow, how long does one wait.

    python -m benchmarks.serving [--record]
    python -m benchmarks.serving --shape tiny --seconds 120

Starts the real ``vgf-llm serve`` on this machine, asks each question alone, lets clients ask the same ones side by
side to warm up, and then again for the seconds that are measured: a quarter each of plain answers, best-of-N, a
budget, and a larger budget in two rounds; every other client reads a stream. Reported are answers that were lost (an
error) or different (another text than alone, or another value or nats beyond rounding; in float32 two tokens that are
as good as tied may fall either way in another batch, and every such answer is shown beside the one alone), seconds
from a question's first attempt to its answer by kind (p50, p95) with the 429s on the way, and resident memory: the
median of the last thirty seconds against that of the first thirty, and one sample every ten seconds. The last line of
standard output is one JSON object; ``--record`` writes docs/results/serving[_<shape>].json too. The exit code is 1
where an answer was lost, and with ``--shape tiny`` also where one was different: a text of the tiny model does not
hang by a near tie.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.serving_load import AnswerRequest, Load, Reply, alone, resident_mib, under_load
from benchmarks.serving_process import ServerProcess, served
from vgf_llm.cli import run_main
from vgf_llm.engines.vllm_env import UNBOUND_THREADS, set_defaults
from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import check_writable, write_json_atomic

PROMPTS_FILE = "recipes/smollm2_sentiment/data/prompts_test.jsonl"
_WINDOW_SEC = 30.0
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 0, "num_particles": 1},
    "best-of-8": {"steps": 0, "num_particles": 8},
    "2 nats": {"nats": 2.0, "num_particles": 4, "draws": 1},
    "4 nats in 2 rounds": {"nats": 4.0, "num_particles": 4, "draws": 1, "rounds": 2},
}
_TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, record it if asked, and print the JSON line; returns the exit code."""
    arguments = _arguments(argv)
    folder = check_writable("docs/results") if arguments.record else Path()
    with tempfile.TemporaryDirectory(prefix="serving.") as scratch:
        flags, prompts = _tiny(Path(scratch)) if arguments.shape == "tiny" else _smollm2(arguments)
        flags += ["--max_running", str(arguments.max_running), "--max_waiting", str(arguments.max_waiting)]
        with served([*flags, "--served_name", "served"]) as server:
            figures = measure(server, _questions(prompts, arguments), arguments)
    given = sys.argv[1:] if argv is None else argv
    figures |= {"setting": vars(arguments), "kinds": KINDS, "hardware": hardware()}
    figures["command"] = f"python -m benchmarks.serving {' '.join(given)}".strip()
    if arguments.record:
        suffix = "" if arguments.shape == "smollm2" else f"_{arguments.shape}"
        write_json_atomic(folder / f"serving{suffix}.json", figures)
    print(json.dumps(figures))
    is_wrong = figures["lost"] or (arguments.shape == "tiny" and figures["different"])
    return 1 if is_wrong else 0


def measure(server: ServerProcess, questions: list[AnswerRequest], arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask alone, ask under load, and return the figures."""
    known = alone(server.url, questions)
    print(f"{len(known)} questions answered alone", file=sys.stderr)
    watch = partial(resident_mib, psutil.Process(server.process.pid))
    loaded = partial(under_load, server.url, questions, known, clients=arguments.clients, resident_mib=watch)
    warm_up = loaded(seconds=arguments.warm_up)
    print(f"{len(warm_up.replies)} answered to warm up", file=sys.stderr)
    load = loaded(seconds=arguments.seconds)
    by_seed = {question.body["seed"]: known[index] for index, question in enumerate(questions)}
    for question, reply, what in load.different:
        seed = question.body["seed"]
        print(
            f"another {what} than alone: {question.kind}, seed {seed}: {reply.text!r}, value {reply.value}, nats "
            f"{reply.nats}; alone {by_seed[seed].text!r}, {by_seed[seed].value}, {by_seed[seed].nats}",
            file=sys.stderr,
        )
    lost = [reply.error for reply in load.replies if reply.text is None]
    for error in lost[:5]:
        print(f"lost: {error}", file=sys.stderr)
    return {
        "answers": len(load.replies) - len(lost),
        "lost": len(lost),
        "different": len(load.different),
        "different_in": {one: sum(what == one for *_, what in load.different) for one in ("text", "value", "nats")},
        "turned_away": sum(reply.turned_away for reply in load.replies),
        "answers_per_sec": round((len(load.replies) - len(lost)) / _span(load), 3),
        "seconds": {kind: _waiting(kind, load.replies) for kind in KINDS},
        "alone_seconds": {kind: _waiting(kind, list(known.values())) for kind in KINDS},
        "warm_up": {"answers": len(warm_up.replies), "memory_mib": _memory(warm_up)},
        "memory_mib": _memory(load),
    }


def _span(load: Load) -> float:
    return max(reply.at_sec + reply.seconds for reply in load.replies)


def _waiting(kind: str, replies: Sequence[Reply]) -> dict[str, Any]:
    answers = [reply for reply in replies if reply.kind == kind and reply.text is not None]
    seconds = [reply.seconds for reply in answers]
    found = {"answers": len(answers), "turned_away": sum(reply.turned_away for reply in answers)}
    if len(seconds) < 2:
        return found
    return {
        **found,
        "p50": round(statistics.median(seconds), 3),
        "p95": round(statistics.quantiles(seconds, n=20)[-1], 3),
    }


def _memory(load: Load) -> dict[str, Any]:
    """Return the resident memory at the beginning and at the end, its growth between the two, and one sample in ten."""
    end = load.memory[-1][0]
    early = [one for one in load.memory if one[0] < _WINDOW_SEC] or load.memory
    late = [one for one in load.memory if one[0] >= end - _WINDOW_SEC]
    found: dict[str, Any] = {"at_sec": [round(one[0]) for one in load.memory[::10]]}
    for column, name in enumerate(("server", "engine"), 1):
        first, last = (statistics.median([one[column] for one in part]) for part in (early, late))
        found[name] = {"at_start": round(first, 1), "at_end": round(last, 1), "growth": round(last - first, 1)}
        found[name]["samples"] = [round(one[column]) for one in load.memory[::10]]
    return found


def _questions(prompts: Sequence[str], arguments: argparse.Namespace) -> list[AnswerRequest]:
    """Return every kind on every prompt, each with a seed of its own."""
    return [
        AnswerRequest(
            kind,
            {
                "model": "served",
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": arguments.tokens,
                "seed": 1000 * number + place,
                "transport": transport,
            },
        )
        for number, prompt in enumerate(prompts)
        for place, (kind, transport) in enumerate(KINDS.items())
    ]


def _smollm2(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    from vgf_llm.data.prompts import load_prompts

    prompts = [str(one) for one in load_prompts(PROMPTS_FILE, "prompt", limit=arguments.prompts)]
    eager = str(arguments.eager).lower()
    return ["--reward_model", arguments.reward_model, "--engine.kv_cache_gib", "0.5", "--engine.eager", eager], prompts


def _tiny(folder: Path) -> tuple[list[str], list[str]]:
    """Write a random model of two layers with a value cut from it; returns the flags that serve them and prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from reward_models.modelling import RewardModel

    torch.manual_seed(0)
    words = {f"word{index}": index for index in range(200)}
    backend = Tokenizer(models.WordLevel(words, unk_token="word3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="word0", eos_token="word2")
    config = LlamaConfig(
        vocab_size=len(words),
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=2,
        **_TINY,
    )
    base = LlamaForCausalLM(config)
    value = RewardModel.from_base(base, num_layers=1)
    for part in (base, tokenizer):
        part.save_pretrained(folder / "base")
    value.save_pretrained(folder / "reward")
    flags = ["--model_name_or_path", str(folder / "base"), "--reward_model", str(folder / "reward"), "--device", "cpu"]
    prompts = [" ".join(f"word{(7 * i + j) % 190 + 5}" for j in range(6)) for i in range(8)]
    return [*flags, "--engine.kv_cache_gib", "0.1", "--engine.eager", "true"], prompts


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2", "tiny"), default="smollm2", help="the model")
    parser.add_argument("--reward_model", default="outputs/smollm2_sentiment/reward", help="folder, for smollm2")
    parser.add_argument("--clients", type=int, default=32, help="clients that ask side by side")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long they begin new questions")
    parser.add_argument("--warm_up", type=float, default=60.0, help="seconds of load before that")
    parser.add_argument("--prompts", type=int, default=8, help="prompts, for smollm2; each is asked in every kind")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--max_running", type=int, default=8, help="requests that the server works on at once")
    parser.add_argument("--max_waiting", type=int, default=16, help="requests that may wait; fewer clients, no 429")
    parser.add_argument("--eager", action="store_true", help="start the engine without compiling the model")
    parser.add_argument("--record", action="store_true", help="write docs/results/serving[_<shape>].json too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    set_defaults(os.environ, UNBOUND_THREADS)
    sys.exit(run_main(main))

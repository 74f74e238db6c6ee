"""Trainings killed at random instants: nothing published is lost, and the resumed run ends where the whole one does.

    python -m benchmarks.kill_loop --kills 200 --minutes 60 [--record kill_loop]

Four commands on a tiny model: ``reward``, ``value``, ``secant`` and ``train`` (policy with adapters and a learned
value). An episode takes one of them, kills it with SIGKILL one to four times, resumes it after each kill, and lets it
end. Three instants in four are uniform over the time that the run takes, the fourth comes a few milliseconds after a
folder that is being written has appeared. After every kill:

    published   checkpoints that were there are there and verify (with a limit: the newest)
    lost_steps  steps logged beyond the newest checkpoint, at most save_steps
    result      weights in place are none or the whole run's; of the secant head the old pair or the new one

and at the end the last checkpoint and the result are compared with the uninterrupted run's bit for bit. Each run is a
fork of this process, which has imported the libraries. Every finished episode is a line of ``episodes.jsonl`` in
``--folder``: called again with the same folder, the loop continues. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgf_llm.cli import run_main
from vgf_llm.machine.facts import hardware
from vgf_llm.runs.files import append_jsonl, check_writable, read_jsonl, write_json_atomic

_RECORDS = Path("docs/results")
_SAVE_STEPS, _STEPS = 2, 8
_MOST_KILLS = 4
_NOUNS = ("dog", "cat", "sea", "rain", "tree", "house", "train", "night")
_BASE = ("--model_name_or_path", "base", "--dtype", "float32")
_STEPPED = ("--max_steps", _STEPS, "--save_steps", _SAVE_STEPS, "--logging_steps", 1, "--bf16", "false")
_SCORES = (*_BASE, *_STEPPED, "--num_layers", 1, "--max_length", 32, "--per_device_train_batch_size", 2,
           "--fidelity_responses", 2, "--fidelity_substitutions", 12, "--embedding_noise", 0.1)  # fmt: skip
_LIBRARIES = ("reward_models.value_trainer", "reward_models.secant_fit", "reward_models.assess",
              "vgf_llm.runs.hf_arguments", "vgf_llm.training.trainer", "peft", "datasets")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command: its module and arguments but the output folder."""

    module: str
    arguments: tuple[Any, ...]


JOBS = {
    "reward": Job("reward_models.train", ("--train_dataset", "pairs.jsonl", *_SCORES)),
    "value": Job("reward_models.train_value", ("--train_dataset", "logged.jsonl", *_SCORES, "--lora_r", 2)),
    "secant": Job(
        "reward_models.train_secant",
        (*_BASE, "--prompts", "prompts.jsonl", "--validation_prompts", "unseen.jsonl", "--device", "cpu",
         "--hidden", 8, "--steps", 20, "--substitutions", 6, "--validation_substitutions", 12,
         "--max_new_tokens", 6, "--shortlist", 10),
    ),
    "policy": Job(
        "vgf_llm.train",
        (*_BASE, *_STEPPED, "--prompts", "prompts.jsonl", "--rewards", "length_words", "--value", "learned",
         "--learned_value.num_layers", 1, "--lora_r", 2, "--num_particles", 2, "--max_new_tokens", 6,
         "--per_device_train_batch_size", 2),
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run episodes until there were enough kills or minutes; returns 1 where something was lost or differs."""
    arguments = _arguments(argv)
    if arguments.record:
        check_writable(_RECORDS)
    folder = check_writable(arguments.folder).resolve()
    for name in _LIBRARIES:
        importlib.import_module(name)
    started = time.monotonic()
    rows_path = folder / "episodes.jsonl"
    rows = read_jsonl(rows_path) if rows_path.exists() else []
    _write_inputs(folder)
    wholes = {name: _whole_run(folder, name) for name in arguments.jobs}
    while sum(row["kills"] for row in rows) < arguments.kills and time.monotonic() - started < 60 * arguments.minutes:
        episode, left = len(rows), arguments.kills - sum(row["kills"] for row in rows)
        name = arguments.jobs[episode % len(arguments.jobs)]
        row = _episode(folder, name, random.Random(f"{arguments.seed} {episode}"), wholes[name], left)
        append_jsonl(rows_path, [{"episode": episode, **row}])
        rows.append(row)
        print(f"episode {episode}: {row}", file=sys.stderr, flush=True)
    summary = summarise(rows) | {
        "seconds": round(time.monotonic() - started, 1),
        "seed": arguments.seed,
        "hardware": hardware(),
        "command": " ".join(["python -m benchmarks.kill_loop", *(sys.argv[1:] if argv is None else argv)]),
    }
    if arguments.record:
        write_json_atomic(_RECORDS / f"{arguments.record}.json", summary)
    print(json.dumps(summary))
    return int(bool(summary["faults"]))


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return kills, resumed runs and faults by job, and what the kills hit."""
    names = sorted({row["job"] for row in rows})
    of = {name: [row for row in rows if row["job"] == name] for name in names}
    return {
        "kills": sum(row["kills"] for row in rows),
        "episodes": len(rows),
        "faults": [fault for row in rows for fault in row["faults"]],
        "largest_lost_steps": max((row["lost_steps"] for row in rows), default=0),
        "jobs": {
            name: {
                "kills": sum(row["kills"] for row in own),
                "episodes": len(own),
                "kills_while_writing": sum(row["while_writing"] for row in own),
                "faults": sum(len(row["faults"]) for row in own),
            }
            for name, own in of.items()
        },
    }


# An episode ----------------------------------------------------------------------------------------------------------


def _episode(folder: Path, name: str, rng: random.Random, whole: dict[str, Any], most: int) -> dict[str, Any]:
    """Kill a run up to four times, resume it, let it end, and compare."""
    output = folder / f"{name}_killed"
    limit = rng.choice(["null", "1", "2"])
    _fresh(folder, output, name)
    kills = writing = lost = 0
    faults: list[str] = []
    for attempt in range(rng.randint(1, min(_MOST_KILLS, most))):
        began, before, left_over = time.monotonic(), _published(output), _being_written(output)
        aimed, delay = rng.random() < 0.25, rng.uniform(0, whole["seconds"])
        pid = _start(folder, name, output, limit)
        if not _kill(pid, output, delay, aimed):
            if attempt == 0:  # it had ended: the machine is faster now
                whole["seconds"] = min(whole["seconds"], time.monotonic() - began)
            break
        kills += 1
        writing += bool(_being_written(output) - left_over)
        found = _look(output, name, whole, before, limit)
        lost, faults = max(lost, found[0]), faults + found[1]
    code = _wait(_start(folder, name, output, limit))
    if code != 0:
        faults.append(f"{name}: the resumed run ended with {code}: {(output / 'said.txt').read_text()[-500:]}")
    else:
        faults += [f"{name}: {line}" for line in _compare(folder / f"{name}_whole", output, name)]
    return {"job": name, "kills": kills, "while_writing": writing, "lost_steps": lost, "limit": limit, "faults": faults}


def _look(output: Path, name: str, whole: dict[str, Any], before: list[int], limit: str) -> tuple[int, list[str]]:
    """Return the steps that a kill has cost, and what it should not have."""
    from vgf_llm.errors import VGFError
    from vgf_llm.runs.manifest import verify
    from vgf_llm.runs.result import settle

    faults, after = [], _published(output)
    for step in after:
        try:
            verify(output / f"checkpoint-{step}")
        except VGFError as error:
            faults.append(f"{name}: published, but {error}")
    must = before if limit == "null" else before[-1:]
    if limit != "null" and before and after and after[-1] > before[-1]:
        must = []  # a newer one stands in its place
    faults += [f"{name}: checkpoint-{step} was lost" for step in must if step not in after]
    settle(output)
    result = _result(output, name)
    if result not in (None, whole["result"], whole["old"]):
        faults.append(f"{name}: the result is neither the old one nor the new one")
    metrics = output / "metrics.jsonl"
    logged = max((row["step"] for row in read_jsonl(metrics)), default=0) if metrics.exists() else 0
    lost = max(0, logged - (after[-1] if after else 0))
    if name != "secant" and lost > _SAVE_STEPS:
        faults.append(f"{name}: {lost} steps were lost")
    return (0 if name == "secant" else lost), faults


def _compare(whole: Path, output: Path, name: str) -> list[str]:
    """Name what differs between the results of a resumed run and the whole one."""
    from vgf_llm.runs.compare import compare_checkpoints

    lines = []
    if name != "secant":
        last = f"checkpoint-{_STEPS}"
        lines += compare_checkpoints(whole / last, output / last)
    if _result(whole, name) != _result(output, name):
        lines.append("the results differ")
    if left := [path.name for path in output.glob(".*") if path.is_dir()]:
        lines.append(f"left behind: {', '.join(left)}")
    return lines


def _result(output: Path, name: str) -> str | None:
    """Return a digest of a result's weights, None where the folder holds none that would load."""
    guard = {"secant": "secant.json", "policy": "adapter_config.json"}.get(name, "config.json")
    if not (output / guard).is_file():
        return None
    digest = hashlib.sha256()
    if name == "secant":
        digest.update(str(json.loads((output / guard).read_text())["training"]["fit_seed"]).encode())
    pattern = "secant.safetensors" if name == "secant" else "*.safetensors"
    for path in sorted(output.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _being_written(output: Path) -> set[tuple[str, int]]:
    """Return names and inodes of the folders that are being written, or were when their process was killed."""
    found = set()
    for path in output.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def _published(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))


# Processes -----------------------------------------------------------------------------------------------------------


def _whole_run(folder: Path, name: str) -> dict[str, Any]:
    """Run a job without a kill; returns its seconds and the digests of its result and the one before.

    Done at every call: the seconds are those of the machine as it is now.
    """
    output = folder / f"{name}_whole"
    _fresh(folder, output, name)
    old, began = _result(output, name), time.monotonic()
    code = _wait(_start(folder, name, output, "null"))
    if code != 0:
        raise SystemExit(f"{name} ended with {code}: {(output / 'said.txt').read_text()[-3000:]}")
    return {"seconds": time.monotonic() - began, "result": _result(output, name), "old": old}


def _start(folder: Path, name: str, output: Path, limit: str) -> int:
    """Fork, and run the command in the child; returns its process id."""
    job = JOBS[name]
    to = "--reward_model" if name == "secant" else "--output_dir"
    resume = "true" if _published(output) else "false"  # an old result and no checkpoint: the run begins anew
    more = () if name == "secant" else ("--resume", resume, "--save_total_limit", limit)
    argv = [str(argument) for argument in (*job.arguments, to, output.name, *more)]
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        said = os.open(output / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = run_main(importlib.import_module(job.module).main, argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill(pid: int, output: Path, delay_sec: float, aimed: bool) -> bool:
    """Kill a process after a delay, or (aimed) when it writes something; returns whether it was still running."""
    began = time.monotonic()
    known = _being_written(output)  # of an earlier kill
    while time.monotonic() - began < delay_sec or aimed:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        if aimed and time.monotonic() - began > delay_sec / 2 and _being_written(output) - known:
            time.sleep(delay_sec % 0.01)
            break
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Inputs --------------------------------------------------------------------------------------------------------------


def _fresh(folder: Path, output: Path, name: str) -> None:
    """Empty an output folder; a secant head finds a reward model there, and an older head."""
    if output.exists():
        shutil.rmtree(output)
    if name != "secant":
        output.mkdir()
        return
    shutil.copytree(_reward_with_head(folder), output)


def _reward_with_head(folder: Path) -> Path:
    """Train a reward model and fit a head of another seed, once a folder."""
    template = folder / "reward_with_head"
    if not (template / "secant.json").exists():
        template.mkdir(exist_ok=True)
        _wait(_start(folder, "reward", template, "1"))
        for checkpoint in template.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        usual = JOBS["secant"]
        JOBS["secant"] = Job(usual.module, (*usual.arguments, "--fit_seed", 1))
        _wait(_start(folder, "secant", template, "null"))
        JOBS["secant"] = usual
    return template


def _write_inputs(folder: Path) -> None:
    """Write a model of two layers and 32 units with a tokenizer of words, and data."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    if (folder / "base" / "config.json").exists():
        return
    words = [
        "<pad>",
        "<eos>",
        "<unk>",
        *_NOUNS,
        *["write", "about", "the", "a", "is", "good", "bad", "great", "sad", "blue", "red", "and", "very", "of"],
    ]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, initializer_range=0.2, **sizes)
    tables = {
        "prompts": [{"prompt": f"write about the {noun}"} for noun in _NOUNS],
        "unseen": [{"prompt": f"about the {noun}"} for noun in _NOUNS[:4]],
        "pairs": [{"prompt": f"the {n}", "chosen": f"the {n} is good", "rejected": f"the {n} is bad"} for n in _NOUNS],
        "logged": [{"prompt": f"the {n}", "response": f"is {w}", "reward": r} for n in _NOUNS
                   for w, r in (("good", 1.0), ("bad", -1.0))],
    }  # fmt: skip
    for table, rows in tables.items():
        (folder / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "base")
    LlamaForCausalLM(config).save_pretrained(folder / "base")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_loop", description="Kill trainings, resume them.")
    parser.add_argument("--kills", type=int, default=200, help="kills in all, those of earlier calls included")
    parser.add_argument("--minutes", type=float, default=60.0, help="no episode begins after so long")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="commands, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument(
        "--folder", default="outputs/kill_loop", help="runs and episodes.jsonl; continues what is there"
    )
    parser.add_argument("--record", default="", help=f"also write {_RECORDS}/<record>.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

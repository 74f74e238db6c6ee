"""What is data is whole on standard output, what is for people is on standard error, and libraries write into a log."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_tokenizer
from vgf_llm.console import library_log, progress, screen
from vgf_llm.console.progress import Bar, duration, stage, stages, track, working

ROOT = Path(__file__).parents[2]
NOUNS = ("sea", "dog", "tree", "cat", "train", "rain")


def printing(prompts, responses):
    """Score by length, and print as people do who look for a mistake."""
    print("a reward function prints")
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base, a reward model with an input skip cut from it, prompts and pairs."""
    folder = tmp_path_factory.mktemp("screen")
    base = build_llama()
    base.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    for name in ("reward", "fitted"):  # a head is fitted beside the second
        RewardModel.from_base(base, num_layers=1, input_skip=True).save_pretrained(folder / name)
    for name, nouns in (("prompts", NOUNS[:3]), ("unseen", NOUNS[3:])):
        rows = [{"prompt": f"write about the {noun}"} for noun in nouns]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": f"write about the {noun}", "chosen": f"the {noun} is {good}", "rejected": f"the {noun} is bad"}
        for noun in NOUNS
        for good in ("good", "great", "happy")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def commands(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Return short runs by name: module and arguments."""
    base = ["--model_name_or_path", f"{folder}/base"]
    prompts = ["--prompts", f"{folder}/prompts.jsonl", "--max_new_tokens", "6", "--top_k", "10"]
    models = [*base, "--reward_model", f"{folder}/reward", *prompts, "--num_particles", "3"]
    pairs = [*base, "--train_dataset", f"{folder}/pairs.jsonl", "--max_length", "64", "--eval_share", "0.3"]
    secant = ["--validation_prompts", f"{folder}/unseen.jsonl", "--responses", "2", "--substitutions", "10"]
    return {
        "generate": ("vgf_llm.generate", models),
        "evaluate": (
            "vgf_llm.evaluate",
            [*models, "--gold", "tests.console.test_screen:printing", "--best_of", "[3]", "--budgets", "[{nats: 1}]"],
        ),
        "transport": ("vgf_llm.transport", models),
        "reward": ("reward_models.train", [*pairs, "--max_steps", "4", "--logging_steps", "1", "--eval_steps", "2"]),
        "train": (
            "vgf_llm.train",
            [*base, *prompts, "--rewards", "tests.console.test_screen:printing", "--value", "learned", "--lora_r", "2"]
            + ["--max_steps", "2", "--logging_steps", "1", "--num_particles", "2"],
        ),
        "secant": (
            "reward_models.train_secant",
            [*base, "--reward_model", f"{folder}/fitted", *prompts, *secant, "--steps", "3", "--hidden", "8"]
            + ["--validation_substitutions", "20"],
        ),
        "direction": (
            "reward_models.train_direction",
            [*base, "--kind", "causal", "--reward", "tests.console.test_screen:printing", *prompts, *secant]
            + ["--steps", "3", "--hidden", "8", "--validation_substitutions", "20"],
        ),
    }


@pytest.fixture(scope="module")
def seen(folder):
    """Every command with either stream redirected, `generate` also with none and both: {(name, terminal): found}."""
    wanted = [(name, terminal) for name in commands(folder) for terminal in ("err", "out")]
    wanted += [("generate", "out err"), ("generate", "")]
    jobs = []
    for number, (name, terminal) in enumerate(wanted):
        module, argv = commands(folder)[name]
        if name not in ("generate", "secant"):
            argv = [*argv, "--output_dir", f"{folder}/out{number}"]
        jobs.append({"command": module, "argv": argv, "terminal": terminal.split()})
    done = subprocess.run(
        [sys.executable, "-m", "tests.terminal"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    folders = [Path(f"{folder}/out{number}") for number in range(len(jobs))]
    return {asked: one | {"folder": out} for asked, one, out in zip(wanted, found, folders, strict=True)}


@pytest.mark.parametrize("name", ["generate", "evaluate", "transport", "reward", "train", "secant", "direction"])
def test_standard_output_is_whole_and_all_data(seen, name):
    redirected = seen[name, "err"]
    assert redirected["code"] == 0, redirected["terminal"]
    lines = redirected["out"].splitlines()
    assert lines and all(isinstance(json.loads(line), dict) for line in lines)
    assert "{" not in redirected["terminal"] and "prints" not in redirected["terminal"]
    at_terminal = seen[name, "out"]
    assert at_terminal["code"] == 0, at_terminal["err"]
    assert [json.loads(line) for line in at_terminal["terminal"].splitlines()]  # no wrapping at 60 columns
    assert "\x1b" not in at_terminal["terminal"] and "\x1b" not in at_terminal["err"]


def test_generate_writes_the_same_rows_wherever_they_go(seen):
    rows = seen["generate", "err"]["out"].splitlines()
    assert len(rows) == 3
    assert seen["generate", ""]["out"].splitlines() == rows
    assert seen["generate", "out"]["terminal"].replace("\r", "").splitlines() == rows
    both = seen["generate", "out err"]["terminal"]
    assert all(f"{row}\r\n" in both for row in rows)  # whole, with bars before and after


def test_people_see_a_bar_and_no_library(seen):
    """On a terminal; without one the same lines stand in the log, without a bar."""
    shown = seen["reward", "err"]["terminal"]
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "training: 4 steps of 8 rows, about" in plain and "training pairs" in plain
    assert "/4 steps" in plain and "loading the base model" in plain
    for noise in ("Loading weights", "Writing model shards", "{'loss'", "[transformers]", "it/s"):
        assert noise not in shown and noise not in seen["reward", "out"]["err"]
    log = (seen["reward", "err"]["folder"] / "log.txt").read_text()
    assert "Loading weights" in log and "{'loss'" not in log
    rows = [json.loads(line) for line in (seen["reward", "err"]["folder"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]


def test_a_log_line_of_training_has_six_numbers(seen):
    lines = [line for line in seen["train", "out"]["err"].splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert re.fullmatch(
        r"step 1/2  reward [+-][\d.]+ original, [+-][\d.]+ transported, [+-][\d.]+ policy  KL -?[\d.]+ nats  .* left",
        lines[0],
    )
    log = (seen["train", "out"]["folder"] / "log.txt").read_text()
    assert "a reward function prints" in log
    metrics = (seen["train", "out"]["folder"] / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2 and len(json.loads(metrics[0])) > 20


@pytest.mark.parametrize("name", ["generate", "evaluate", "reward", "train"])
def test_nothing_is_imported_that_was_not_asked_for(seen, name):
    assert seen[name, "out"]["imported"] == []


LEAK = """
import os, subprocess, sys, warnings
from vgf_llm.cli import run_main
from vgf_llm.errors import DataError
from vgf_llm.console.library_log import library_output
from vgf_llm.console.screen import emit, say

def work(argv):
    with library_output({folder!r}):
        print("python's own output")
        warnings.warn("python's own warning")
        os.write(1, b"from C\\n")
        os.write(2, b"from C to stderr\\n")
        subprocess.run(["sh", "-c", "echo from a child; echo and its stderr >&2"])
        say("for people")
        emit('{{"for": "programs"}}')
        {end}
    return 0

sys.exit(run_main(work, []))
"""


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("pass", 0, "for people"),
        ("raise DataError('row 3 is odd')", 2, "error: row 3 is odd"),
        ("raise KeyError('odd')", 1, "KeyError: 'odd'"),
        ("raise BrokenPipeError", 141, "for people"),
        ("raise KeyboardInterrupt", 130, "--resume"),
    ],
)
def test_every_library_writes_into_the_log_and_errors_do_not(tmp_path, end, code, last):
    source = LEAK.format(folder=str(tmp_path), end=end)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert done.stdout == '{"for": "programs"}\n'
    assert "for people" in done.stderr and done.stderr.splitlines()[-1].endswith(last)
    assert ("log.txt'\n" in done.stderr) == (code in (1, 2))  # named where something went wrong
    log = (tmp_path / "log.txt").read_text()
    for leak in ("own output", "own warning", "from C\n", "from C to stderr", "from a child", "its stderr"):
        assert leak in log and leak not in done.stderr


def test_only_the_first_process_of_a_launch_speaks(tmp_path):
    source = LEAK.format(folder=str(tmp_path), end="raise DataError('row 3 is odd')")
    environment = os.environ | {"RANK": "1"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "for people" not in done.stderr and done.stderr.endswith("error: row 3 is odd\n")


def test_a_log_of_no_folder_is_kept_only_after_a_failure(tmp_path):
    for end, kept in (("pass", 0), ("raise DataError('odd')", 1)):
        source = LEAK.format(folder=None, end=end)
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, env=environment)
        logs = list(tmp_path.glob("vgf-llm-*.log"))
        assert len(logs) == kept and all(str(log) in done.stderr for log in logs)


# Progress -----------------------------------------------------------------------------------------------------------


def until_said(capsys: pytest.CaptureFixture[str], text: str) -> str:
    """Wait until a text is on standard error."""
    said, until = "", time.monotonic() + 60
    while text not in said:
        assert time.monotonic() < until, said
        time.sleep(0.02)
        said += capsys.readouterr().err
    return said


def test_long_work_gives_a_sign_of_life_though_no_item_ends(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_EVERY_SEC", 0.1)
    for number in track(range(2), "counting", unit="prompts"):
        if number == 0:
            assert until_said(capsys, "counting: 0/2 prompts, ").startswith("counting: 0/2")
    assert "counting: 2 prompts done in " in capsys.readouterr().err
    with working("reading"):
        assert until_said(capsys, "reading, ").startswith("reading\nreading, ")
    with progress.alive():
        until_said(capsys, "still working, ")


def test_a_bar_counts_what_its_items_stand_for(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_EVERY_SEC", 0.0)
    assert list(track([[1, 2], [3]], "answering", unit="prompts", size=len)) == [[1, 2], [3]]
    assert "answering: 3 prompts done" in capsys.readouterr().err


def test_rate_and_time_left_are_those_of_the_last_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = Bar("training", 100, "steps")
    bar.start_at(40)
    assert bar.left_sec is None and bar.status() == ""
    for _ in range(10):
        now[0] += 5.0
        bar.advance(loss=0.51234567)
    assert bar.rate == 0.2 and bar.left_sec == 250.0
    assert bar.line() == "training: 50/100 steps, 5 s/step, 4 min left, loss 0.5123"


def test_times_are_said_as_people_say_them():
    assert [duration(s) for s in (3.4, 89, 91, 3599, 4800)] == ["3 s", "89 s", "2 min", "1 h 0 min", "1 h 20 min"]


def test_stages_are_numbered_and_those_of_a_command_inside_are_not(capsys):
    with stages(2):
        stage("reward model", 118)
        with stages(3):
            stage("training", 11)
        stage("evaluation")
    assert capsys.readouterr().err.splitlines() == [
        "1/2 reward model, about 2 minutes",
        "training, about 10 seconds",
        "2/2 evaluation",
    ]


def test_without_own_streams_nothing_is_redirected(tmp_path, capsys):
    with library_log.library_output(tmp_path):
        print("seen")
    assert capsys.readouterr().out == "seen\n" and not (tmp_path / "log.txt").exists()


def test_data_is_utf8_whatever_the_locale(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    screen.emit('{"response": "caf\u00e9"}')
    assert raw.getvalue() == '{"response": "caf\u00e9"}\n'.encode()

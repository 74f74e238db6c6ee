"""The command line: help at once, faults of the input as one line with exit code 2, Ctrl-C as 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vgf_llm import __version__
from vgf_llm.cli import COMMANDS, main, run_main
from vgf_llm.errors import DataError

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_no_command_and_an_unknown_one(capsys):
    assert main([]) == 2
    assert main(["evalute"]) == 2
    told = capsys.readouterr().err
    assert "unknown command 'evalute'; commands: demo, reward, value, secant, direction, " in told


def test_a_fault_of_the_input_is_one_line_and_exit_code_2(capsys):
    def fails(argv):
        raise DataError("rows.jsonl, row 3: no column 'prompt'")

    assert run_main(fails, []) == 2
    assert capsys.readouterr().err == "error: rows.jsonl, row 3: no column 'prompt'\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    def fails(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(fails, [])


def test_arguments_and_code_are_handed_on():
    seen = []
    assert run_main(lambda argv: seen.append(argv) or 3, ["--a", "b"]) == 3
    assert run_main(lambda argv: seen.append(argv)) == 0
    assert seen == [["--a", "b"], None]


def test_interrupt_says_that_the_work_is_kept():
    code = (  # a shell that starts its work in the background hands down an ignored SIGINT
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from vgf_llm.cli import run_main\n"
        "def work(argv):\n    print('started', flush=True)\n    time.sleep(60)\n"
        "sys.exit(run_main(work, []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err


HEAVY = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "vllm", "trl")
LIGHT = """
import contextlib, importlib, io, json, sys
from vgf_llm.cli import COMMANDS, main

found = {}
for command in [[], *([name] for name in COMMANDS)]:
    for flags in (["--help"], ["--no_such_key", "1"]) if command else (["--help"],):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([*command, *flags])
            except SystemExit as error:
                code = error.code
        heavy = [name for name in %r if name in sys.modules]
        found[" ".join([*command, *flags])] = [code, out.getvalue(), err.getvalue(), heavy]
print(json.dumps(found))
"""


def test_help_and_an_unknown_flag_import_nothing_heavy():
    """All commands in one fresh interpreter: a module that one of them imports is still there afterwards."""
    result = run("-c", LIGHT % (HEAVY,))
    assert result.returncode == 0, result.stderr
    for asked, (code, out, err, heavy) in json.loads(result.stdout).items():
        assert heavy == [], asked
        if asked.endswith("--help"):
            assert not code and "usage" in out, asked
        else:
            assert code == 2 and "unknown flag '--no_such_key'" in err and "Traceback" not in err, asked

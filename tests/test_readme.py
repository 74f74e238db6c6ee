"""The README's commands, run in their order as a newcomer would, in an empty folder beside the recipes."""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """Every `vgf-llm` or `accelerate` line of the README's shell blocks, continued lines joined."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(("vgf-llm", "accelerate"))]


MODULES = {"vgf-llm": "vgf_llm.cli", "accelerate": "accelerate.commands.accelerate_cli"}


def test_a_cpu_command_stands_by_line_40_and_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert "make demo" in lines[:40]


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.slow
def test_every_command_and_the_python_example_run(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    found = commands()
    assert [command.split()[1] for command in found] == ["reward", "secant", "generate", "evaluate", "launch", "serve"]
    for command in found[:-1]:
        program = command.split()[0]
        shell = command.replace(program, f"{sys.executable} -m {MODULES[program]}", 1)
        output = run(shell, tmp_path)
        json.loads(output.splitlines()[-1])
    asks_a_server, example = blocks("python")
    (tmp_path / "example.py").write_text(example)
    assert "tensor" in run(f"{sys.executable} example.py", tmp_path)
    if importlib.util.find_spec("vllm") is not None:
        serve_and_ask(found[-1], asks_a_server, tmp_path)


def serve_and_ask(command, example, folder):
    """Start the README's server on a free port; send it what the README's curl sends, and run its client's example."""
    from benchmarks.serving_process import served

    sent = json.loads(re.search(r"curl.*?-d '(.*?)'", README, flags=re.DOTALL).group(1))
    recipe = folder / command.split()[-1]
    with contextlib.chdir(folder), served(["--config", str(recipe)]) as server:
        asked = urllib.request.Request(
            f"{server.url}/v1/chat/completions", json.dumps(sent).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=300) as answer:
            told = json.load(answer)
        (folder / "client.py").write_text(example.replace("http://127.0.0.1:8000", server.url))
        assert len(run(f"{sys.executable} client.py", folder).splitlines()) >= 3
    assert told["choices"][0]["message"]["content"]
    assert told["transport"]["value"] >= told["transport"]["original_value"]


@pytest.mark.slow
def test_the_demo_runs_and_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    demo = f"{sys.executable} -m vgf_llm.cli demo --num_prompts 3 --shown 1"
    last = json.loads(run(demo, tmp_path).splitlines()[-1])
    assert list(last) == ["base", "best-of-8", "best-of-24", "1 nat", "2 nats", "4 nats"]
    assert last["4 nats"]["proxy"] > last["best-of-8"]["proxy"]
    again = json.loads(run(demo, tmp_path).splitlines()[-1])
    assert again == last


def run(shell, folder):
    done = subprocess.run(shell, shell=True, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{shell}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout

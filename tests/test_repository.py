"""Habits of the house that a reader relies on: short files, headers that say what a file does, a light core."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vgf_llm", "reward_models", "benchmarks")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".cfg", ".sh", ""}
HEAVY = {"trl", "peft", "datasets", "accelerate", "deepspeed", "vllm", "rich", "jsonargparse", "ot", "vaderSentiment"}


def tracked() -> list[Path]:
    try:
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_no_code_is_longer_than_400_lines_and_no_text_than_500():
    texts = [path for path in tracked() if path.suffix in TEXT and path.name != "LICENSE"]
    lines = {path: len(path.read_text().splitlines()) for path in texts}
    assert [str(path) for path, count in lines.items() if count > (400 if path.suffix == ".py" else 500)] == []


def test_no_function_is_longer_than_80_lines():
    long = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


def test_people_are_spoken_to_in_one_place():
    """`vgf_llm.console.screen` knows where standard error and output lead; a print would end up in a log."""
    direct = re.compile(r"(?<![\w.])print\(|file=sys\.std(err|out)|sys\.std(err|out)\.write|\bConsole\(")
    speaking = {"screen.py", "progress.py", "cli.py", "vllm_processor.py"}  # the last runs in the engine's process
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in modules()
        if path.is_relative_to(ROOT / "vgf_llm") or path.is_relative_to(ROOT / "reward_models")
        if path.name not in speaking
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if direct.search(line)
    ]
    assert found == []


def test_every_module_says_what_it_does():
    silent = [str(path.relative_to(ROOT)) for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_the_readme_is_short_and_starts_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.strip() == "make demo" for line in lines[:40])


def test_links_between_documents_lead_somewhere():
    broken = []
    for path in tracked():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


def test_nothing_large_is_kept_in_the_repository():
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size}" for path in tracked() if path.stat().st_size > 1_000_000
    ]
    assert large == []


def test_the_core_path_needs_torch_and_transformers_only():
    """Load, score, transport and decode import in an interpreter that has none of the other packages."""
    names = ("vgf_llm.flow", "vgf_llm.text", "vgf_llm.engines", "vgf_llm.models.loading", "vgf_llm.data.prompts")
    code = (
        "import importlib, pkgutil, sys\n"
        f"for name in {sorted(HEAVY)}: sys.modules[name] = None\n"  # None: importing it raises, finding it fails
        f"for name in {names}:\n"
        "    module = importlib.import_module(name)\n"
        "    for found in pkgutil.walk_packages(getattr(module, '__path__', []), name + '.'):\n"
        "        if found.name != 'vgf_llm.engines.vllm_processor':  # loaded by vLLM alone\n"
        "            importlib.import_module(found.name)\n"
        "import reward_models.modelling, reward_models.ensemble, reward_models.losses, reward_models.value_losses\n"
        "import vgf_llm.control.losses, vgf_llm.control.targets, vgf_llm.control.agent\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


def test_the_makefile_lists_its_targets():
    result = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for target in ("setup", "demo", "test", "test-slow", "quality", "results", "bench", "clean"):
        assert re.search(rf"^{target}\s+\S", result.stdout, re.MULTILINE)

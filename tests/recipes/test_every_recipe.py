"""Every recipe is read by its command's dataclasses, and is as short as a recipe should be."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from vgf_llm.settings import parse as config

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "reward": "reward_models.train",
    "value": "reward_models.train_value",
    "secant": "reward_models.train_secant",
    "direction": "reward_models.train_direction",
    "generate": "vgf_llm.generate",
    "transport": "vgf_llm.transport",
    "serve": "vgf_llm.serve",
    "vgf": "vgf_llm.train",
    "evaluate": "vgf_llm.evaluate",
    "results": "vgf_llm.evaluate",
    "demo": "vgf_llm.evaluate",  # what `vgf-llm demo` evaluates
}
ELSEWHERE = {"accelerate_configs", "control"}  # no recipes of ours; read by tests/control/test_control_recipes.py
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name not in ELSEWHERE)


class Parsed(Exception):
    """Carries what a command made of a recipe, before it starts to work."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_is_read_by_its_command(path, monkeypatch):
    command = importlib.import_module(COMMANDS[path.stem.split("_")[0]])

    def stop(*types, **arguments):
        raise Parsed(*config.parse(*types, **arguments))

    monkeypatch.setattr(command, "parse", stop)
    with pytest.raises(Parsed) as parsed:
        command.main(["--config", str(path)])
    assert len(parsed.value.args) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_is_short_and_starts_with_its_command(path):
    lines = path.read_text().splitlines()
    settings = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(settings) <= 60 or path.stem == "results"
    assert lines[0].startswith("# ")
    command = f"make {path.stem}" if path.stem in ("demo", "results") else f"recipes/{path.parent.name}/{path.name}"
    assert any(command in line for line in lines if line.startswith("#"))


def test_every_task_has_a_readme_that_names_its_stages():
    for folder in {path.parent for path in RECIPES}:
        readme = (folder / "README.md").read_text()
        for path in folder.glob("*.yaml"):
            assert path.name in readme, f"{folder.name}/README.md does not name {path.name}"

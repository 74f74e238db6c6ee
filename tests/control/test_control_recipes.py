"""Every control recipe is read by its command, is short, and is named in the README beside it."""

from pathlib import Path

import pytest

from vgf_llm.control import train
from vgf_llm.control.settings import AgentSettings, DataSettings, TrainSettings, training_budget
from vgf_llm.settings import parse as config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "control").glob("*.yaml"))


def read(path):
    return config.parse(train.ScriptSettings, TrainSettings, DataSettings, AgentSettings, argv=["--config", str(path)])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read_short_and_named(path):
    _, settings, data, agent = read(path)
    assert agent.budget.step == "adam"
    assert settings.output_dir.endswith("/0")
    assert data.env is not None or data.data is not None
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# python -m vgf_llm.control.train --config recipes/control/{path.name}")
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 60
    assert path.name in (path.parent / "README.md").read_text()


def test_a_budget_in_a_recipe_changes_only_what_it_names():
    _, _, _, agent = read(ROOT / "recipes" / "control" / "puzzle_4x4.yaml")
    assert (agent.budget.steps, agent.budget.step_size, agent.budget.temperature) == (3, 0.05, 0.5)
    assert (agent.budget.step, agent.budget.kernel) == (training_budget().step, "rbf")


def test_run_is_written_as_a_configuration_that_reads_back(tmp_path):
    _, *settings = read(ROOT / "recipes" / "control" / "cube_single_cpu.yaml")
    content = config.dump(*settings)
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert read(tmp_path / "config.yaml")[1:] == tuple(settings)

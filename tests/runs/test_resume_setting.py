"""One word for continuing a run, the same in every command: false, true, or a folder."""

from __future__ import annotations

import importlib

import pytest

from reward_models.settings import TrainerSettings
from reward_models.value_settings import ValueTraining
from vgf_llm.control.settings import TrainSettings
from vgf_llm.errors import ConfigError
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.runs.resume import check_resume
from vgf_llm.settings.parse import parse
from vgf_llm.settings.trainer_names import check_trainer_settings
from vgf_llm.training.settings import OptimSettings
from vgf_llm.transport import TransportSettings

CHECKPOINTS = (OptimSettings, TrainerSettings, ValueTraining, TrainSettings)
ROWS = (EvaluateSettings, TransportSettings)


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "true"], True),
        (["--resume", "false"], False),
        (["--resume", "outputs/run/checkpoint-3"], "outputs/run/checkpoint-3"),
    ],
)
def test_a_command_with_checkpoints_takes_true_false_and_a_folder(kind, argv, value):
    assert parse(kind, argv=argv)[0].resume == value


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_an_empty_text_is_refused(kind):
    with pytest.raises(ValueError, match="resume must be true .*, false .*, or the folder of a checkpoint, got ' '"):
        kind(resume=" ")


@pytest.mark.parametrize("kind", ROWS)
def test_a_command_with_rows_takes_true_and_false_and_says_where_a_folder_goes(kind, tmp_path):
    arguments = {"prompts": "p.jsonl", "gold": "length_words"} if kind is EvaluateSettings else {}
    assert kind(**arguments, resume=True).resume is True and kind(**arguments).resume is False
    with pytest.raises(ValueError, match="resume must be true or false .*name that folder in output_dir.*'outputs/a'"):
        kind(**arguments, resume="outputs/a")


def test_a_folder_that_is_not_there_is_named_with_what_to_write(tmp_path):
    for wanted in (True, False, str(tmp_path)):
        check_resume(wanted, tmp_path)
    with pytest.raises(ConfigError, match="resume: 'last' is not a folder; write true, or name a checkpoint in"):
        check_resume("last", tmp_path)
    with pytest.raises(ConfigError, match="resume: 'no' is not a folder; true takes the newest checkpoint"):
        check_resume("no", tmp_path)


@pytest.mark.parametrize("kind", [OptimSettings, TrainerSettings])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("last", "true"),
        ("true", "true"),
        ("null", "false"),
        ("false", "false"),
        ("runs/checkpoint-3", "runs/checkpoint-3"),
    ],
)
def test_the_old_key_is_an_error_that_says_what_to_write(kind, old, new, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"resume_from_checkpoint: {old}\n")
    with pytest.raises(ConfigError, match=rf"recipe.yaml: key 'resume_from_checkpoint' .* write 'resume: {new}'"):
        parse(kind, argv=["--config", str(recipe)])
    for flags in (["--resume_from_checkpoint", old], [f"--resume_from_checkpoint={old}"]):
        with pytest.raises(ConfigError, match=rf"flag '--resume_from_checkpoint' .* write '--resume {new}'"):
            parse(kind, argv=flags)


def test_the_trainers_own_name_for_it_leads_to_the_key():
    settings = TrainerSettings(trainer_arguments={"resume_from_checkpoint": True})
    with pytest.raises(ConfigError, match="'resume_from_checkpoint' has a key of its own here; write 'resume: true'"):
        check_trainer_settings(settings)


@pytest.mark.parametrize("module", ["generate", "serve"])
def test_a_command_that_has_nothing_to_continue_knows_neither_name(module):
    with pytest.raises(ConfigError, match="unknown flag"):
        importlib.import_module(f"vgf_llm.{module}").main(["--resume_from_checkpoint", "last"])

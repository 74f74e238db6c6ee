"""One word for continuing a run, the same in every command: false, true, or a folder."""

from __future__ import annotations

import importlib

import pytest

from reward_models.settings import TrainerSettings
from reward_models.value_settings import ValueTraining
from vgf_llm.control.settings import TrainSettings
from vgf_llm.errors import ConfigError
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.runs.resume import check_resume, refuse_new_run, refuse_to_train_anew
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
    checkpoint = tmp_path / "checkpoint-12"
    for folder in (checkpoint, tmp_path / "checkpoint-3"):
        folder.mkdir()
    for name in ("manifest.json", "trainer_state.json"):
        (checkpoint / name).write_text("{}")
        for wanted in (True, False, str(checkpoint)):
            check_resume(wanted, tmp_path)
        (checkpoint / name).unlink()
    with pytest.raises(ConfigError, match="is not a checkpoint but the folder of a run; its newest is '.*point-12'"):
        check_resume(str(tmp_path), "elsewhere")
    with pytest.raises(ConfigError, match="checkpoint-3' is not a checkpoint: it has no manifest.json; name one in"):
        check_resume(str(tmp_path / "checkpoint-3"), tmp_path)
    with pytest.raises(ConfigError, match="resume: 'last' is not a folder; write true, or name a checkpoint in"):
        check_resume("last", tmp_path)
    with pytest.raises(ConfigError, match="resume: 'tru' is not a folder; true takes the newest checkpoint"):
        check_resume("tru", tmp_path)
    for word in ("null", "None", "no"):
        with pytest.raises(ConfigError, match=f"resume: '{word}' is not a folder; write false"):
            check_resume(word, tmp_path)


@pytest.mark.parametrize("kind", [*CHECKPOINTS, TransportSettings])
@pytest.mark.parametrize("text", ["null", "1", "[a]"])
def test_a_value_of_another_type_is_told_the_valid_ones(kind, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"resume: {text}\n")
    with pytest.raises(ConfigError, match="key 'resume': expected true, false or the folder of a checkpoint") as caught:
        parse(kind, argv=["--config", str(recipe)])
    assert ("write false" in str(caught.value)) == (text == "null") and "got" in str(caught.value)


@pytest.mark.parametrize(("word", "meant"), [("last", "true"), ("null", "false"), ("none", "false")])
def test_a_word_of_other_programs_says_what_to_write_where_rows_are_continued(word, meant):
    with pytest.raises(ConfigError, match=f"resume must be true or false: write {meant}, got '{word}'"):
        parse(TransportSettings, argv=["--resume", word])


def test_a_run_of_checkpoints_is_refused_and_a_result_is_not(tmp_path):
    refuse_new_run(False, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refuse_new_run(False, tmp_path)
    with pytest.raises(ConfigError, match="holds the result of a run and no whole checkpoint"):
        refuse_to_train_anew(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    refuse_new_run(True, tmp_path)
    with pytest.raises(ConfigError, match="holds checkpoint-3 of another run"):
        refuse_new_run(False, tmp_path)


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
    for name, value, line in (("save_total_limit", 1, "1"), ("gradient_checkpointing", True, "true")):
        settings = TrainerSettings(trainer_arguments={name: value})
        with pytest.raises(ConfigError, match=f"'{name}' has a key .*; write '{name}: {line}' at the top"):
            check_trainer_settings(settings)


@pytest.mark.parametrize("module", ["generate", "serve"])
def test_a_command_that_has_nothing_to_continue_knows_neither_name(module):
    with pytest.raises(ConfigError, match="unknown flag"):
        importlib.import_module(f"vgf_llm.{module}").main(["--resume_from_checkpoint", "last"])

"""Values that transformers does not know are refused with the key they were given under, and what is valid."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from reward_models.settings import RewardTraining
from vgf_llm.errors import ConfigError
from vgf_llm.runs.hf_arguments import training_arguments
from vgf_llm.settings import trainer_names
from vgf_llm.training.settings import OptimSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "linera"}, r"^lr_scheduler_type: 'linera' is unknown \(nearest: 'linear'\); .*cosine"),
        ({"report_to": "tensorbord"}, "^report_to: 'tensorbord' is unknown; choose from none, all, .*tensorboard"),
        ({"trainer_arguments": {"optim": "adam"}}, "^trainer_arguments: optim: 'adam' is unknown.*adamw_torch"),
        ({"trainer_arguments": {"eval_strategy": "epoch"}}, r"^trainer_arguments: eval_strategy: 'epoch' .*\('no'\)"),
        ({"trainer_arguments": {"eval_strategy": "epochs"}}, "eval_strategy: 'epochs' is unknown.*no, steps, epoch"),
        ({"trainer_arguments": {"load_best_model_at_end": True}}, "load_best_model_at_end: True needs data"),
        ({"trainer_arguments": {"save_strategy": "best"}}, r"save_strategy: 'best' needs data.*\('steps'\)"),
        ({"trainer_arguments": {"save_on_each_node": True}}, "save_on_each_node: True is not supported.*all machines"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "^settings: lr_scheduler_type reduce_lr_on_plateau requires"),
        ({"trainer_arguments": {"fp16": True}, "bf16": True}, r"^trainer_arguments \{'fp16': True\}: At most one"),
    ],
)
def test_an_unknown_value_is_named(tmp_path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training_arguments(OptimSettings(**changes), tmp_path)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgf_llm.settings.trainer_names.is_installed", lambda name: name == "tensorboard")
    monkeypatch.setattr("vgf_llm.runs.hf_arguments.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match="report_to: 'wandb' needs its package.*choose from none, tensorboard"):
        training_arguments(OptimSettings(report_to="wandb"), tmp_path)
    assert training_arguments(OptimSettings(report_to="tensorboard"), tmp_path).report_to == ["tensorboard"]


def test_the_names_that_are_read_from_the_source_are_those_of_the_library() -> None:
    assert trainer_names.fields() == {field.name for field in fields(TrainingArguments) if field.init}
    assert trainer_names.trackers() == tuple(sorted(INTEGRATION_TO_CALLBACK))
    enumerations = {
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "save_strategy": SaveStrategy,
        "logging_strategy": IntervalStrategy,
        "eval_strategy": IntervalStrategy,
        "hub_strategy": HubStrategy,
    }
    for field, members in enumerations.items():
        assert trainer_names.choices(field) == tuple(str(member.value) for member in members)


def test_a_trainer_with_held_out_data_may_evaluate(tmp_path) -> None:
    settings = replace(RewardTraining(), trainer_arguments={"eval_strategy": "epoch"})
    assert training_arguments(settings, tmp_path).eval_strategy == "epoch"

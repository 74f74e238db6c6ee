"""Seeds out of range are refused by name before anything is loaded, by every command that draws."""

from __future__ import annotations

import pytest

from reward_models.secant_settings import SecantScript, SecantTraining
from reward_models.settings import RewardTraining
from reward_models.value_settings import ValueTraining
from vgf_llm.control.collect import CollectSettings
from vgf_llm.control.settings import TrainSettings
from vgf_llm.errors import ConfigError
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.generate import GenerateSettings
from vgf_llm.settings import AnswerSettings
from vgf_llm.settings.parse import parse
from vgf_llm.training.settings import OptimSettings
from vgf_llm.transport import TransportSettings

TRAINING = (RewardTraining, ValueTraining, OptimSettings)
SAMPLING = (AnswerSettings, GenerateSettings, TransportSettings, EvaluateSettings)


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**70])
def test_a_training_refuses_what_numpy_refuses(kind, seed):
    with pytest.raises(ConfigError, match=rf"^--seed: seed must be from 0 to 2\*\*32 - 1, got {seed}$"):
        parse(kind, argv=["--seed", str(seed)])
    assert kind(seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize("kind", SAMPLING)
def test_sampling_takes_64_bits(kind):
    for seed in (-(2**63) - 1, 2**63, 2**70):
        with pytest.raises(ConfigError, match=rf"^--seed: seed must be from -2\*\*63 to .*, got {seed}$"):
            parse(kind, argv=["--seed", str(seed)])
    for seed in (-(2**63), -1, 2**32, 2**63 - 1):
        assert kind(seed=seed).seed == seed


def test_seeds_that_follow_one_another_all_fit():
    arms = [{"name": "a", "num_seeds": 3}]
    with pytest.raises(ConfigError, match="less the 2 seeds that follow it"):
        parse(EvaluateSettings, argv=["--seed", str(2**63 - 2), "--arms", str(arms)])
    needed = {"reward_model": "r", "prompts": "p", "validation_prompts": "v"}
    with pytest.raises(ValueError, match="seed must be"):
        SecantScript(**needed, seed=2**63 - 1)
    with pytest.raises(ValueError, match="fit_seed must be"):
        SecantTraining(fit_seed=-1)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_control_refuses_them_too(seed):
    with pytest.raises(ValueError, match="seed must be from 0"):
        TrainSettings(seed=seed)
    with pytest.raises(ValueError, match="seed must be from 0"):
        CollectSettings(seed=seed)

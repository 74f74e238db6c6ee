"""The bake-off's arms can be built, have names of their own, and cost about what their level says."""

from __future__ import annotations

import pytest

from benchmarks.decoder_arms import (
    BASE,
    LEVELS,
    ablation_arms,
    best_of,
    cloud_arm,
    control_arms,
    decodings,
    growing_arms,
    level_arms,
)
from benchmarks.decoders import BenchmarkSettings, stages
from reward_models.modelling import RewardModel
from vgf_llm.errors import ConfigError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference
from vgf_llm.text.decoders.make import make_decoder

PASSES = {
    "prior": lambda n, draws, rounds: n * (1 + draws),
    "block": lambda n, draws, rounds: n * (1 + 2 * draws),
    "pivot": lambda n, draws, rounds: n * (1 + rounds),
    "edit": lambda n, draws, rounds: n * (1 + 0.7 * rounds),
    "edit_greedy": lambda n, draws, rounds: n * (1 + 3 * rounds),
}
"""Base samples that an arm costs, after the first lines of `benchmarks/decoder_arms.py`."""


def all_arms() -> list:
    every = [arm for arms, _ in stages(BenchmarkSettings(), 0.1) for arm in arms]
    return list({id(arm): arm for arm in every}.values())


def test_the_arms_of_a_pass_have_names_of_their_own():
    for arms, _ in stages(BenchmarkSettings(), 0.1):
        names = [arm.name for arm in arms]
        assert len(set(names)) == len(names) and BASE in names


def test_arms_of_one_name_are_the_same_in_both_passes():
    """A finished (arm, prompt) is not run again, so one name must stand for one arm."""
    by_name: dict = {}
    for arm in all_arms():
        assert by_name.setdefault(arm.name, arm) == arm


@pytest.mark.parametrize("name", sorted(name for name, one in decodings(0.1).items() if one.decoder in PASSES))
def test_sizes_stay_near_their_level(name):
    one = decodings(0.1)[name]
    for level, arm in zip(LEVELS, level_arms(0.1, [name]), strict=True):
        cost = PASSES[one.decoder](arm.num_particles, arm.draws, arm.transport.rounds)
        low, high = (0.5, 1.0) if "by time" in name else (0.75, 1.25)  # its passes take longer than their FLOPs say
        assert low * level <= cost <= high * level, (arm.name, cost)


@pytest.mark.parametrize("options", [{"few_prompts": 3}, {"extras": []}, {"others": ["prior"], "main": ["pivot"]}])
def test_one_pass_takes_all_prompts_and_one_takes_few(options):
    passes = stages(BenchmarkSettings(**options), 0.1)
    assert sorted(few for _, few in passes) == [False, True]
    for arms, _ in passes:
        assert {arm.name for arm in best_of()} <= {arm.name for arm in arms}


def test_an_unknown_decoder_is_named():
    with pytest.raises(ValueError, match="'greedy' is no decoder here; there are prior"):
        BenchmarkSettings(main=["greedy"])


def test_every_decoder_takes_the_options_of_its_arms(tiny_lm):
    reference = TorchReference(tiny_lm, SamplingSettings(max_new_tokens=4), (2,), 0)
    value = RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean")
    for arm in all_arms():
        make_decoder(arm.decoder, reference, value, arm.decoder_options)
    with pytest.raises(ConfigError, match="no option 'never'"):
        make_decoder("prior", reference, value, {"never": 1})


def test_budgets_grow_sixteen_times_and_the_default_cloud_is_among_them():
    nats = [arm.transport.nats for arm in growing_arms(0.1) if arm.decoder == "prior"]
    rounds = [arm.transport.rounds for arm in growing_arms(0.1) if arm.decoder == "pivot"]
    assert max(nats) >= 16 * cloud_arm(decodings(0.1)["prior"].budget.nats).transport.nats
    assert max(rounds) == 16 * min(rounds)
    assert cloud_arm(decodings(0.1)["prior"].budget.nats) in growing_arms(0.1)


def test_every_directed_decoder_has_its_controls():
    names = {arm.name: arm for arm in control_arms(0.1, ["prior", "pivot"])}
    for decoder in ("prior", "pivot"):
        assert names[f"{decoder}, random"].direction == "random"
        assert names[f"{decoder}, none"].direction == "none"
        assert names[f"{decoder}, raw gradient"].gradient == "exact"
    assert all(arm.decoder == "prior" for arm in ablation_arms())

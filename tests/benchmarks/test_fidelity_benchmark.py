"""The fidelity benchmark's own losses and directions on tiny models; its figures come from `reward_models.fidelity`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fidelity import noisy_gradient, rounded, table
from benchmarks.fidelity_variants import PASSES, Variant, VariantTrainer, _chord, _sobolev, variants
from reward_models.modelling import RewardModel
from reward_models.pairs import EncodedPair, PairCollator
from reward_models.settings import RewardTraining
from vgf_llm.runs.hf_arguments import training_arguments

PAIRS = [EncodedPair([1, 10 + i], [20 + i, 21, 22, 2], [30 + i, 31, 32, 2]) for i in range(8)]


def linear_score(u_RSD):
    """A value without curvature."""
    return u_RSD.sum((1, 2))


def curved_score(u_RSD):
    """A value whose gradient at u says nothing of a chord."""
    return u_RSD.square().sum((1, 2))


@pytest.mark.parametrize("penalty", [_chord, _sobolev])
def test_matching_losses_are_zero_for_a_linear_value_only(penalty):
    u, moved = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    generator = torch.Generator().manual_seed(0)
    assert penalty(linear_score, u, moved, generator)[1] < 1e-8
    assert penalty(curved_score, u, moved, generator)[1] > 1e-3


@pytest.mark.parametrize("extra", sorted(PASSES))
def test_every_extra_loss_trains(extra, tiny_lm, tmp_path):
    model = RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean", input_skip=True)
    if extra == "linear":
        model.requires_grad_(False).skip_head.requires_grad_(True)
    before = model.skip_head.weight.detach().clone()
    training = RewardTraining(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3)
    trainer = VariantTrainer(
        model=model,
        variant=Variant("tried", extra=extra),
        args=training_arguments(training, tmp_path),
        settings=training,
        train_dataset=PAIRS,
        data_collator=PairCollator(0),
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert not torch.equal(model.skip_head.weight, before)


def test_variants_cost_what_the_reference_costs():
    found = {variant.name: variant for variant in variants(2e-5)}
    assert len(found) == len(variants(2e-5))
    assert found["two layers, skip"].num_steps == 160  # cheaper than the reference, and never longer
    assert found["two layers, skip, chord"].num_steps == 80  # 2 layers * 3 passes * 80 = 3 * 160
    assert found["ten layers, skip"].num_steps == 48
    for variant in found.values():
        assert variant.layers * PASSES[variant.extra] * variant.num_steps <= 480


def test_the_mean_of_noisy_gradients_of_a_linear_value_is_its_gradient():
    def plain(u):
        return u.sum((2, 3)), torch.ones_like(u)

    values, gradient = noisy_gradient(plain, 0.5, 4)(torch.randn(1, 2, 3, 4))
    assert values.shape == (1, 2) and torch.equal(gradient, torch.ones(1, 2, 3, 4))


def test_the_table_has_a_line_a_direction():
    figures = {"spearman": 0.51234, "low": 0.4, "high": 0.6, "top8_gain": 0.3, "best8_gain": 0.4, "random8_gain": 0.0}
    found = {"gradient": figures | {"share_of_best": 0.75, "cost_in_forwards": 3.0}}
    assert rounded({"learning_rate": 2e-5, "spearman": [0.123456]}) == {"learning_rate": 2e-5, "spearman": [0.1235]}
    text = table({"tried": rounded({"steps": 2, "train_sec": 1.0, "accuracy": 0.7, "directions": found})})
    assert "| tried | 2 | 1 | 0.70 | gradient | 0.51 (0.40 to 0.60) | 0.30 / 0.40 / 0.00 | 75% | 3.0 |" in text

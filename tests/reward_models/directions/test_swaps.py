"""Swaps: what fits read of them, and the correlation that they estimate."""

from __future__ import annotations

import math

import pytest
import torch

from reward_models.directions.causal import CausalHead, fit_causal
from reward_models.directions.swaps import Swaps, join_swaps, swap_correlation, thinned
from reward_models.secant_settings import SecantTraining
from vgf_llm.text.bonus import TableBonus

P = torch.tensor([0.5, 0.2, 0.2, 0.1])
REWARD = torch.tensor([0.0, 1.0, -0.5, 2.0])
BONUS = torch.tensor([0.3, 0.8, -0.1, 0.9])


def swaps(own: list[int], new: list[int], prompts: list[int] | None = None) -> Swaps:
    """Swaps at one place whose reward is REWARD of the token that stands there."""
    ids = torch.tensor([own, new]).T
    number = torch.arange(len(own))
    prompt = number if prompts is None else torch.tensor(prompts)
    return Swaps(prompt, number, ids, P.log()[ids], REWARD[ids[:, 1]] - REWARD[ids[:, 0]], torch.zeros(len(own), 0))


def test_the_correlation_of_swaps_is_the_weighted_correlation_of_the_whole_list() -> None:
    """Ten draws as p has them (5, 2, 2, 1 of four tokens), each swapped for every token of the list."""
    own = [token for token, count in enumerate((5, 2, 2, 1)) for _ in range(count) for _ in range(4)]
    found = swap_correlation(TableBonus(BONUS), swaps(own, list(range(4)) * 10))

    def covariance(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((P * (x - (P * x).sum()) * (y - (P * y).sum())).sum())

    wanted = covariance(REWARD, BONUS) / math.sqrt(covariance(REWARD, REWARD) * covariance(BONUS, BONUS))
    assert found == pytest.approx(wanted, abs=1e-6) and 0.9 < wanted < 0.99


def test_a_direction_that_tells_nothing_apart_has_a_correlation_of_0_and_a_reward_none() -> None:
    some = swaps([0, 0, 1], [1, 2, 3])
    assert swap_correlation(TableBonus(REWARD), some) == pytest.approx(1.0)
    assert swap_correlation(TableBonus(-3 * REWARD), some) == pytest.approx(-1.0)
    assert swap_correlation(TableBonus(torch.ones(4)), some) == 0.0
    assert math.isnan(swap_correlation(TableBonus(REWARD), swaps([0, 1], [0, 1])))


def test_fits_read_a_swap_as_two_tokens() -> None:
    """Weights half by p of the two and half alike; tokens 0 and 3: 0.5 * 5/6 + 0.25 and 0.5 * 1/6 + 0.25."""
    some = swaps([0, 1], [3, 2])
    targets, seen = some.targets, some.observations
    torch.testing.assert_close(targets.weights_XK[0], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(targets.targets_XK, torch.tensor([[0.0, 2.0], [0.0, -1.5]]))
    assert targets.prompt_X.tolist() == [0, 1]
    assert seen.context_O.tolist() == [0, 0, 1, 1] and seen.token_O.tolist() == [0, 3, 1, 2]
    torch.testing.assert_close(seen.reward_O, torch.tensor([0.0, 2.0, 0.0, -1.5]))


def test_responses_are_held_back_where_there_is_one_prompt() -> None:
    assert swaps([0, 1, 2], [1, 2, 3], prompts=[7, 7, 7]).targets.prompt_X.tolist() == [0, 1, 2]
    assert swaps([0, 1, 2], [1, 2, 3], prompts=[7, 8, 7]).targets.prompt_X.tolist() == [7, 8, 7]


def test_swaps_come_in_the_order_of_their_responses_whoever_scored_them() -> None:
    some = swaps([0, 1, 2, 0], [1, 2, 3, 2])
    mixed = join_swaps([some.take(slice(2, 4)), some.take(slice(0, 2))]).in_order()
    for name, tensor in some.tensors().items():
        assert torch.equal(mixed.tensors()[name], tensor), name


def test_a_causal_head_goes_on_from_its_layers() -> None:
    """The sign of token 1 is that of the hidden state: short fits get further one after another than alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 6, generator=generator)
    table = torch.randn(4, 8, generator=generator)
    ids = torch.tensor([[0, 1]]).expand(400, 2)
    many = Swaps(torch.arange(400) % 20, torch.arange(400), ids, P.log()[ids], 3 * hidden[:, 0].sign(), hidden).targets
    short = SecantTraining(steps=30, batch_size=128, learning_rate=3e-3, dropout=0.0, hidden=32)
    once, first = fit_causal(many, table, short)
    assert first["kept_step"] == 30
    losses, head = [first["held_back_loss"]], once
    for _ in range(4):
        head, figures = fit_causal(many, table, short, start=head)
        losses.append(figures["held_back_loss"])
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.6 * losses[0]
    again = CausalHead.of_tensors(head.state_dict())
    assert torch.equal(again(hidden), head(hidden)) and not any(p.requires_grad for p in again.parameters())
    still, figures = fit_causal(many, table, SecantTraining(steps=1, learning_rate=10.0, hidden=32), start=head)
    assert figures["kept_step"] == -1 and torch.equal(still(hidden), head(hidden))


def test_a_head_of_another_unit_goes_on_as_the_same_function() -> None:
    """Losses before and after are in one unit, so a head that is wrong by now is not kept for a coarser one."""
    earlier, later = CausalHead(6, 8, 4, 16, seed=1), CausalHead(6, 8, 4, 16)
    torch.nn.init.normal_(earlier.second.weight)
    earlier.unit.fill_(20.0)
    later.unit.fill_(0.5)
    later.go_on_from(earlier)
    hidden = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(later(hidden), earlier(hidden))
    assert later.unit.item() == 0.5


def test_a_step_with_too_many_swaps_is_thinned_evenly() -> None:
    many = Swaps(
        torch.arange(1000),
        torch.arange(1000),
        torch.zeros(1000, 2).long(),
        torch.zeros(1000, 2),
        torch.zeros(1000),
        torch.zeros(1000, 0),
    )
    kept = thinned(many, 200, seed=3)
    assert len(kept) == 200 and torch.equal(kept.prompt_O, kept.prompt_O.sort().values)
    assert kept.prompt_O[:100].max() < 650 and kept.prompt_O[100:].min() > 350
    assert thinned(many, 1000, seed=3) is many and torch.equal(thinned(many, 200, seed=3).prompt_O, kept.prompt_O)
    assert many.can_be_split and not many.take(slice(0, 1)).can_be_split

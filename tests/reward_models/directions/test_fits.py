"""Every kind against a slow reference, and on rewards whose answer is known."""

from __future__ import annotations

import pytest
import torch

from reward_models.directions.agreement import measure_direction, whole_position_changes
from reward_models.directions.causal import CausalDirection, CausalHead, fit_causal, row_losses
from reward_models.directions.constant import PENALTIES, fit_constant, table_scale
from reward_models.directions.settings import DirectionTraining
from reward_models.directions.table import (
    Observations,
    additive_table,
    candidate_tokens,
    fit_table,
    observations_of,
    observe_tokens,
)
from reward_models.directions.targets import BonusTargets, from_changes, from_source
from tests.reward_models.directions.planted import EOS, Planted, changes_of, linear_effects, prompts_of, sampled
from vgf_llm.errors import DataError
from vgf_llm.models.architecture import input_table
from vgf_llm.text.bonus import TableBonus
from vgf_llm.text.distribution import Shortlist

QUICK = DirectionTraining(steps=300, batch_size=256, hidden=64, learning_rate=3.0e-3, dropout=0.0)


def test_additive_table_solves_the_normal_equations():
    """Unknowns m_0..m_2, w_0..w_4; rows [1_c, 1_v] of the observations, and sqrt(shrink) 1_v for the penalty."""
    generator = torch.Generator().manual_seed(0)
    context, token = torch.randint(0, 3, (20,), generator=generator), torch.randint(0, 5, (20,), generator=generator)
    reward, shrink = torch.randn(20, generator=generator).double(), 0.7
    rows = torch.cat([torch.eye(3).double()[context], torch.eye(5).double()[token]], 1)
    penalty = torch.cat([torch.zeros(5, 3).double(), shrink**0.5 * torch.eye(5).double()], 1)
    solved = torch.linalg.lstsq(torch.cat([rows, penalty]), torch.cat([reward, torch.zeros(5).double()])).solution
    found = additive_table(Observations(context, token, reward), 6, shrink)
    torch.testing.assert_close(found[:5], solved[3:], atol=1e-6, rtol=1e-6)
    assert found[5] == 0


def test_a_token_seen_once_counts_less():
    """One context each of (reference token 0, token v): w_v = r n / (n + shrink) once the contexts' means are exact."""
    many = torch.arange(40)
    context, token = torch.cat([many, many, torch.tensor([40, 40])]), torch.tensor([0] * 40 + [1] * 40 + [0, 2])
    reward = torch.tensor([0.0] * 40 + [1.0] * 40 + [0.0, 1.0])
    found = additive_table(Observations(context, token, reward), 3, 3.0)
    assert found[1] - found[0] > 0.8 and found[2] - found[0] < found[1] - found[0] - 0.2


def test_a_table_finds_what_tokens_are_worth(tiny_lm, tiny_tokenizer):
    effects = torch.randn(60, generator=torch.Generator().manual_seed(3))
    reward, positions = Planted(effects), sampled(tiny_lm, prompts_of(8))
    tokens = candidate_tokens(positions, tiny_tokenizer, 60, most=40)
    seen = observe_tokens(reward, positions, tokens, contexts=4, seed=0)
    assert (
        len(tokens) == 40 and EOS not in tokens and reward.calls <= 40 * 4 + 64 + positions.responses.mask_BNT.numel()
    )
    found = fit_table(seen, input_table(tiny_lm).detach())
    tried = found.count_V > 0
    tried[list(set(range(60)) - set(tokens.tolist()))] = False
    pair = torch.stack([found.bonus_V[tried], effects[tried]])
    assert torch.corrcoef(pair)[0, 1] > 0.99 and found.held_back_error < 0.05
    from_swaps = fit_table(
        seen.and_more(observations_of(positions, changes_of(reward, positions))), input_table(tiny_lm).detach()
    )
    assert from_swaps.count_V.sum() > found.count_V.sum() and from_swaps.held_back_error < 0.05


def targets_of(rows=40, k=5, width=4, seed=0) -> BonusTargets:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, k, generator=generator).softmax(-1)
    ids, targets = torch.randint(0, 30, (rows, k), generator=generator), torch.randn(rows, k, generator=generator)
    return BonusTargets(torch.randn(rows, width, generator=generator), ids, weights, targets, torch.arange(rows) // 4)


def test_the_constant_is_ridge_regression_on_centred_candidates():
    """The same by explicit rows sqrt(w) (e - mean e) / rms and sqrt(lambda unit) I, for the penalty that was chosen."""
    targets, table = targets_of(), torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    found, rms = fit_constant(targets, table), table_scale(table)
    rows, aims = [], []
    for x in range(len(targets)):
        w, e = targets.weights_XK[x].double(), table[targets.ids_XK[x]].double() / rms
        a = targets.targets_XK[x].double()
        for k in range(5):
            rows.append(w[k].sqrt() * (e[k] - w @ e))
            aims.append(w[k].sqrt() * (a[k] - w @ a))
    matrix, aim = torch.stack(rows), torch.stack(aims)
    ridge = found.penalty * (matrix.T @ matrix).diagonal().mean()
    slow = torch.linalg.solve(matrix.T @ matrix + ridge * torch.eye(6).double(), matrix.T @ aim)
    torch.testing.assert_close(found.direction_D.double(), slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.bonus_V.double(), table.double() @ slow / rms, atol=1e-4, rtol=1e-4)
    assert found.penalty in PENALTIES


def test_the_causal_loss_is_what_its_header_says():
    targets, table = targets_of(), torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    head = CausalHead(4, 6, 30, units=8)
    torch.nn.init.normal_(head.second.weight)
    head.unit.fill_(2.0)
    found, rms = row_losses(head, targets, table, 1.5).detach(), 1.5
    for x in (0, 7):
        w, g = targets.weights_XK[x], head(targets.hidden_XD[x]).detach()
        apart = [
            (g @ table[v]).detach() / rms - a for v, a in zip(targets.ids_XK[x], targets.targets_XK[x], strict=True)
        ]
        mean = sum(wk * one for wk, one in zip(w, apart, strict=True))
        left = [float((one - mean).abs()) / 2.0 for one in apart]
        slow = sum(float(wk) * (0.5 * d * d if d < 1 else d - 0.5) for wk, d in zip(w, left, strict=True))
        assert float(found[x]) == pytest.approx(slow, rel=1e-4)


def test_a_shift_of_a_positions_targets_changes_nothing():
    targets, table = targets_of(), torch.randn(30, 6)
    shifted = BonusTargets(
        targets.hidden_XD,
        targets.ids_XK,
        targets.weights_XK,
        targets.targets_XK + 5 * torch.rand(40, 1),
        targets.prompt_X,
    )
    torch.testing.assert_close(
        fit_constant(targets, table).direction_D, fit_constant(shifted, table).direction_D, atol=1e-3, rtol=1e-3
    )
    head = CausalHead(4, 6, 30, units=8)
    torch.testing.assert_close(
        row_losses(head, targets, table, 1.0), row_losses(head, shifted, table, 1.0), atol=1e-4, rtol=1e-3
    )


def test_a_planted_direction_is_recovered(tiny_lm):
    g, effects = linear_effects(tiny_lm)
    reward, positions, unseen = (
        Planted(effects),
        sampled(tiny_lm, prompts_of(20)),
        sampled(tiny_lm, prompts_of(6, seed=9), seed=1),
    )
    targets, table = (
        from_changes(positions, changes_of(reward, positions)),
        tiny_lm.get_input_embeddings().weight.detach(),
    )
    constant = fit_constant(targets, table)
    assert torch.cosine_similarity(constant.direction_D, g, dim=0) > 0.95
    head, figures = fit_causal(targets, table, QUICK, constant.direction_D)
    changes = whole_position_changes(reward, unseen, 48, 0)
    for source in (TableBonus(constant.bonus_V), CausalDirection.of(head, table)):
        found = measure_direction(source, unseen, changes)
        assert found.weighted_correlation.mean > 0.98 and found.spearman.mean > 0.95 and found.top8_share.mean > 0.95
    assert figures["held_back_loss"] <= figures["held_back_loss_of_constant"]


def test_what_single_tokens_keep_is_found_where_the_embeddings_say_nothing(tiny_lm):
    """Effects that are no function of the embedding: the line explains a part, the rest is a number per token."""
    effects = 3 * torch.randn(60, generator=torch.Generator().manual_seed(3))
    reward, positions = Planted(effects), sampled(tiny_lm, prompts_of(30))
    unseen, table = sampled(tiny_lm, prompts_of(6, seed=9), seed=1), input_table(tiny_lm).detach()
    targets = from_changes(positions, changes_of(reward, positions))
    constant = fit_constant(targets, table)
    head, figures = fit_causal(targets, table, QUICK, constant.direction_D)
    changes = whole_position_changes(reward, unseen, 48, 0)
    line = measure_direction(TableBonus(constant.bonus_V), unseen, changes).weighted_correlation.mean
    both = measure_direction(CausalDirection.of(head, table), unseen, changes).weighted_correlation.mean
    assert figures["shrink"] is not None and both > 0.9 and both > line + 0.05


def test_a_table_guesses_unseen_tokens_from_their_embeddings(tiny_lm):
    """Half of the tokens are observed; effects are linear in the embedding, so the other half is known as well."""
    _, effects = linear_effects(tiny_lm)
    generator = torch.Generator().manual_seed(0)
    context, token = (torch.randint(0, most, (600,), generator=generator) for most in (40, 45))
    reward = effects[token] + torch.randn(40, generator=generator)[context]
    found = fit_table(Observations(context, token, reward), input_table(tiny_lm).detach())
    assert torch.corrcoef(torch.stack([found.bonus_V[45:], effects[45:]]))[0, 1] > 0.9
    blind = fit_table(
        Observations(context, token, torch.randn(600, generator=generator)), input_table(tiny_lm).detach()
    )
    assert blind.held_back_error > 0.8 and blind.bonus_V.std() < 0.3


def test_causal_follows_a_sign_that_the_prompt_sets_and_the_constant_does_not(tiny_lm):
    _, effects = linear_effects(tiny_lm)
    reward = Planted(effects, signs={10: 1.0, 11: -1.0})
    positions, unseen = sampled(tiny_lm, prompts_of(80)), sampled(tiny_lm, prompts_of(16, seed=9), seed=1)
    targets, table = (
        from_changes(positions, changes_of(reward, positions)),
        tiny_lm.get_input_embeddings().weight.detach(),
    )
    constant = fit_constant(targets, table)
    head, _ = fit_causal(targets, table, QUICK, constant.direction_D)
    changes = whole_position_changes(reward, unseen, 48, 0)
    blind = measure_direction(TableBonus(constant.bonus_V), unseen, changes)
    follows = measure_direction(CausalDirection.of(head, table), unseen, changes)
    assert follows.weighted_correlation.mean > 0.6 and follows.spearman.mean > 0.6
    assert blind.weighted_correlation.mean < 0.3 and blind.spearman.mean < 0.3


class Teacher:
    """Bonuses of a table, by a source that keeps the tokens it was shown."""

    reads_hidden, passes = False, 1.0

    def __init__(self, effects_V):
        self.effects_V, self.shown = effects_V, []

    def begin(self, prompts, rows_per_prompt):
        self.shown.append(shown := [])

        def bonus(shortlist: Shortlist, hidden, last):
            shown.append(last)
            return self.effects_V[shortlist.ids]

        return bonus


def test_another_source_is_distilled(tiny_lm):
    """A teacher is asked along the responses as decoding asks it, and its bonuses are the targets."""
    _, effects = linear_effects(tiny_lm)
    positions, table = sampled(tiny_lm, prompts_of(20)), tiny_lm.get_input_embeddings().weight.detach()
    teacher = Teacher(effects)
    targets = from_source(teacher, positions)
    assert all(shown[0] is None for shown in teacher.shown)
    shown_RT = torch.cat([torch.stack(shown[1:], 1) for shown in teacher.shown])
    is_text_RT = positions.responses.movable_BNT.flatten(0, 1)[:, :-1]
    tokens_RT = positions.responses.tokens_BNT.flatten(0, 1)[:, :-1]
    assert torch.equal(shown_RT[is_text_RT], tokens_RT[is_text_RT])
    is_eos = targets.ids_XK == EOS
    assert not targets.weights_XK[is_eos].any() and torch.allclose(targets.weights_XK.sum(-1), torch.ones(len(targets)))
    head, _ = fit_causal(targets, table, QUICK, fit_constant(targets, table).direction_D)
    changes = whole_position_changes(Planted(effects), positions, 48, 0)
    assert measure_direction(CausalDirection.of(head, table), positions, changes).weighted_correlation.mean > 0.95


def test_one_prompt_is_refused():
    targets = targets_of(rows=4)
    with pytest.raises(DataError, match="give more prompts"):
        fit_constant(targets, torch.randn(30, 6))

"""What stands before a token, the changes that are scored there, and the figures that compare them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reward_models.directions.agreement import measure_direction, whole_position_changes
from reward_models.directions.fitting import _numbers
from reward_models.directions.ground import check_usable
from reward_models.directions.positions import Positions, bonuses_along, read_positions
from reward_models.directions.regrown import _regrown, regrown_changes
from reward_models.directions.reward import CalledReward, TextPrompt
from reward_models.directions.targets import BonusTargets, from_changes
from reward_models.fidelity import spearman_correlation
from tests.reward_models.directions.planted import EOS, Planted, changes_of, prompts_of, reference_of, sampled
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import DataError
from vgf_llm.text.bonus import TableBonus
from vgf_llm.text.distribution import Shortlist, truncate
from vgf_llm.text.noise import row_seeds


def effects(seed=0):
    return torch.randn(60, generator=torch.Generator().manual_seed(seed))


def test_a_hidden_state_is_what_the_next_tokens_logits_come_from(any_lm):
    positions, reference = sampled(any_lm, prompts_of(3)), reference_of(any_lm)
    b, n = 1, 2
    tokens = positions.responses.tokens_BNT[b, n]
    for t in range(int(positions.responses.lengths_BN[b, n])):
        text = torch.tensor([[*positions.responses.prompts[b], *tokens[:t].tolist()]])
        logits = any_lm(text).logits[0, -1]
        again = any_lm.get_output_embeddings()(positions.hidden_BNTD[b, n, t])
        torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
        expected = truncate(logits, reference.sampling)
        listed = ~positions.distribution.logps[b, n, t].isinf()
        assert set(positions.distribution.ids[b, n, t][listed].tolist()) == set(expected.ids.tolist())


def test_candidates_never_end_a_text_and_are_never_the_token_itself(tiny_lm):
    positions = sampled(tiny_lm, prompts_of(4))
    own = positions.responses.tokens_BNT.unsqueeze(-1)
    is_other = positions.candidates_BNTK != own
    assert not (positions.candidates_BNTK[is_other] == EOS).any()
    assert not is_other[~positions.responses.movable_BNT].any() and is_other.any()
    for change in changes_of(Planted(effects()), positions):
        assert (change.v_S != EOS).all()


def test_targets_hold_the_own_token_first_with_nothing(tiny_lm):
    """Each row against the changes one by one: ids, changes and the reference's odds between its candidates."""
    positions = sampled(tiny_lm, prompts_of(3))
    changes = changes_of(Planted(effects()), positions)
    targets, mixed = from_changes(positions, changes, even=0.0), from_changes(positions, changes)
    listed = {}
    for change in changes:
        for t, v, exact in zip(change.t_S.tolist(), change.v_S.tolist(), change.exact_S.tolist(), strict=True):
            listed.setdefault((change.b, change.n, t), {})[v] = exact
    assert len(targets) == len(listed)
    for x, (place, expected) in enumerate(sorted(listed.items())):
        own = int(positions.responses.tokens_BNT[place])
        there = targets.weights_XK[x] > 0
        found = dict(zip(targets.ids_XK[x][there].tolist(), targets.targets_XK[x][there].tolist(), strict=True))
        assert int(targets.ids_XK[x, 0]) == own and found.pop(own) == 0
        assert found == pytest.approx(expected, abs=1e-5)
        logps = {
            int(i): float(p)
            for i, p in zip(positions.distribution.ids[place], positions.distribution.logps[place], strict=True)
            if p > -1e30
        }
        for k in range(1, int(there.sum())):
            odds = float(targets.weights_XK[x, k] / targets.weights_XK[x, 0])
            assert odds == pytest.approx(
                float(torch.tensor(logps[int(targets.ids_XK[x, k])] - logps[own]).exp()), rel=1e-3
            )
        equal = there / there.sum()
        torch.testing.assert_close(mixed.weights_XK[x], 0.5 * targets.weights_XK[x] + 0.5 * equal)
        torch.testing.assert_close(targets.hidden_XD[x], positions.hidden_BNTD[place])
    with pytest.raises(ValueError, match="targets_XK must have shape"):
        BonusTargets(targets.hidden_XD, targets.ids_XK, targets.weights_XK, targets.targets_XK[:, :1], targets.prompt_X)


def test_a_prompt_that_comes_again_is_held_back_with_itself(tiny_lm):
    """Five prompts, of which the fifth is held back; then all of them again, as guided responses may come."""
    positions = sampled(tiny_lm, prompts_of(5))
    targets = from_changes(positions, changes_of(Planted(effects()), positions))
    fitted, held = targets.and_more(targets).split()
    assert set(held.prompt_X.tolist()) == {4} and set(fitted.prompt_X.tolist()) == {0, 1, 2, 3}
    assert len(held) == 2 * int((targets.prompt_X == 4).sum())
    fitted, held = targets.and_more(targets.numbered(torch.tensor([5, 6, 7, 8, 4]))).split()
    assert set(held.prompt_X.tolist()) == {4} and set(fitted.prompt_X.tolist()) == {0, 1, 2, 3, 5, 6, 7, 8}
    with pytest.raises(DataError, match="two prompts at least"):
        targets.numbered(torch.zeros(5, dtype=torch.long)).split()
    again = [PromptText("a"), PromptText([{"role": "user", "content": "a"}]), PromptText("b"), PromptText("a")]
    assert _numbers(again).tolist() == [0, 0, 1, 0]


def test_responses_without_a_token_that_could_be_replaced_are_refused(tiny_lm):
    positions = sampled(tiny_lm, prompts_of(3), a_prompt=2)
    assert check_usable(positions, "prompts.jsonl").tolist() == [True] * 3
    tokens, mask = torch.full((3, 2, 1), EOS), torch.ones(3, 2, 1).bool()
    empty = replace(positions.responses, tokens_BNT=tokens, mask_BNT=mask)
    cut = Shortlist(positions.distribution.ids[:, :, :1], positions.distribution.logps[:, :, :1])
    ended = Positions(empty, cut, positions.hidden_BNTD[:, :, :1])
    with pytest.raises(DataError, match=r"prompts.jsonl: no response .* \(6 of 6 responses are empty\); raise max_new"):
        check_usable(ended, "prompts.jsonl")


def test_agreement_against_a_slow_reference(tiny_lm):
    """All sums written out: weights are the base's odds within a position, EOS left out."""
    positions = sampled(tiny_lm, prompts_of(4), a_prompt=2)
    worth, other = effects(0), effects(0) + effects(1)
    changes = whole_position_changes(Planted(worth), positions, 30, 0)
    found = measure_direction(TableBonus(other), positions, changes)
    cov = var_a = var_b = 0.0
    ranks = {}
    for change in changes:
        own_S = positions.responses.tokens_BNT[change.b, change.n, change.t_S]
        predicted = other[change.v_S] - other[own_S]
        if len(predicted) > 8:
            ranks.setdefault(change.b, []).append(spearman_correlation(predicted, change.exact_S))
        for t in change.t_S.unique().tolist():
            place = (change.b, change.n, t)
            keep = (positions.distribution.ids[place] != EOS) & ~positions.distribution.logps[place].isinf()
            ids, p = positions.distribution.ids[place][keep], positions.distribution.logps[place][keep].softmax(-1)
            a, b = worth[ids], other[ids]
            a, b = a - p @ a, b - p @ b
            cov, var_a, var_b = cov + float(p @ (a * b)), var_a + float(p @ (a * a)), var_b + float(p @ (b * b))
    assert found.weighted_correlation.mean == pytest.approx(cov / (var_a * var_b) ** 0.5, abs=1e-4)
    slow = [sum(one) / len(one) for one in ranks.values()]
    assert found.spearman.mean == pytest.approx(sum(slow) / len(slow), abs=1e-6)
    assert found.weighted_correlation.low < found.weighted_correlation.mean < found.weighted_correlation.high
    assert found.to_dict()["top8_share_low"] <= found.top8_share.mean <= 1


def test_agreement_of_the_truth_is_one_and_of_nothing_zero(tiny_lm):
    positions, worth = sampled(tiny_lm, prompts_of(4)), effects()
    changes = whole_position_changes(Planted(worth), positions, 30, 0)
    truth, nothing = (measure_direction(TableBonus(table), positions, changes) for table in (worth, torch.zeros(60)))
    assert truth.weighted_correlation.mean == pytest.approx(1, abs=1e-5) == truth.spearman.mean == truth.top8_share.mean
    assert nothing.weighted_correlation.mean == nothing.spearman.mean == 0
    flat = whole_position_changes(Planted(torch.zeros(60)), positions, 30, 0)
    with pytest.raises(DataError, match="unequal change"):
        measure_direction(TableBonus(worth), positions, flat)


def test_whole_positions_hold_every_candidate(tiny_lm):
    positions = sampled(tiny_lm, prompts_of(4))
    for change in whole_position_changes(Planted(effects()), positions, 24, 0):
        for t in change.t_S.unique().tolist():
            place = (change.b, change.n, t)
            own = positions.responses.tokens_BNT[place]
            expected = set(positions.candidates_BNTK[place].tolist()) - {int(own)}
            assert set(change.v_S[change.t_S == t].tolist()) == expected
        assert len(change.t_S.unique()) <= 2


def test_a_suffix_regrown_with_its_own_noise_is_the_suffix(tiny_lm):
    positions, reference = sampled(tiny_lm, prompts_of(4)), reference_of(tiny_lm)
    responses, seeds = positions.responses, row_seeds(0, [0, 1, 2, 3], 4)
    for b, n in ((0, 0), (2, 3)):
        tokens, mask = responses.tokens_BNT[b, n], responses.mask_BNT[b, n]
        t_S = torch.arange(int(responses.movable_BNT[b, n].sum()))
        again = _regrown(reference, responses, b, tokens.repeat(1, len(t_S), 1), mask, t_S, seeds[b, n])
        for row, row_mask in zip(again.tokens_BNT[0], again.mask_BNT[0], strict=True):
            assert row[row_mask].tolist() == tokens[mask].tolist()


def test_a_regrown_change_counts_the_suffix(tiny_lm):
    """With a reward of the first token alone both changes agree; of the whole text they differ where text follows."""
    positions, reference = sampled(tiny_lm, prompts_of(4)), reference_of(tiny_lm)
    seeds, reward = row_seeds(0, [0, 1, 2, 3], 4), Planted(effects())
    found = regrown_changes(reference, reward, positions, seeds, substitutions=20, seed=0)
    swaps = changes_of(reward, positions, substitutions=20)
    last = reference.sampling.max_new_tokens - 1
    differ = 0
    for regrown, swap in zip(found, swaps, strict=True):
        assert torch.equal(regrown.v_S, swap.v_S) and torch.equal(regrown.t_S, swap.t_S)
        at_end = regrown.t_S == last
        torch.testing.assert_close(regrown.exact_S[at_end], swap.exact_S[at_end], atol=1e-5, rtol=1e-4)
        differ += int((~torch.isclose(regrown.exact_S, swap.exact_S, atol=1e-4))[~at_end].sum())
    assert differ > 0


def test_bonuses_do_not_depend_on_the_batch(tiny_lm):
    together, table = sampled(tiny_lm, prompts_of(3)), TableBonus(effects())
    alone = read_positions(reference_of(tiny_lm), together.responses.take(torch.tensor([[1], [1], [1]])), 12)
    torch.testing.assert_close(alone.hidden_BNTD, together.hidden_BNTD[:, 1:2], atol=1e-4, rtol=1e-4)
    assert bonuses_along(table, together).shape == together.distribution.ids.shape


def test_a_function_reads_texts_and_columns(tiny_tokenizer):
    asked = []

    def reward(prompts, responses, answer):
        asked.extend(zip(prompts, responses, answer, strict=True))
        return [float(len(response.split())) for response in responses]

    words = tiny_tokenizer.convert_tokens_to_ids
    called = CalledReward(reward, tiny_tokenizer)
    prompts = [
        TextPrompt([5], PromptText("write one", {"answer": 7})),
        TextPrompt([6], PromptText("love", {"answer": 8})),
    ]
    tokens = torch.tensor([[[words("dog"), words("cat"), EOS], [words("dog"), 0, 0]]] * 2)
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0]]] * 2).bool()
    found = called.score(called.prefix(prompts), tokens, mask)
    assert found.tolist() == [[2, 1], [2, 1]] and called.calls == 4
    assert asked[0] == ("write one", "dog cat", 7) and asked[-1] == ("love", "dog", 8)
    one = called.prefix(prompts).select(torch.tensor([1]))
    assert called.score(one, tokens[:1].expand(1, 2, 3), mask[:1]).tolist() == [[2, 1]] and asked[-1][2] == 8

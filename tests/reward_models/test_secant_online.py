"""Substitutions for a head that is trained along: from the shortlists, scored exactly, a function of the seeds."""

import torch

from reward_models.secant_online import draw_substitutions, secant_rows
from reward_models.value_losses import secant_loss
from tests.reward_models.test_secant import value_model
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.responses import Responses

PROMPTS = [[5, 6, 7], [8, 9]]
EOS, PAD = 2, 0


def responses() -> Responses:
    tokens = torch.tensor([[[10, 11, EOS], [12, 13, 14]], [[15, EOS, PAD], [16, 17, 18]]])
    mask = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]]]).bool()
    return Responses(PROMPTS, tokens, mask, (EOS,), PAD)


def distribution() -> Shortlist:
    ids = torch.arange(10, 16).expand(4, 3, 6).clone()
    ids[..., 5] = EOS
    logps = torch.zeros(4, 3, 6)
    logps[..., 4] = -torch.inf
    return Shortlist(ids, logps)


def test_pairs_are_allowed_different_and_drawn_by_the_seed():
    seeds = torch.tensor([1, 2, 3, 4])
    t, v, mask = draw_substitutions(responses(), distribution(), seeds, 50)
    assert t.shape == (4, 18)  # T * K pairs there are
    assert mask.sum(1).tolist() == [
        2 * 3,
        3 + 3 + 4,
        4,
        3 * 4,
    ]  # 4 tokens of the distribution, less one's own; EOS stays
    tokens = responses().tokens_BNT.flatten(0, 1)
    for row in range(4):
        pairs = list(zip(t[row][mask[row]].tolist(), v[row][mask[row]].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert all(tokens[row, at] not in (new, EOS, PAD) and 10 <= new <= 13 for at, new in pairs)
    again = draw_substitutions(responses(), distribution(), seeds, 2)
    torch.testing.assert_close(again[1], v[:, :2])
    assert not torch.equal(draw_substitutions(responses(), distribution(), seeds + 9, 50)[1], v)


def test_targets_are_the_exact_changes_less_what_the_skip_knows(tiny_lm):
    value = value_model(tiny_lm)
    seeds = torch.tensor([[1, 2], [3, 4]])
    rows = secant_rows(value, responses(), distribution(), seeds, 3, "skip")
    t, v, _ = draw_substitutions(responses(), distribution(), seeds.flatten(), 3)
    prefix, given = value.prefix(PROMPTS), responses()
    base = value.score(prefix, given.tokens_BNT, given.mask_BNT)
    for r in range(4):
        tokens = given.tokens_BNT.clone()
        b, n = divmod(r, 2)
        tokens[b, n, t[r, 0]] = v[r, 0]
        exact = (value.score(prefix, tokens, given.mask_BNT) - base)[b, n] * given.mask_BNT[b, n].sum()
        torch.testing.assert_close(rows.targets_RS[r, 0] + rows.known_RS[r, 0], exact, rtol=1e-4, atol=1e-4)
        known = value.skip_head.weight[0] @ rows.steps_RSD[r, 0]
        torch.testing.assert_close(rows.known_RS[r, 0], known, rtol=1e-4, atol=1e-4)


def test_the_loss_by_hand_and_divided_by_the_whole_step():
    directions = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    steps = torch.tensor([[[0.5, 9.0], [9.0, 1.0]]])
    targets, known = torch.tensor([[1.0, 5.0]]), torch.zeros(1, 2)
    loss, metrics = secant_loss(directions, steps, targets, known, torch.tensor([[True, True]]))
    torch.testing.assert_close(loss, torch.tensor((0.5 * 0.5**2 + (3 - 0.5)) / 2))
    torch.testing.assert_close(metrics["secant_correlation"], torch.tensor(1.0))  # two points
    loss, _ = secant_loss(directions, steps, targets, known, torch.tensor([[True, False]]), 4)
    torch.testing.assert_close(loss, torch.tensor(0.5 * 0.5**2 / 4))
    loss, metrics = secant_loss(directions, steps, targets, known, torch.zeros(1, 2, dtype=torch.bool))
    assert float(loss.detach()) == 0 and torch.isnan(metrics["secant_correlation"])

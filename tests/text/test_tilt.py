"""The tilted distribution, its KL, and the multipliers that spend a budget."""

import math

import pytest
import torch

from vgf_llm.text.tilt import calibrate_multiplier, capped_multiplier, kl_divergence, tilt

NO_EOS = torch.zeros(1, 2, dtype=torch.bool)


def test_tilt_of_two_tokens_by_hand():
    """p = (1/2, 1/2), b = (ln 3, 0), s = 1: q = (3, 1)/4; KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308."""
    logp = torch.tensor([[0.5, 0.5]]).log()
    logq = tilt(logp, torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([1.0]), NO_EOS)
    torch.testing.assert_close(logq.exp(), torch.tensor([[0.75, 0.25]]))
    assert kl_divergence(logq, logp).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


def test_eos_keeps_its_probability_and_excluded_tokens_stay_excluded():
    logp = torch.tensor([[0.2, 0.5, 0.3, 0.0]]).log()
    eos = torch.tensor([[True, False, False, False]])
    q = tilt(logp, torch.tensor([[9.0, 1.0, -1.0, 50.0]]), torch.tensor([2.0]), eos).exp()
    assert q[0, 0].item() == pytest.approx(0.2, abs=1e-6)
    assert q[0, 3].item() == 0
    assert q.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert q[0, 1] / q[0, 2] == pytest.approx(0.5 / 0.3 * math.exp(4.0), rel=1e-4)


def test_only_eos_left_is_left_alone():
    logp = torch.tensor([[0.0, -torch.inf]])
    logq = tilt(logp, torch.ones(1, 2), torch.tensor([3.0]), torch.tensor([[True, False]]))
    assert torch.equal(logq, logp)
    assert kl_divergence(logq, logp).item() == 0


def test_cap_binds_only_where_it_must():
    logp = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    bonus = torch.tensor([[1.0, -1.0], [0.01, -0.01]])
    eos = torch.zeros(2, 2, dtype=torch.bool)
    s = capped_multiplier(logp, bonus, torch.tensor([5.0, 5.0]), eos, 0.1)
    nats = kl_divergence(tilt(logp, bonus, s, eos), logp)
    assert nats[0].item() == pytest.approx(0.1, abs=1e-4)
    assert s[1].item() == 5.0


@pytest.mark.parametrize("cap", [1e-3, 0.05, 1.0, 2.5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_cap_is_met_from_below_whatever_stands_beside(cap, size):
    """Rows of every shape: flat and peaked, one token nearly sure, half of the mass on EOS, tokens cut off."""
    torch.manual_seed(2)
    logps = (torch.randn(64, 12) * torch.linspace(0.1, 6, 64)[:, None]).log_softmax(-1)
    logps[::7, -3:] = -torch.inf
    logps = logps.log_softmax(-1)
    bonus = torch.randn(64, 12) * size
    eos = torch.zeros(64, 12, dtype=torch.bool)
    eos[::3, 0] = True
    wanted = torch.full((64,), 50.0 / size)
    s = capped_multiplier(logps, bonus, wanted, eos, cap)
    nats = kl_divergence(tilt(logps, bonus, s, eos), logps)
    assert (nats <= cap * (1 + 1e-3) + 1e-6).all()
    at_most = kl_divergence(tilt(logps, bonus, wanted, eos), logps)
    binds = at_most > cap
    assert binds.any() and torch.equal(s[~binds], wanted[~binds])
    torch.testing.assert_close(nats[binds], torch.full_like(nats[binds], cap), rtol=1e-3, atol=2e-6)
    alone = torch.cat(
        [capped_multiplier(logps[i : i + 1], bonus[i : i + 1], wanted[:1], eos[i : i + 1], cap) for i in range(64)]
    )
    torch.testing.assert_close(alone, s, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("multiplier", "cap", "spread", "offset"),
    [
        (1e5, 1.0, 1, 0),
        (1e7, 0.5, 1, 0),
        (1e9, 0.5, 1, 0),
        (1e6, 1.0, 15, 0),
        (10.0, 0.05, 1, 1e3),
        (10.0, 0.01, 1, 1e4),
    ],
)
def test_a_cap_holds_where_rounding_is_coarse(multiplier, cap, spread, offset):
    """Huge multipliers, peaked rows, bonuses with a common offset: measured in float64."""
    torch.manual_seed(3)
    logps = (torch.randn(400, 50) * spread).log_softmax(-1)
    bonus = torch.randn(400, 50) + offset
    eos = torch.zeros(400, 50, dtype=torch.bool)
    wanted = torch.full((400,), multiplier)
    s = capped_multiplier(logps, bonus, wanted, eos, cap)
    exact, centred = logps.double(), bonus.double() - offset
    nats = kl_divergence(tilt(exact, centred, s.double(), eos), exact)
    assert (nats <= cap * (1 + 0.02)).all()
    most = kl_divergence(tilt(exact, centred, wanted.double(), eos), exact)
    assert (s[most > 1.01 * cap] > 0).all()


def test_nothing_is_spent_under_a_cap_of_zero():
    logp = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    eos = torch.zeros(2, 2, dtype=torch.bool)
    assert (capped_multiplier(logp, torch.tensor([[1.0, -1.0]]).expand(2, 2), torch.ones(2), eos, 0.0) == 0).all()


@pytest.mark.parametrize("nats", [0.1, 0.5, 2.0])
def test_one_multiplier_spends_the_budget_and_more_where_the_bonus_is_large(nats):
    torch.manual_seed(1)
    logps = torch.randn(3, 6, 10).log_softmax(-1)
    bonus = torch.randn(3, 6, 10)
    bonus[:, 0] *= 4
    eos, mask = torch.zeros_like(logps, dtype=torch.bool), torch.ones(3, 6, dtype=torch.bool)
    mask[2, 3:] = False
    s = calibrate_multiplier(logps, bonus, eos, mask, nats, max_token_nats=100.0)
    spent = kl_divergence(tilt(logps, bonus, s.unsqueeze(-1).expand(3, 6), eos), logps) * mask
    torch.testing.assert_close(spent.sum(-1), torch.full((3,), nats), atol=2e-3, rtol=0)
    assert (spent[:, 0] > spent[:, 1]).all()


def test_calibration_counts_the_cap_and_gives_zero_without_a_bonus():
    logps = torch.full((2, 4, 2), 0.5).log()
    bonus = torch.tensor([1.0, -1.0]).expand(2, 4, 2).clone()
    bonus[1] = 0
    eos, mask = torch.zeros(2, 4, 2, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    s = calibrate_multiplier(logps, bonus, eos, mask, 10.0, max_token_nats=0.05)
    assert s[1].item() == 0
    capped = capped_multiplier(logps, bonus, s.unsqueeze(-1).expand(2, 4), eos, 0.05)
    spent = kl_divergence(tilt(logps, bonus, capped, eos), logps).sum(-1)
    assert spent[0].item() == pytest.approx(0.2, abs=1e-3)  # 4 positions at a cap of 0.05: the budget cannot be met

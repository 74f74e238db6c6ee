"""Fitting of a secant head: exact changes of a frozen value are scored once, then regressed on.

    minimise  mean smooth_l1( <o_t, (e_v - e_{y_t}) / rms>,  (exact(t, v) - <base_t, e_v - e_{y_t}>) T / unit )

over substitutions (t, v) from the reference's shortlist in responses sampled from it; o_t is the network's output, T
the response's tokens (1 for pooling "last"), unit the targets' standard deviation before the division. The output's
bias starts at the ridge solution for one direction at all tokens (`constant_direction`), in closed form; then AdamW,
cosine to zero. No derivative of the value is taken beyond the first, and none at all unless the base is "gradient".

Cost in FLOPs: responses * substitutions * T * 2 value parameters for the targets (most of it), and
steps * batch_size * 6 head parameters for the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from reward_models.fidelity import ExactChanges, Fidelity, compare_changes, exact_changes, score_gradient
from reward_models.modelling import RewardModel
from reward_models.secant import SecantHead, base_direction, direction_scale, secant_gradient
from reward_models.secant_settings import SecantTraining
from vgf_llm.console.progress import track
from vgf_llm.errors import DataError
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses, join_padded, join_prompts
from vgf_llm.text.sampler import sample_in_batches

_PROMPTS_A_BATCH = 16
_RIDGE = 1e-3  # of the mean square of a step's coordinate


@dataclass(frozen=True)
class Sampled:
    """Responses of the reference to B prompts and its shortlists there: tokens padded to one length."""

    responses: Responses
    shortlist_BNTK: Tensor


@dataclass(frozen=True)
class SecantTargets:
    """What the fit reads, computed once; row x is one substitution.

    Attributes:
        features_PF: inputs of the network at every text token of the responses.
        index_X: row of features_PF.
        step_XD: (e_v - e_{y_t}) / rms.
        target_X: what the base leaves over, times T; not yet in units.
    """

    features_PF: Tensor
    index_X: Tensor
    step_XD: Tensor
    target_X: Tensor


@torch.no_grad()
def sample_reference(
    reference: TorchReference, prompts: Sequence[list[int]], a_prompt: int, shortlist: int, seed: int
) -> Sampled:
    """Sample responses of the reference and look up its shortlists along them.

    Args:
        reference: base model and distribution.
        prompts: B lists of token ids.
        a_prompt: responses per prompt, at least 1.
        shortlist: K, likeliest tokens a position; fewer where the vocabulary is smaller.
        seed: of the samples.
    """
    from reward_models.fidelity import reference_shortlist

    rows = reference.model.get_output_embeddings().weight.shape[0]
    k = min(shortlist, reference.vocabulary or rows)
    parts = []
    for responses in sample_in_batches(reference, prompts, a_prompt, seed):
        found = reference_shortlist(
            reference.model, responses.prompts, responses.tokens_BNT, k, reference.pad_id, reference.vocabulary
        )
        parts.append((responses, found))
    return Sampled(join_prompts([r for r, _ in parts]), join_padded([s for _, s in parts], 0))


def score_substitutions(
    value: RewardModel, sampled: Sampled, substitutions: int, seed: int, description: str
) -> list[ExactChanges]:
    """Score the exact changes of sampled substitutions that neither move nor put in an EOS.

    Raises:
        DataError: no response has a token that could be replaced.
    """
    responses = sampled.responses
    eos_BNT1 = responses.eos_BNT.unsqueeze(-1)
    is_eos = torch.isin(sampled.shortlist_BNTK, torch.tensor(responses.eos_ids, device=eos_BNT1.device))
    own_BNTK = responses.tokens_BNT.unsqueeze(-1).expand_as(is_eos)  # a token is never a substitute for itself
    found = exact_changes(
        value,
        responses.prompts,
        responses.tokens_BNT,
        responses.mask_BNT,
        torch.where(is_eos | eos_BNT1, own_BNTK, sampled.shortlist_BNTK),
        substitutions=substitutions,
        seed=seed,
        description=description,
    )
    if not found:
        raise DataError("no sampled response has a token that could be replaced; sample longer or more responses")
    return found


@torch.no_grad()
def secant_targets(
    value: RewardModel, responses: Responses, changes: Sequence[ExactChanges], base: str
) -> SecantTargets:
    """Run the value over the responses and turn exact changes into what the base leaves over."""
    u_BNTD = value.embed(responses.tokens_BNT).detach()
    rows_B, base_rows = [], []
    for b in range(0, len(responses.prompts), _PROMPTS_A_BATCH):
        batch = slice(b, b + _PROMPTS_A_BATCH)
        prefix = value.prefix(responses.prompts[batch])
        _, base_BNTD, features = base_direction(value, prefix, u_BNTD[batch], responses.mask_BNT[batch], base)
        rows_B.append(features)
        base_rows.append(base_BNTD)
    features_BNTF, base_BNTD = torch.cat(rows_B), torch.cat(base_rows)
    movable_BNT = responses.movable_BNT
    row_BNT = movable_BNT.flatten().long().cumsum(0).view(movable_BNT.shape) - 1
    scale_BN = direction_scale(value, responses.mask_BNT)[..., 0, 0]
    index, steps, targets = [], [], []
    for change in changes:
        at = (change.b, change.n, change.t_S)
        step_SD = (value.embed(change.v_S) - u_BNTD[at]).float()
        left_S = change.exact_S - (base_BNTD[at] * step_SD).sum(-1)
        index.append(row_BNT[at])
        steps.append(step_SD / value.table_scale)
        targets.append(left_S / (scale_BN[change.b, change.n] * value.table_scale))
    return SecantTargets(features_BNTF[movable_BNT], torch.cat(index), torch.cat(steps), torch.cat(targets))


def constant_direction(targets: SecantTargets) -> Tensor:
    """Return the one direction w_D for all tokens that fits the targets best: ridge least squares, closed form.

    minimise |A w - y|^2 + lambda |w|^2, A the steps (in root mean squares of the table), y the targets, lambda a
    thousandth of the mean diagonal of A^T A. What a head adds to this is what it makes of the context.
    """
    steps_XD = targets.step_XD.double()
    gram_DD = steps_XD.T @ steps_XD
    ridge = _RIDGE * gram_DD.diagonal().mean().clamp(min=1e-12)
    eye_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    found_D: Tensor = torch.linalg.solve(gram_DD + ridge * eye_DD, steps_XD.T @ targets.target_X.double())
    return found_D.float()


def fit_secant_head(targets: SecantTargets, training: SecantTraining, base: str) -> tuple[SecantHead, list[float]]:
    """Regress a head on the targets.

    Args:
        targets: of `secant_targets`.
        training: steps, batch, learning rate, width of the hidden layer, dropout, seed.
        base: what the targets are left over from.

    Returns:
        The head, frozen, and the loss of every step.
    """
    device, width = targets.step_XD.device, targets.step_XD.shape[1]
    head = SecantHead(width, training.hidden, base, training.fit_seed).to(device)
    head.unit.copy_(targets.target_X.std(correction=0).clamp(min=1e-12))
    with torch.no_grad():
        head.second.bias.copy_(constant_direction(targets) / head.unit)
    optimizer = torch.optim.AdamW(head.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    generator = torch.Generator().manual_seed(training.fit_seed)
    losses = []
    for _ in track(range(training.steps), "fitting the secant head", unit="steps"):
        x_X = torch.randint(len(targets.index_X), (training.batch_size,), generator=generator).to(device)
        features_XF = targets.features_PF[targets.index_X[x_X]]
        if training.dropout:
            keep = torch.rand(features_XF.shape, generator=generator).to(device) >= training.dropout
            features_XF = features_XF * keep / (1 - training.dropout)
        predicted_X = (head(features_XF) * targets.step_XD[x_X]).sum(-1)
        loss = smooth_l1_loss(predicted_X, targets.target_X[x_X] / head.unit)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return head.eval().requires_grad_(False), losses


def compare_with_gradient(
    value: RewardModel, head: SecantHead, responses: Responses, changes: Sequence[ExactChanges]
) -> tuple[Fidelity, Fidelity]:
    """Return the fidelity of the value's own input gradient and of the head's directions, on the same substitutions.

    Raises:
        ValueError: no response has enough substitutions.
    """
    prefix, u_BNTD = value.prefix(responses.prompts), value.embed(responses.tokens_BNT).detach()
    plain_BNTD = score_gradient(value, prefix, responses.mask_BNT)(u_BNTD)[1]
    fitted_BNTD = secant_gradient(head)(value, prefix, responses)(u_BNTD)[1]
    before, after = (compare_changes(value, responses.tokens_BNT, changes, g) for g in (plain_BNTD, fitted_BNTD))
    return before, after

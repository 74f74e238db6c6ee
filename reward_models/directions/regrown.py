"""Changes that count the suffix: swap a token, let the reference write on with the same noise, and compare rewards.

    exact(t, v) = R(y_<t, v, suffix(v, g)) - R(y_<t, y_t, suffix(y_t, g))

g is the Gumbel noise that wrote y, so that the second term is R(y) itself and both suffixes are as alike as their
contexts allow. The mean over noise is Q(x, y_<t, v) - Q(x, y_<t, y_t) of the reference's own continuation: the change
that one-pass decoding brings about, where a swap in a finished text is a change that no left-to-right sampler makes.

Cost: for each substitution one response scored and the reference's suffix written, half a response on average. The
common noise lowers the variance of the difference and does not remove it: expect to need more substitutions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reward_models.directions.positions import Positions
from reward_models.directions.reward import CountedReward
from reward_models.fidelity import ExactChanges, sample_substitutions
from vgf_llm.console.progress import track
from vgf_llm.text.choosing import Draws
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses


@torch.no_grad()
def regrown_changes(
    reference: TorchReference,
    reward: CountedReward,
    positions: Positions,
    seeds_BN: Tensor,
    *,
    substitutions: int,
    seed: int = 0,
) -> list[ExactChanges]:
    """Score sampled substitutions with the suffix written anew.

    Args:
        reference: The reference that wrote the responses.
        reward: Any reward of token ids.
        positions: B x N responses that the reference sampled.
        seeds_BN: int64, the seeds that they were sampled with.
        substitutions: S per response, at least 1.
        seed: Of the substitutions.

    Returns:
        One item per response that has a candidate, in order.
    """
    responses = positions.responses
    prefix, generator = reward.prefix(responses.prompts), torch.Generator().manual_seed(seed)
    found = []
    for b in track(range(len(responses.prompts)), "regrowing substitutions", unit="prompts"):
        one = prefix.select(torch.tensor([b], device=responses.tokens_BNT.device))
        base_N = reward.score(one, responses.tokens_BNT[b : b + 1], responses.mask_BNT[b : b + 1])[0]
        for n in range(responses.tokens_BNT.shape[1]):
            tokens_T, mask_T = responses.tokens_BNT[b, n], responses.mask_BNT[b, n]
            shortlist_TK = positions.candidates_BNTK[b, n]
            t_S, v_S = sample_substitutions(tokens_T, mask_T, shortlist_TK, substitutions, generator, responses.eos_ids)
            if len(t_S):
                swapped_1ST = tokens_T.repeat(1, len(t_S), 1)
                swapped_1ST[0, torch.arange(len(t_S), device=t_S.device), t_S] = v_S
                texts = _regrown(reference, responses, b, swapped_1ST, mask_T, t_S, seeds_BN[b, n])
                scores_S = reward.score(one, texts.tokens_BNT, texts.mask_BNT)[0]
                found.append(ExactChanges(b, n, t_S, v_S, scores_S - base_N[n]))
    return found


def _regrown(
    reference: TorchReference,
    responses: Responses,
    b: int,
    swapped_1ST: Tensor,
    mask_T: Tensor,
    t_S: Tensor,
    row_seed: Tensor,
) -> Responses:
    """Keep each text up to its swapped token and write the rest; a swap at the last place leaves nothing to write."""
    longest, length = reference.sampling.max_new_tokens, swapped_1ST.shape[-1]
    mask_1ST = mask_T.expand_as(swapped_1ST)
    prompts = [responses.prompts[b]]
    swapped = Responses(prompts, swapped_1ST, mask_1ST, responses.eos_ids, responses.pad_id)
    if longest == 1:
        return swapped
    keep_1S = (t_S + 1).clamp(max=longest - 1).unsqueeze(0)
    draws = Draws(reference.sampling, row_seed.to(t_S.device).expand(len(t_S)), kept_columns=0)
    written = reference.rewrite(reference.prefix(prompts), swapped, keep_1S, draws)  # type: ignore[arg-type]
    is_last_1S1 = (t_S + 1 >= longest).view(1, -1, 1)
    pad = (0, longest - length)
    tokens_1ST = torch.nn.functional.pad(swapped_1ST, pad, value=responses.pad_id)
    return Responses(
        prompts,
        torch.where(is_last_1S1, tokens_1ST, written.tokens_BNT),
        torch.where(is_last_1S1, torch.nn.functional.pad(mask_1ST, pad, value=False), written.mask_BNT),
        responses.eos_ids,
        responses.pad_id,
    )

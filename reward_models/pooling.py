"""What a reward model's heads read of its tokens: one vector a sequence, or one running value a token.

    last: h_T        mean: (1/T) sum_t h_t        running mean at token t: (1/t) sum_{s <= t} h_s

over the tokens that a mask picks. A head is linear, so w . mean(h) = mean(w . h): the running mean is taken of scalars
(head first, mean after), and nothing of width D is summed up along a sequence. Tensors in, tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_llm.errors import ModelError


def pool_last(hidden_RSD: Tensor, mask_RS: Tensor) -> Tensor:
    """Return the vector at each row's last picked token, [R, D] float32; each row must have one."""
    order_S = torch.arange(1, mask_RS.shape[1] + 1, device=mask_RS.device)
    last_R = (mask_RS.bool() * order_S).argmax(dim=-1)
    return hidden_RSD[torch.arange(len(last_R), device=last_R.device), last_R].float()


def pool_mean(hidden_RSD: Tensor, mask_RS: Tensor) -> Tensor:
    """Return the mean vector of each row's picked tokens, [R, D] float32; each row must have one."""
    mask_RS = mask_RS.bool()
    kept_RSD = hidden_RSD.float().masked_fill(~mask_RS[..., None], 0.0)
    return kept_RSD.sum(dim=1) / mask_RS.sum(dim=1, keepdim=True)


def running_mean(reads_RS: Tensor, mask_RS: Tensor) -> Tensor:
    """Return at each picked token the mean of the reads [R, S] of the picked tokens up to it, float32, elsewhere 0."""
    mask_RS = mask_RS.bool()
    total_RS = reads_RS.float().masked_fill(~mask_RS, 0.0).cumsum(dim=-1)
    return (total_RS / mask_RS.cumsum(dim=-1).clamp(min=1)).masked_fill(~mask_RS, 0.0)


def prompt_end(response_mask_RS: Tensor) -> Tensor:
    """Return a bool [R, S], True just before each row's first response token (nowhere if that is column 0)."""
    started_RS = response_mask_RS.bool().cumsum(dim=-1) > 0
    return torch.nn.functional.pad(started_RS[:, 1:], (0, 1)) & ~started_RS


def prefix_columns(values_RS: Tensor, response_mask_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Gather token-level values by response prefix, whatever the padding of the prompts.

    Args:
        values_RS: what `RewardModel.forward(..., token_level=True)` returned.
        response_mask_RS: [R, S], 1 where a response token stands; contiguous in each row.

    Returns:
        values_RT1, column 0 the prompt's value and column t that of the first t response tokens, 0 where there is none;
        and mask_RT1, bool, True at those columns. T is the longest response, at least 0.
    """
    response_mask_RS = response_mask_RS.bool()
    lengths_R = response_mask_RS.sum(dim=-1)
    first_R = response_mask_RS.long().argmax(dim=-1)
    steps_T1 = torch.arange(int(lengths_R.max()) + 1, device=values_RS.device)
    mask_RT1 = (steps_T1 <= lengths_R[:, None]) & (lengths_R > 0)[:, None]
    columns_RT1 = (first_R[:, None] - 1 + steps_T1).clamp(0, values_RS.shape[1] - 1)
    return values_RS.gather(1, columns_RT1).masked_fill(~mask_RT1, 0.0), mask_RT1


def check_pooled(mask_RS: Tensor) -> None:
    """Refuse a mask with an empty row.

    Raises:
        ModelError: naming the row.
    """
    empty = (~mask_RS.bool().any(dim=-1)).nonzero()
    if len(empty):
        raise ModelError(f"row {int(empty[0])} has no token to score; a response holds at least its EOS token")


def close_responses(u_RTD: Tensor, mask_RT: Tensor, closing_CD: Tensor, ends_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Put a closing's embeddings where each response's EOS stands, or after a response without one.

    Args:
        u_RTD: response embeddings.
        mask_RT: bool, right padded.
        closing_CD: embeddings of the closing's tokens; C may be 0.
        ends_ED: embeddings of the tokens that count as an EOS.

    Returns:
        Embeddings and mask of T and the closing's tokens together, [R, T + C, D] and [R, T + C].
    """
    C, lengths_R = len(closing_CD), mask_RT.sum(dim=1)
    last_RD = u_RTD.detach()[torch.arange(len(u_RTD), device=u_RTD.device), (lengths_R - 1).clamp(min=0)]
    is_ended_R = (last_RD[:, None] == ends_ED.to(last_RD.dtype)).all(dim=-1).any(dim=-1) & (lengths_R > 0)
    start_R = (lengths_R - is_ended_R.long()).clamp(min=0 if C else 1)
    place_RS = torch.arange(u_RTD.shape[1] + C, device=u_RTD.device) - start_R[:, None]
    padded_RSD = torch.nn.functional.pad(u_RTD, (0, 0, 0, C))
    if C:
        from_closing_RSD = closing_CD.to(u_RTD.dtype)[place_RS.clamp(0, C - 1)]
        padded_RSD = torch.where(((place_RS >= 0) & (place_RS < C))[..., None], from_closing_RSD, padded_RSD)
    return padded_RSD, place_RS < C

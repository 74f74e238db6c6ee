"""Responses: the token ids that a group of samples is made of, right padded, with what counts as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgf_llm.text.distribution import Shortlist


@dataclass(frozen=True)
class Responses:
    """N responses to each of B prompts.

    Attributes:
        prompts: B prompts as token ids, unpadded.
        tokens_BNT: int64, right padded.
        mask_BNT: bool, true on every token of a response, its EOS included.
        eos_ids: Ids that end a response.
        pad_id: Id that fills the tail.
        distribution: The shortlist [B, N, T, K] that each token was drawn from, where the sampler kept it.
    """

    prompts: list[list[int]]
    tokens_BNT: Tensor
    mask_BNT: Tensor
    eos_ids: tuple[int, ...]
    pad_id: int
    distribution: Shortlist | None = None

    @property
    def lengths_BN(self) -> Tensor:
        """Tokens of each response, EOS included."""
        return self.mask_BNT.sum(-1)

    @property
    def eos_BNT(self) -> Tensor:
        """True where a token of a response is an EOS."""
        return is_any_of(self.tokens_BNT, self.eos_ids) & self.mask_BNT

    @property
    def movable_BNT(self) -> Tensor:
        """True on the tokens that may be moved: those of the response, without its EOS."""
        return self.mask_BNT & ~self.eos_BNT

    def with_tokens(self, tokens_BNT: Tensor) -> Responses:
        """Return the same prompts and lengths with other tokens, cut after the first EOS."""
        mask_BNT = self.mask_BNT & mask_after_eos(tokens_BNT, self.eos_ids)
        return Responses(
            self.prompts, tokens_BNT.masked_fill(~mask_BNT, self.pad_id), mask_BNT, self.eos_ids, self.pad_id
        )

    def take(self, index_BM: Tensor) -> Responses:
        """Return M responses of each prompt by their index in N (int64, [B, M])."""
        index_BMT = index_BM.unsqueeze(-1).expand(-1, -1, self.tokens_BNT.shape[-1])
        return Responses(
            self.prompts,
            self.tokens_BNT.gather(1, index_BMT),
            self.mask_BNT.gather(1, index_BMT),
            self.eos_ids,
            self.pad_id,
            None if self.distribution is None else self.distribution.take(index_BM),
        )

    def first(self, n: int) -> Responses:
        """Return the first ``n`` responses of each prompt."""
        distribution = (
            None
            if self.distribution is None
            else Shortlist(self.distribution.ids[:, :n], self.distribution.logps[:, :n])
        )
        return Responses(
            self.prompts, self.tokens_BNT[:, :n], self.mask_BNT[:, :n], self.eos_ids, self.pad_id, distribution
        )

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """Decode every response to text, special tokens dropped."""
        flat = [
            row[keep].tolist()
            for row, keep in zip(self.tokens_BNT.flatten(0, 1), self.mask_BNT.flatten(0, 1), strict=True)
        ]
        texts = tokenizer.batch_decode(flat, skip_special_tokens=True)
        n = self.tokens_BNT.shape[1]
        return [texts[start : start + n] for start in range(0, len(texts), n)]


def concatenate(parts: Sequence[Responses]) -> Responses:
    """Join responses to the same prompts along N, padded to the longest; with distributions where all have them."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    length = max(part.tokens_BNT.shape[-1] for part in parts)
    tokens = [_filled_up(part.tokens_BNT, length, part.pad_id) for part in parts]
    masks = [_filled_up(part.mask_BNT, length, False) for part in parts]
    distributions = [part.distribution.padded(length) for part in parts if part.distribution is not None]
    distribution = None
    if len(distributions) == len(parts):
        distribution = Shortlist(
            torch.cat([one.ids for one in distributions], 1), torch.cat([one.logps for one in distributions], 1)
        )
    return Responses(
        first.prompts, torch.cat(tokens, 1), torch.cat(masks, 1), first.eos_ids, first.pad_id, distribution
    )


def join_prompts(parts: Sequence[Responses]) -> Responses:
    """Join responses to different prompts along B, padded to the longest; their distributions are dropped."""
    first = parts[0]
    return Responses(
        [prompt for part in parts for prompt in part.prompts],
        join_padded([part.tokens_BNT for part in parts], first.pad_id),
        join_padded([part.mask_BNT for part in parts], False),
        tuple(first.eos_ids),
        first.pad_id,
    )


def join_padded(tensors: Sequence[Tensor], fill: Any) -> Tensor:
    """Join tensors [B, N, T, ...] along B, filled up at the end of T to the longest."""
    longest = max(tensor.shape[2] for tensor in tensors)
    return torch.cat([_filled_up(tensor, longest, fill) for tensor in tensors])


def _filled_up(tensor: Tensor, length: int, fill: Any) -> Tensor:
    room = tensor.new_full((*tensor.shape[:2], length - tensor.shape[2], *tensor.shape[3:]), fill)
    return torch.cat([tensor, room], dim=2)


def changed_tokens(before: Responses, after: Responses) -> Tensor:
    """Return how many positions of each response hold another token than before, int64 [B, N].

    A position that only one of the two has counts as changed.
    """
    length = max(before.tokens_BNT.shape[-1], after.tokens_BNT.shape[-1])

    def padded(responses: Responses) -> Tensor:
        tokens_BNT = responses.tokens_BNT.masked_fill(~responses.mask_BNT, -1)
        return torch.nn.functional.pad(tokens_BNT, (0, length - tokens_BNT.shape[-1]), value=-1)

    return (padded(before) != padded(after)).sum(-1)


def is_any_of(ids: Tensor, members: Sequence[int]) -> Tensor:
    """Return where ``ids`` holds one of ``members``; a bool tensor of the same shape."""
    return torch.isin(ids, torch.as_tensor(members, dtype=ids.dtype, device=ids.device))


def mask_after_eos(tokens: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Return a bool mask over the last dim that is true up to and including the first EOS."""
    ended_before = is_any_of(tokens, eos_ids).long().cumsum(-1) - is_any_of(tokens, eos_ids).long()
    return ended_before == 0

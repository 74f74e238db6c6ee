"""A response as the reference sees it: the distribution before each of its tokens, and what the tokens have under it.

Decoders that keep a response and change parts of it (``edit``, ``pivot``) carry its path from round to round, so that a
distribution is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.protocols import Prefix, Reference, Work
from vgf_llm.text.responses import Responses, is_any_of
from vgf_llm.text.tilt import linear_bonus


@dataclass(frozen=True)
class Path:
    """The sampling distribution along B x N responses.

    Attributes:
        distribution: Shortlist [B, N, T, K]; the response's own token is on it.
        own_BNT: Log-probability of each token of the response; 0 at padding.
    """

    distribution: Shortlist
    own_BNT: Tensor

    @property
    def total_BN(self) -> Tensor:
        """Log-probability of the whole response."""
        return self.own_BNT.sum(-1)

    def take(self, index_BM: Tensor) -> Path:
        """Return the paths of M responses of each prompt by their index in N (int64, [B, M])."""
        batch_B1 = torch.arange(len(index_BM), device=index_BM.device).unsqueeze(1)
        return Path(self.distribution.take(index_BM), self.own_BNT[batch_B1, index_BM])

    def where(self, use_BN: Tensor, other: Path) -> Path:
        """Return this path, and ``other`` where ``use_BN``."""
        use_BNT = use_BN.unsqueeze(-1)
        use_BNT1 = use_BNT.unsqueeze(-1)
        distribution = Shortlist(
            torch.where(use_BNT1, other.distribution.ids, self.distribution.ids),
            torch.where(use_BNT1, other.distribution.logps, self.distribution.logps),
        )
        return Path(distribution, torch.where(use_BNT, other.own_BNT, self.own_BNT))


def path_of(reference: Reference, context: Prefix, responses: Responses) -> tuple[Path, Work]:
    """Return the path of responses, and its cost: one forward, or none where the sampler kept the distributions."""
    if responses.distribution is not None:
        distribution = Shortlist(
            pad(responses.distribution.ids, (0, 1)), pad(responses.distribution.logps, (0, 1), value=-torch.inf)
        )
        return Path(distribution, own_logps(distribution, responses)), Work.none(len(responses.prompts))
    found = reference.shortlists(context, responses)
    shape = (*responses.tokens_BNT.shape, -1)
    distribution = Shortlist(found.ids.view(shape), found.logps.view(shape))
    return Path(distribution, own_logps(distribution, responses)), Work.of(responses.lengths_BN, reference=1)


def own_logps(distribution: Shortlist, responses: Responses) -> Tensor:
    """Return the log-probability of each token of the responses under their distributions, [B, N, T]; 0 at padding."""
    same = (distribution.ids == responses.tokens_BNT.unsqueeze(-1)) & ~torch.isinf(distribution.logps)
    own_BNT = distribution.logps.masked_fill(~same, -torch.inf).amax(-1)
    return own_BNT.masked_fill(~responses.mask_BNT, 0)


def is_on_list(distribution: Shortlist, responses: Responses) -> Tensor:
    """Return whether every token of a response can be drawn from the truncated distribution, bool [B, N].

    A distribution that had to be widened for the response's own token has that token in its last column.
    """
    return (torch.isinf(distribution.logps[..., -1]) | ~responses.mask_BNT).all(-1)


def edit_scores(table_VD: Tensor, path: Path, responses: Responses, displacement_BNTD: Tensor) -> Tensor:
    """Return l(t, v) = <Delta_t, e_v - e_{y_t}> + log p(v | y_<t) - log p(y_t | y_<t) of every edit, [B, N, T, K].

    ``-inf`` where there is no edit: v is the token that stands there or ends a response, or t may not be changed.
    """
    ids = path.distribution.ids
    bonus = linear_bonus(table_VD, displacement_BNTD, responses.tokens_BNT, ids)
    own = ids == responses.tokens_BNT.unsqueeze(-1)
    barred = own | is_any_of(ids, responses.eos_ids) | ~responses.movable_BNT.unsqueeze(-1)
    return (bonus + path.distribution.logps - path.own_BNT.unsqueeze(-1)).masked_fill(barred, -torch.inf)


def with_token(responses: Responses, position_BN: Tensor, token_BN: Tensor) -> Responses:
    """Return the responses with one token of each replaced (none of them an EOS)."""
    tokens_BNT = responses.tokens_BNT.scatter(-1, position_BN.unsqueeze(-1), token_BN.unsqueeze(-1))
    return Responses(responses.prompts, tokens_BNT, responses.mask_BNT, responses.eos_ids, responses.pad_id)


def chosen(use_BN: Tensor, new: Responses, old: Responses) -> Responses:
    """Return ``new`` where ``use_BN``, else ``old``; both are padded to the same length."""
    use_BN1 = use_BN.unsqueeze(-1)
    return Responses(
        old.prompts,
        torch.where(use_BN1, new.tokens_BNT, old.tokens_BNT),
        torch.where(use_BN1, new.mask_BNT, old.mask_BNT),
        old.eos_ids,
        old.pad_id,
    )

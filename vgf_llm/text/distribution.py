"""The reference distribution: temperature and truncation applied to logits, as a shortlist of K tokens.

Every arm of an experiment draws from this distribution, because truncation alone already improves samples.
Top-k comes first, then nucleus (top-p) within it, as transformers' warpers do in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.settings import SamplingSettings
from vgf_llm.text.noise import gumbel_noise

_ENDS, _GOES_ON = -1, -2  # the noise of "does it end here", beside that of the tokens


@dataclass(frozen=True)
class Shortlist:
    """The tokens that a truncated distribution can emit, most probable first.

    Attributes:
        ids: int64 [..., K].
        logps: float32 [..., K], normalised over K; ``-inf`` for columns outside the nucleus.
    """

    ids: Tensor
    logps: Tensor

    def including(self, token: Tensor, logits: Tensor, temperature: float) -> Shortlist:
        """Return the shortlist with ``token`` as one more column, so that a response can always keep its own token.

        Where the token is on the list already (or is asked for nowhere: negative id), the new column is ``-inf``.

        Args:
            token: int64 [...], -1 where nothing is to be added.
            logits: The untruncated logits [..., V].
            temperature: The distribution's temperature.
        """
        token_1 = token.clamp(min=0).unsqueeze(-1)
        scaled = logits.float() / temperature
        gap_1 = scaled.gather(-1, token_1) - scaled.gather(-1, self.ids[..., :1])
        return self.including_gap(token, gap_1.squeeze(-1))

    def including_gap(self, token: Tensor, gap: Tensor) -> Shortlist:
        """As :meth:`including`, given log p(token) - log p(first column) [...] at the distribution's temperature."""
        token_1 = token.clamp(min=0).unsqueeze(-1)
        known = ((self.ids == token_1) & ~torch.isinf(self.logps)).any(-1, keepdim=True)
        own = gap.unsqueeze(-1) + self.logps[..., :1]
        own = own.masked_fill(known | (token < 0).unsqueeze(-1), -torch.inf)
        return Shortlist(torch.cat([self.ids, token_1], -1), torch.cat([self.logps, own], -1).log_softmax(-1))

    def take(self, index_BM: Tensor) -> Shortlist:
        """Return the distributions [B, M, T, K] of M rows of each prompt, of a shortlist [B, N, T, K], by index."""
        batch_B1 = torch.arange(len(index_BM), device=index_BM.device).unsqueeze(1)
        return Shortlist(self.ids[batch_B1, index_BM], self.logps[batch_B1, index_BM])

    def padded(self, length: int) -> Shortlist:
        """Return the distributions [..., length, K] with positions added at the end; nothing can be drawn there."""
        missing = length - self.ids.shape[-2]
        return Shortlist(pad(self.ids, (0, 0, 0, missing)), pad(self.logps, (0, 0, 0, missing), value=-torch.inf))

    def column_of(self, token: Tensor) -> Tensor:
        """Return the column that holds ``token`` [...]; a token off the list gives its most probable column (0)."""
        return ((self.ids == token.unsqueeze(-1)) & ~torch.isinf(self.logps)).long().argmax(-1)


def truncate(logits: Tensor, sampling: SamplingSettings) -> Shortlist:
    """Apply temperature, top-k and top-p to ``logits`` [..., V] and return the shortlist that is left."""
    k = sampling.top_k or logits.shape[-1]
    values, ids = (logits.float() / sampling.temperature).topk(min(k, logits.shape[-1]), dim=-1)
    return normalised(ids, values, sampling.top_p)


def normalised(ids: Tensor, values: Tensor, top_p: float) -> Shortlist:
    """Return the distribution over a list of tokens, given their log-probabilities up to a constant, in falling order.

    Args:
        ids: int64 [..., K].
        values: float [..., K], temperature applied.
        top_p: Probability mass that is kept.
    """
    logps = values.log_softmax(-1)
    if top_p < 1:
        mass_before = logps.exp().cumsum(-1) - logps.exp()
        least = torch.finfo(logps.dtype).tiny  # a smaller top_p would be 0 in this type, and leave no token
        logps = logps.masked_fill(mass_before >= max(top_p, least), -torch.inf).log_softmax(-1)
    return Shortlist(ids, logps)


def ends_here(distribution: Shortlist, is_eos_RK: Tensor, seeds_R: Tensor, position: int | Tensor) -> Tensor:
    """Decide by fresh noise, with the reference's probability of EOS, whether a row ends here; bool [R]."""
    noise_R2 = gumbel_noise(seeds_R, position, seeds_R.new_tensor([_ENDS, _GOES_ON]).expand(len(seeds_R), 2))
    end_R = distribution.logps.masked_fill(~is_eos_RK, -torch.inf).logsumexp(-1) + noise_R2[:, 0]
    go_on_R = distribution.logps.masked_fill(is_eos_RK, -torch.inf).logsumexp(-1) + noise_R2[:, 1]
    return end_R > go_on_R

"""``prior``: the reference writes, the displacement only tilts it.

At position t of response y, over the reference's shortlist (plus y_t while nothing has changed),

    b_t(v) = <Delta_t, e_v - e_{y_t}>,        q_t(v) ∝ p_t(v) exp(s b_t(v)),

with one multiplier s a response calibrated on the original contexts to the budget in nats, a cap a token, and no
more than what is left of the budget on the path (:mod:`vgf_llm.text.tilt`). The token is argmax_v(log q_t(v) + g_t(v))
with the Gumbel noise of y's own sampling, drawn from its posterior given y (:mod:`vgf_llm.text.noise`), so that a zero
displacement gives y back token for token. Over y ~ p the noise is exactly Gumbel, so y' ~ q for a displacement that
does not depend on y's noise; a gradient taken at y does, a little, and from the second round on y itself is no draw
from p. The KL reported is that of the distributions along the path that is written. It says nothing of the selection
that follows (best of N adds at most log N - (N-1)/N).

Whether a response ends is decided first and by the reference alone: an original that still stands keeps its EOS and
gets no other, a changed one ends with the reference's probability.

Departure from a plain logits processor: while a row still equals its original, the distribution of the parallel forward
is used in place of the sequential one, so that rounding cannot flip a token that nothing pushed.

Of a response that is to be drawn afresh (``coupled_BN`` false) only the displacement and the multiplier are used:
independent texts of one moved particle.

Options, for ablations: ``multiplier="token"`` spends min(nats / T, cap) at every token in place of one s a response.
``coupling="maximal"`` keeps y_t with probability min(1, q_t(y_t) / p_t(y_t)), else draws from (q_t - p_t)+ normalised,
and draws afresh from q_t once the row has changed (:mod:`vgf_llm.text.coupling`). ``after_change="drop"`` sets s = 0
after the first token that is not y_t: the rest is the reference's, at no nats.

Cost a response: one sequential decode (2PT FLOPs, P parameters, T tokens), and one parallel forward (2PT) where the
sampler did not keep the distributions of the original.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vgf_llm.text.protocols import Decoded, Move, Prefix, Reference, Work
from vgf_llm.text.tilted_path import TiltedPath, distributions_of
from vgf_llm.text.tilted_step import TiltOptions


class PriorDecoder:
    """Reference-tilted autoregressive decoding with posterior-Gumbel coupling.

    Args:
        reference: The frozen base model and its distribution.
        table_VD: Input embeddings that the particles live in.
        multiplier: One a ``response``, calibrated to its nats, or every ``token`` spends min(nats / T, cap).
        coupling: To the original by its ``gumbel`` noise, or ``maximal``, the most tokens kept at each position.
        after_change: ``keep`` the tilt after the first changed token, or ``drop`` it.

    Raises:
        ValueError: Naming the option and the value seen.
    """

    def __init__(
        self,
        reference: Reference,
        table_VD: Tensor,
        *,
        multiplier: Literal["response", "token"] = "response",
        coupling: Literal["gumbel", "maximal"] = "gumbel",
        after_change: Literal["keep", "drop"] = "keep",
    ) -> None:
        self.options = TiltOptions(multiplier, coupling, after_change)
        self.reference = reference
        self.table_VD = table_VD

    def prepare(self, prompts: list[list[int]]) -> Prefix:
        """Run the prompts through the reference once."""
        return self.reference.prefix(prompts)

    @torch.no_grad()
    def decode(self, context: Prefix, move: Move) -> Decoded:
        """Write every response again under the tilted distribution."""
        n = move.responses.tokens_BNT.shape[1]
        distribution, work = distributions_of(self.reference, context, move.responses)
        path = TiltedPath(self.reference, self.table_VD, move, distribution, self.options)
        path.calibrate(slice(None), move.nats)
        written = self.reference.write(context, n, path)
        return Decoded(written, path.nats_R.view(-1, n), work + Work.of(written.lengths_BN, reference=1))

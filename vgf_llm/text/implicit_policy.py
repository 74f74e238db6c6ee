"""The implicit policy: sample from the reference, transport, decode, select.

Nothing is trained here. The policy is what reference, value and budget imply together; turning the budget gives another
policy of the same artefact, and the empty budget is best-of-N. Originals and every round stay in the pool that is
selected from, so the selected value is never below best-of-N's: a property of the construction, not a finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vgf_llm.errors import NonFiniteError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.distances import displacement_in_token_units
from vgf_llm.sampling.protocol import Sampler
from vgf_llm.text.noise import combine_seeds, gumbel_noise
from vgf_llm.text.particles import GradientSource, exact_gradient, move_particles, token_spacing
from vgf_llm.text.protocols import Decoder, Move, Value
from vgf_llm.text.responses import Responses, concatenate

Selection = Literal["max", "softmax", "random"]
_ROUND_STREAM, _SELECTION_STREAM = 0x10000, 0x20000


@dataclass(frozen=True)
class Outcome:
    """Everything that one call of the policy produced.

    Attributes:
        originals: N samples of the reference a prompt.
        transported: The same N after the last round; ``originals`` itself for the empty budget.
        original_values_BN: Value of the originals.
        transported_values_BN: Value of the transported.
        nats_RBN: KL spent while decoding in each of R rounds; NaN for decoders without a law.
        displacement_RBN: Mean displacement of a moved token in each round, in nearest-token distances.
        selected: One response a prompt, [B, 1, T].
        selected_values_B: Its value.
        selected_index_B: Its index in the pool; below N it is an original, then follow the rounds in order.
    """

    originals: Responses
    transported: Responses
    original_values_BN: Tensor
    transported_values_BN: Tensor
    nats_RBN: Tensor
    displacement_RBN: Tensor
    selected: Responses
    selected_values_B: Tensor
    selected_index_B: Tensor

    @property
    def nats_BN(self) -> Tensor:
        """KL spent while decoding, summed over the rounds."""
        return self.nats_RBN.sum(0)

    @property
    def displacement_BN(self) -> Tensor:
        """Displacement summed over the rounds."""
        return self.displacement_RBN.sum(0)


class ImplicitPolicy:
    """Reference, value, decoder and budget as one policy.

    Args:
        sampler: Draws from the reference law.
        value: Differentiable value; moves the particles and selects.
        decoder: Turns moved particles into tokens.
        budget: Transport budget; :meth:`TransportBudget.none` is best-of-N.
        select: ``max`` by value, ``softmax`` of value / ``budget.temperature``, or ``random`` in the pool.
        gradient: Where the flow's direction comes from; the value's exact gradient by default.
        length_unit: Unit of displacement; the median nearest-token distance of the value's table when not given.
    """

    def __init__(
        self,
        sampler: Sampler,
        value: Value,
        decoder: Decoder,
        budget: TransportBudget,
        *,
        select: Selection = "max",
        gradient: GradientSource = exact_gradient,
        length_unit: float | None = None,
    ) -> None:
        if select not in ("max", "softmax", "random"):
            raise ValueError(f"select must be max, softmax or random, got {select!r}")
        self.sampler = sampler
        self.value = value
        self.decoder = decoder
        self.budget = budget
        self.selection = select
        self.gradient = gradient
        self.length_unit = length_unit or token_spacing(value.embedding_table_VD)

    def __call__(self, prompts: list[list[int]], seeds_BN: Tensor) -> Outcome:
        """Answer B prompts with N particles each.

        Args:
            prompts: B lists of token ids.
            seeds_BN: int64, one seed a response (:func:`vgf_llm.text.noise.row_seeds`).
        """
        return self.improve(self.sampler.sample(prompts, seeds_BN), seeds_BN)

    def improve(self, originals: Responses, seeds_BN: Tensor) -> Outcome:
        """Transport, decode and select, given the samples.

        Raises:
            NonFiniteError: If a value or gradient is not finite.
        """
        value_prefix = self.value.prefix(originals.prompts)
        original_values_BN = self._score(value_prefix, originals)
        context = None if self.budget.is_none else self.decoder.prepare(originals.prompts)
        current, pool, values = originals, [originals], [original_values_BN]
        nats: list[Tensor] = []
        displacements: list[Tensor] = []
        for index in range(0 if self.budget.is_none else self.budget.rounds):
            delta_BNTD, moved_by_BN = self.transport(value_prefix, current)
            decoded = self.decoder.decode(
                context,
                Move(
                    responses=current,
                    displacement_BNTD=delta_BNTD,
                    nats=self.budget.nats / self.budget.rounds,
                    max_token_nats=self.budget.max_token_nats,
                    seeds_BN=combine_seeds(seeds_BN, _ROUND_STREAM + index),
                ),
            )
            current = decoded.responses
            pool.append(current)
            values.append(self._score(value_prefix, current))
            nats.append(decoded.nats_BN)
            displacements.append(moved_by_BN)
        nothing_RBN = original_values_BN.new_zeros((0, *original_values_BN.shape))
        selected, selected_values_B, index_B = self.select(concatenate(pool), torch.cat(values, 1), seeds_BN)
        return Outcome(
            originals=originals,
            transported=current,
            original_values_BN=original_values_BN,
            transported_values_BN=values[-1],
            nats_RBN=torch.stack(nats) if nats else nothing_RBN,
            displacement_RBN=torch.stack(displacements) if nats else nothing_RBN,
            selected=selected,
            selected_values_B=selected_values_B,
            selected_index_B=index_B,
        )

    def transport(self, value_prefix: object, responses: Responses) -> tuple[Tensor, Tensor]:
        """Move the particles by one round; returns the displacement [B, N, T, D] and its mean length a token [B, N]."""
        trajectory = move_particles(
            self.value,
            value_prefix,
            responses,
            self.budget,
            length_unit=self.length_unit,
            gradient=self.gradient,
        )
        delta_BNTD = trajectory.delta
        lengths_BNT = displacement_in_token_units(delta_BNTD.float(), self.length_unit)
        return delta_BNTD, lengths_BNT.sum(-1) / responses.movable_BNT.sum(-1).clamp(min=1)

    def select(self, pool: Responses, values_BM: Tensor, seeds_BN: Tensor) -> tuple[Responses, Tensor, Tensor]:
        """Pick one response a prompt; returns it with its value [B] and its index in the pool [B]."""
        columns_BM = torch.arange(values_BM.shape[1], device=values_BM.device).expand_as(values_BM)
        seeds_B = combine_seeds(seeds_BN[:, 0], _SELECTION_STREAM).to(values_BM.device)
        noise_BM = gumbel_noise(seeds_B, 0, columns_BM)
        scores_BM = {
            "max": values_BM,
            "softmax": values_BM / self.budget.temperature + noise_BM,
            "random": noise_BM,
        }[self.selection]
        index_B = scores_BM.argmax(-1)
        return pool.take(index_B.unsqueeze(1)), values_BM.gather(1, index_B.unsqueeze(1)).squeeze(1), index_B

    @torch.no_grad()
    def _score(self, value_prefix: object, responses: Responses) -> Tensor:
        values_BN = self.value.score(value_prefix, responses.tokens_BNT, responses.mask_BNT)
        if not bool(values_BN.isfinite().all()):
            group, particle = (int(i) for i in (~values_BN.isfinite()).nonzero()[0])
            raise NonFiniteError(
                f"the value of prompt {group}, response {particle} is {float(values_BN[group, particle])}; check the "
                "reward model's weights and dtype",
                group=group,
                step=0,
            )
        return values_BN

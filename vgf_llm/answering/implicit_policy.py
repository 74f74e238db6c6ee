"""The implicit policy: sample from the reference, transport, decode, select.

Nothing is trained here. The policy is what reference, value and budget imply together; turning the budget gives another
policy of the same artefact, and the empty budget is best-of-N. Originals and every round stay in the pool that is
selected from, so the selected value is never below best-of-N's: a property of the construction, not a finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vgf_llm.errors import NonFiniteError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.distances import displacement_in_token_units
from vgf_llm.text.noise import combine_seeds, gumbel_noise
from vgf_llm.text.particles import GradientSource, exact_gradient, move_particles, token_spacing
from vgf_llm.text.protocols import Decoder, Move, Moved, Value, Work
from vgf_llm.text.responses import Responses, concatenate
from vgf_llm.text.sampler import Sampler
from vgf_llm.text.stream import StreamSampler

Selection = Literal["max", "softmax", "random"]
_ROUND_STREAM, _SELECTION_STREAM, _DRAW_STREAM = 0x10000, 0x20000, 0x30000


@dataclass(frozen=True)
class Outcome:
    """Everything that one call of the policy produced.

    Attributes:
        originals: N samples of the reference a prompt.
        transported: N * draws texts after the last round, those of a particle side by side; ``originals`` itself for
            the empty budget.
        original_values_BN: Value of the originals.
        transported_values_BN: Value of the transported.
        nats_RBN: KL spent while decoding in each of R rounds; NaN for decoders without a distribution.
        displacement_RBN: Mean displacement of a moved token in each round, in nearest-token distances.
        selected: One response a prompt, [B, 1, T].
        selected_values_B: Its value.
        selected_index_B: Its index in the pool; below N it is an original, then follow the rounds in order.
        work: Tokens run through the models for all of this, the sampling of the originals and the prompts left out.
        one_pass: Whether the texts were drawn from the tilted distribution at once. There are no originals then:
            ``originals`` are the texts themselves.
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
    work: Work
    one_pass: bool = False

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
        sampler: Draws from the reference distribution.
        value: Differentiable value; moves the particles and selects.
        decoder: Turns moved particles into tokens; or draws transported texts in one pass, N * draws a prompt, with
            the budget's nats.
        budget: Transport budget; :meth:`TransportBudget.none` is best-of-N.
        select: ``max`` by value, ``softmax`` of value / ``budget.temperature``, or ``random`` in the pool.
        gradient: Where the flow's direction comes from; the value's exact gradient by default.
        draws: Texts decoded from each moved particle, at least 1. The first is coupled to the original, the others are
            independent; a moved particle costs a sample, a text of it no more than another sample.
        length_unit: Unit of displacement; the median nearest-token distance of the value's table when not given.
    """

    def __init__(
        self,
        sampler: Sampler,
        value: Value,
        decoder: Decoder | StreamSampler,
        budget: TransportBudget,
        *,
        select: Selection = "max",
        gradient: GradientSource = exact_gradient,
        draws: int = 1,
        length_unit: float | None = None,
    ) -> None:
        if select not in ("max", "softmax", "random"):
            raise ValueError(f"select must be max, softmax or random, got {select!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.sampler = sampler
        self.value = value
        self.decoder = decoder
        self.budget = budget
        self.selection = select
        self.gradient = gradient
        self.draws = draws
        self.length_unit = length_unit or token_spacing(value.embedding_table_VD)

    def __call__(self, prompts: list[list[int]], seeds_BN: Tensor) -> Outcome:
        """Answer B prompts with N particles each.

        Args:
            prompts: B lists of token ids.
            seeds_BN: int64, one seed a response (:func:`vgf_llm.text.noise.row_seeds`).
        """
        if isinstance(self.decoder, StreamSampler) and not self.budget.is_none:
            return self._one_pass(self.decoder, prompts, seeds_BN)
        return self.improve(self.sampler.sample(prompts, seeds_BN), seeds_BN)

    def improve(self, originals: Responses, seeds_BN: Tensor) -> Outcome:
        """Transport, decode and select, given the samples.

        Raises:
            NonFiniteError: If a value or gradient is not finite.
        """
        if self.budget.is_none:
            return self._nothing_moved(self.value.prefix(originals.prompts), originals, seeds_BN)
        if isinstance(self.decoder, StreamSampler):
            return self._one_pass(self.decoder, originals.prompts, seeds_BN)
        value_prefix = self.value.prefix(originals.prompts)
        flow, score = partial(self.transport, value_prefix), partial(self._score, value_prefix)
        context = self.decoder.prepare(originals.prompts)
        first = flow(originals)
        work = Work.of(originals.lengths_BN, value=self.passes_a_flow)
        pool, values = [originals], [first.values_BN]
        particle_BM, draw_BM = self._texts(originals)
        coupled_BM, seeds_BM = draw_BM == 0, text_seeds(seeds_BN, self.draws)
        current, state = originals.take(particle_BM), None
        known: Moved | None = first.take(particle_BM)
        nats: list[Tensor] = []
        distances: list[Tensor] = []
        for index in range(self.budget.rounds):
            if known is None:
                known = flow(current)
                work += Work.of(current.lengths_BN, value=self.passes_a_flow)
            move = Move(
                responses=current,
                moved=known,
                budget=self.budget,
                nats=self.budget.nats / self.budget.rounds,
                seeds_BN=combine_seeds(seeds_BM, _ROUND_STREAM + index),
                coupled_BN=coupled_BM,
                flow=flow,
                flow_passes=self.passes_a_flow,
                score=score,
                state=state,
            )
            distances.append(known.distance_BN)
            decoded = self.decoder.decode(context, move)
            current, known, state = decoded.responses, decoded.moved, decoded.state
            coupled_BM = torch.ones_like(coupled_BM)
            work += decoded.work
            if decoded.values_BN is None:
                work += Work.of(current.lengths_BN, value=1)
            pool.append(current)
            values.append(score(current) if decoded.values_BN is None else decoded.values_BN)
            nats.append(decoded.nats_BN)
        selected, selected_values_B, index_B = self.select(concatenate(pool), torch.cat(values, 1), seeds_BN)
        return Outcome(
            originals=originals,
            transported=current,
            original_values_BN=values[0],
            transported_values_BN=values[-1],
            nats_RBN=torch.stack(nats),
            displacement_RBN=torch.stack(distances),
            selected=selected,
            selected_values_B=selected_values_B,
            selected_index_B=index_B,
            work=work,
        )

    def _one_pass(self, stream: StreamSampler, prompts: list[list[int]], seeds_BN: Tensor) -> Outcome:
        """Draw N * draws transported texts at once, and select; nothing is sampled before."""
        seeds_BM = text_seeds(seeds_BN, self.draws)
        streamed = stream.within(self.budget).stream(prompts, seeds_BM)
        texts = streamed.responses
        values_BM = self._score(self.value.prefix(prompts), texts)
        selected, selected_values_B, index_B = self.select(texts, values_BM, seeds_BN)
        return Outcome(
            originals=texts,
            transported=texts,
            original_values_BN=values_BM,
            transported_values_BN=values_BM,
            nats_RBN=streamed.nats_BN.unsqueeze(0),
            displacement_RBN=torch.zeros_like(values_BM).unsqueeze(0),
            selected=selected,
            selected_values_B=selected_values_B,
            selected_index_B=index_B + texts.tokens_BNT.shape[1],
            work=Work.of(texts.lengths_BN, value=1 + stream.source.passes),
            one_pass=True,
        )

    @property
    def passes_a_flow(self) -> float:
        """Forward passes of the value over a response that its flow costs."""
        return self.gradient.passes * self.budget.steps

    def transport(self, value_prefix: object, responses: Responses) -> Moved:
        """Move the particles of responses by one round's flow steps."""
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
        distance_BN = lengths_BNT.sum(-1) / responses.movable_BNT.sum(-1).clamp(min=1)
        return Moved(delta_BNTD, trajectory.values_LBN[0], distance_BN)

    def _nothing_moved(self, value_prefix: object, originals: Responses, seeds_BN: Tensor) -> Outcome:
        """Best-of-N: what the empty budget comes to."""
        values_BN = self._score(value_prefix, originals)
        nothing_RBN = values_BN.new_zeros((0, *values_BN.shape))
        selected, selected_values_B, index_B = self.select(originals, values_BN, seeds_BN)
        return Outcome(
            originals=originals,
            transported=originals,
            original_values_BN=values_BN,
            transported_values_BN=values_BN,
            nats_RBN=nothing_RBN,
            displacement_RBN=nothing_RBN,
            selected=selected,
            selected_values_B=selected_values_B,
            selected_index_B=index_B,
            work=Work.of(originals.lengths_BN, value=1),
        )

    def _texts(self, originals: Responses) -> tuple[Tensor, Tensor]:
        """Return which original each of the M = N * draws texts comes from, and its number among that one's; [B, M]."""
        b, n = originals.tokens_BNT.shape[:2]
        text_BM = torch.arange(n * self.draws, device=originals.tokens_BNT.device).expand(b, -1)
        return text_BM // self.draws, text_BM % self.draws

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


def text_seeds(seeds_BN: Tensor, draws: int) -> Tensor:
    """Return the seeds of the M = N * draws texts, [B, M]: an original's own for its first text, then others."""
    draw_M = torch.arange(seeds_BN.shape[1] * draws) % draws
    seeds_BM = seeds_BN.repeat_interleave(draws, 1)
    return torch.where(draw_M == 0, seeds_BM, combine_seeds(seeds_BM, _DRAW_STREAM + draw_M))

"""The seams of the text pipeline: what a reference, a value and a decoder must offer, and what passes between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vgf_llm.errors import ConfigError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.choosing import TokenPicker
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.responses import Responses


class Prefix(Protocol):
    """R texts in the form that a reference needs them: a prompt each, and what has been written after it."""

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts' ids, one list per text."""
        ...

    def select(self, rows_R: Tensor) -> Prefix:
        """Pick texts by index (int64); they may repeat."""
        ...


class Reference(Protocol):
    """A frozen base model under a sampling distribution, wherever it runs.

    It gives the distribution before each token of given responses, their likelihood, and what the model writes when a
    picker picks the tokens. :class:`vgf_llm.text.reference.TorchReference` runs it in this process,
    :class:`vgf_llm.engines.engine_reference.EngineReference` in an engine. A prefix is read by the reference that made
    it alone.
    """

    @property
    def model(self) -> PreTrainedModel:
        """The base model. Its config and its shapes can always be read, its weights in this process alone."""
        ...

    @property
    def sampling(self) -> SamplingSettings:
        """Temperature, truncation and length."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a response."""
        ...

    @property
    def pad_id(self) -> int:
        """Id for padding, which is told by masks; it may be one of ``eos_ids``."""
        ...

    @property
    def vocabulary(self) -> int | None:
        """Tokens of the tokenizer. Rows of the model's table from there on have probability 0; None: all are tokens."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that responses and distributions are returned on."""
        ...

    @property
    def reserved_positions(self) -> int:
        """Of the model's positions, those that no text may take."""
        ...

    def prefix(self, prompts: list[list[int]]) -> Prefix:
        """Prepare B prompts, with nothing written after them."""
        ...

    def shortlists(self, prefix: Any, responses: Responses, sampling: SamplingSettings | None = None) -> Shortlist:
        """Return the distribution at every position of the responses, with the response's own token on the list.

        Args:
            prefix: The prompts of ``responses``.
            responses: N responses to each of the B prompts.
            sampling: Another distribution than the reference's own, for instance a wider top-k.

        Returns:
            A shortlist of shape [B*N, T, K + 1].
        """
        ...

    def logps(self, prefix: Any, responses: Responses) -> Tensor:
        """Return the log-probability of every token under the untruncated model at temperature 1, [B, N, T].

        Padding is 0.
        """
        ...

    def write(self, prefix: Any, num_particles: int, choose: TokenPicker) -> Responses:
        """Write responses token by token, as ``choose`` picks.

        Args:
            prefix: B prompts.
            num_particles: N responses per prompt; rows are ordered ``b * N + n``.
            choose: Picks the next token of every row, all at one position.

        Returns:
            Responses of at most ``sampling.max_new_tokens`` tokens, ended by the first EOS.
        """
        ...

    def extend(
        self, rows: Any, positions: range, choose: TokenPicker, done_R: Tensor | None = None
    ) -> tuple[Tensor, Prefix]:
        """Write more tokens after rows; stops early where all have ended.

        Args:
            rows: R texts; left as they are.
            positions: Places in the response that the tokens go to.
            choose: Picks the next token of every row, all at one position.
            done_R: bool, rows that have ended before; none when not given.

        Returns:
            The tokens [R, at most len(positions)], padding after an EOS, and the rows with them.
        """
        ...

    def rewrite(self, prefix: Any, responses: Responses, keep_BN: Tensor, choose: TokenPicker) -> Responses:
        """Keep the first tokens of each response and write the rest anew.

        Args:
            prefix: The prompts of ``responses``.
            responses: B x N responses.
            keep_BN: int64, tokens kept of each, from 0 to its length - 1.
            choose: Picks the next token of every row; rows stand at different positions.

        Returns:
            Responses of at most ``sampling.max_new_tokens`` tokens, ended by the first EOS.
        """
        ...

    def close(self) -> None:
        """Let go of what runs the model outside this process, if anything does."""
        ...


class Value(Protocol):
    """Anything that scores responses and is differentiable in their embeddings (a reward model, an ensemble)."""

    @property
    def embedding_table_VD(self) -> Tensor:
        """The input embeddings that particles live in."""
        ...

    def prefix(self, prompts: list[list[int]]) -> Any:
        """Run B prompts once; the result is handed back to :meth:`score`."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Look tokens [...] up in the table; [..., D]."""
        ...

    def score(self, prefix: Any, responses: Tensor, mask_BNT: Tensor) -> Tensor:
        """Return values [B, N] of token ids [B, N, T] or of embeddings [B, N, T, D]."""
        ...


@dataclass(frozen=True)
class Work:
    """Tokens that were run through the models, a prompt: what a result cost, independent of the machine.

    A token costs 2P FLOPs in a forward pass of a model with P parameters; a backward pass to the inputs counts as one
    more forward.

    Attributes:
        reference_B: Tokens through the reference.
        value_B: Tokens through the value.
        table_B: Tokens compared with the whole embedding table (2VD FLOPs each).
    """

    reference_B: Tensor
    value_B: Tensor
    table_B: Tensor

    @classmethod
    def none(cls, num_prompts: int) -> Work:
        """No work for any prompt."""
        return cls.of(torch.zeros(num_prompts, 1))

    @classmethod
    def of(cls, like_BN: Tensor, *, reference: float = 0, value: float = 0, table: float = 0) -> Work:
        """Count passes over responses of ``like_BN`` tokens each, summed over a prompt's responses."""
        tokens_B = like_BN.double().sum(-1).cpu()  # counts are kept on the host, wherever the responses are
        return cls(tokens_B * reference, tokens_B * value, tokens_B * table)

    def __add__(self, other: Work) -> Work:
        return Work(self.reference_B + other.reference_B, self.value_B + other.value_B, self.table_B + other.table_B)


@dataclass(frozen=True)
class Moved:
    """Where the flow carries responses.

    Attributes:
        displacement_BNTD: How far each token's embedding was moved; 0 on EOS and padding.
        values_BN: The value where the particles started.
        distance_BN: Mean displacement of a movable token, in nearest-token distances.
    """

    displacement_BNTD: Tensor
    values_BN: Tensor
    distance_BN: Tensor

    def take(self, index_BM: Tensor) -> Moved:
        """Return M particles of each prompt by their index in N (int64, [B, M])."""
        batch_B1 = torch.arange(len(index_BM), device=index_BM.device).unsqueeze(1)
        return Moved(
            self.displacement_BNTD[batch_B1, index_BM],
            self.values_BN.gather(1, index_BM),
            self.distance_BN.gather(1, index_BM),
        )

    def where(self, use_BN: Tensor, other: Moved) -> Moved:
        """Return this, and ``other`` where ``use_BN``; both are padded to the same length."""
        return Moved(
            torch.where(use_BN[..., None, None], other.displacement_BNTD, self.displacement_BNTD),
            torch.where(use_BN, other.values_BN, self.values_BN),
            torch.where(use_BN, other.distance_BN, self.distance_BN),
        )


@dataclass(frozen=True)
class Move:
    """What a decoder is asked to turn into text.

    Attributes:
        responses: Where the particles started: B x N responses.
        moved: Where the flow carried them.
        budget: Nats, their cap a token, and the temperature of the target.
        nats: KL budget of each response for this decode, at least 0; for decoders with a distribution along the path.
        seeds_BN: int64, one seed a response, for the decoder's own noise.
        coupled_BN: bool; where False a further, independent text is drawn from the same moved particle.
        flow: Moves other responses to the same prompts, as ``responses`` were moved.
        flow_passes: Forward passes of the value over a response that ``flow`` costs.
        score: Scores other responses to the same prompts, [B, N].
        state: What the decoder handed on in its last round; None in the first.
    """

    responses: Responses
    moved: Moved
    budget: TransportBudget
    nats: float
    seeds_BN: Tensor
    coupled_BN: Tensor
    flow: Callable[[Responses], Moved]
    flow_passes: float
    score: Callable[[Responses], Tensor]
    state: Any = None

    @property
    def displacement_BNTD(self) -> Tensor:
        """How far the flow moved each token's embedding."""
        return self.moved.displacement_BNTD


@dataclass(frozen=True)
class Decoded:
    """What came of a move.

    Attributes:
        responses: The new texts, N a prompt, in the same order.
        nats_BN: KL between the decoder's distribution and the reference's, summed along the path that was written; NaN
            where the decoder has no distribution (``nearest``) or its distribution is not written left to right
            (``edit``, ``pivot``).
        work: Tokens that decoding ran through the models.
        values_BN: The value of the new texts, where the decoder knows it.
        moved: Where the flow carries the new texts, where the decoder knows it.
        state: Handed back in the next round.
    """

    responses: Responses
    nats_BN: Tensor
    work: Work
    values_BN: Tensor | None = None
    moved: Moved | None = None
    state: Any = None


def check_no_kernel(decoder: str, budget: TransportBudget) -> None:
    """Refuse a kernel where a test has to take the same direction back.

    Raises:
        ConfigError: If the budget's particles interact: a response's direction then depends on the others'.
    """
    if budget.kernel != "none":
        raise ConfigError(
            f"the decoder {decoder!r} needs budget.kernel none, got {budget.kernel!r}: its test of acceptance holds "
            "for a direction that depends on the response alone; use prior or block with a kernel"
        )


class Decoder(Protocol):
    """Turns moved particles into tokens."""

    def prepare(self, prompts: list[list[int]]) -> Any:
        """Compute once per prompt what all rounds and particles share."""
        ...

    def decode(self, context: Any, move: Move) -> Decoded:
        """Write the moved responses.

        For decoders that write along the displacement (``prior``, ``block``, ``nearest``) a zero displacement gives
        coupled responses back token for token; those that accept by value (``edit``, ``edit_greedy``, ``pivot``) go on
        without a direction. ``nats`` is read by the first two alone.
        """
        ...

"""Assembles the implicit policy from its parts: all that asks a policy for answers gets it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from vgf_llm.answering.implicit_policy import ImplicitPolicy, Selection
from vgf_llm.answering.one_pass import Directions, stream_sampler
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import DecoderName
from vgf_llm.text.decoders.make import make_decoder
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.protocols import Decoder, Reference, Value
from vgf_llm.text.sampler import ReferenceSampler, Sampler
from vgf_llm.text.stream import StreamSampler

Policy = TypeVar("Policy", bound=ImplicitPolicy)


def make_policy(
    kind: type[Policy],
    reference: Reference,
    value: Value,
    budget: TransportBudget,
    decoder: DecoderName = "prior",
    decoder_options: Mapping[str, Any] | None = None,
    *,
    draws: int = 1,
    select: Selection = "max",
    gradient: GradientSource = exact_gradient,
    length_unit: float | None = None,
    sampler: Sampler | None = None,
    directions: Directions | None = None,
) -> Policy:
    """Return the policy that a reference, a value and a budget imply.

    Args:
        kind: :class:`ImplicitPolicy`, or one of its kind.
        reference: The base model and its distribution: the decoder writes with it, and the sampler unless another one
            is given.
        value: Moves the particles and selects.
        budget: Transport budget; the empty one is best-of-N.
        decoder: Name of the decoder.
        decoder_options: Its options by name.
        draws: Texts decoded from each moved particle, at least 1.
        select: The response returned: ``max`` by value, ``softmax`` of value / ``budget.temperature``, ``random``.
        gradient: Source of the flow's direction; the value's exact gradient by default.
        length_unit: Unit of displacement; measured on the value's table when not given, which takes a moment.
        sampler: Draws the originals; from the reference by default.
        directions: Where the bonus of the decoder ``stream`` comes from; the value's lookahead when not given.

    Raises:
        ConfigError: If the decoder has no such option, or the option no such value.
    """
    writes: Decoder | StreamSampler
    if decoder == "stream":
        writes = stream_sampler(reference, value, budget, decoder_options, directions)
    else:
        writes = make_decoder(decoder, reference, value, decoder_options)
    return kind(
        sampler or ReferenceSampler(reference),
        value,
        writes,
        budget,
        select=select,
        gradient=gradient,
        draws=draws,
        length_unit=length_unit,
    )

"""Decoders by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from vgf_llm.errors import ConfigError
from vgf_llm.settings import DecoderName
from vgf_llm.text.decoders.block import BlockDecoder
from vgf_llm.text.decoders.edit import EditDecoder
from vgf_llm.text.decoders.edit_greedy import EditGreedyDecoder
from vgf_llm.text.decoders.nearest import NearestDecoder
from vgf_llm.text.decoders.pivot import PivotDecoder
from vgf_llm.text.decoders.prior import PriorDecoder
from vgf_llm.text.protocols import Decoder, Reference, Value


def _nearest(reference: Reference, table_VD: Tensor) -> Decoder:
    return NearestDecoder(table_VD, (*reference.eos_ids, reference.pad_id), reference.vocabulary)


def _stream(reference: Reference, table_VD: Tensor) -> Decoder:
    raise ConfigError("the decoder 'stream' writes in one pass, without an original; this decodes moved responses")


_MAKERS: dict[DecoderName, Callable[..., Decoder]] = {
    "prior": PriorDecoder,
    "stream": _stream,
    "block": BlockDecoder,
    "edit": EditDecoder,
    "edit_greedy": EditGreedyDecoder,
    "pivot": PivotDecoder,
    "nearest": _nearest,
}
"""(reference, table_VD, *, options) -> decoder."""


def make_decoder(
    name: DecoderName, reference: Reference, value: Value, options: Mapping[str, Any] | None = None
) -> Decoder:
    """Return the decoder of that name.

    Raises:
        ConfigError: If it has no such option, or the option no such value.
    """
    maker, options = _MAKERS[name], dict(options or {})
    known = [key for key, one in signature(maker).parameters.items() if one.kind is Parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"decoder_options: the decoder {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    try:
        return maker(reference, value.embedding_table_VD, **options)
    except (ValueError, TypeError) as error:  # out of range, or of another type
        raise ConfigError(f"decoder_options {options} of {name!r}: {error}") from error

"""Decoders: from moved particles back to tokens, behind the protocol of :mod:`vgf_llm.text.protocols`."""

from vgf_llm.text.decoders.nearest import NearestDecoder
from vgf_llm.text.decoders.prior import PriorDecoder

__all__ = ["NearestDecoder", "PriorDecoder"]

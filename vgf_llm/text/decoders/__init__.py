"""Decoders: from moved particles back to tokens, behind the protocol of :mod:`vgf_llm.text.protocols`."""

from vgf_llm.text.decoders.block import BlockDecoder
from vgf_llm.text.decoders.edit import EditDecoder
from vgf_llm.text.decoders.edit_greedy import EditGreedyDecoder
from vgf_llm.text.decoders.nearest import NearestDecoder
from vgf_llm.text.decoders.pivot import PivotDecoder
from vgf_llm.text.decoders.prior import PriorDecoder

__all__ = ["BlockDecoder", "EditDecoder", "EditGreedyDecoder", "NearestDecoder", "PivotDecoder", "PriorDecoder"]

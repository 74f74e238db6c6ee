"""Text as particles: the reference's law, responses and their embeddings, decoders, and the implicit policy."""

from vgf_llm.text.decoders import (
    BlockDecoder,
    EditDecoder,
    EditGreedyDecoder,
    NearestDecoder,
    PivotDecoder,
    PriorDecoder,
)
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.protocols import Decoded, Decoder, Move, Moved, Value, Work
from vgf_llm.text.reference import Reference
from vgf_llm.text.responses import Responses

__all__ = [
    "BlockDecoder",
    "Decoded",
    "Decoder",
    "EditDecoder",
    "EditGreedyDecoder",
    "Move",
    "Moved",
    "NearestDecoder",
    "PivotDecoder",
    "PriorDecoder",
    "Reference",
    "Responses",
    "Value",
    "Work",
    "row_seeds",
]

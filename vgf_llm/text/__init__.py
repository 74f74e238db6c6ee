"""Text as particles: the reference's distribution, responses and their embeddings, and decoders."""

from vgf_llm.text.decoders import (
    BlockDecoder,
    EditDecoder,
    EditGreedyDecoder,
    NearestDecoder,
    PivotDecoder,
    PriorDecoder,
)
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.protocols import Decoded, Decoder, Move, Moved, Reference, Value, Work
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.stream import Steering, StreamSampler

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
    "ReferenceSampler",
    "Responses",
    "Steering",
    "StreamSampler",
    "TorchReference",
    "Value",
    "Work",
    "row_seeds",
]

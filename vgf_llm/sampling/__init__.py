"""Sampling: one protocol, and the backends behind it."""

from vgf_llm.sampling.protocol import Sampler
from vgf_llm.sampling.transformers_sampler import TransformersSampler

__all__ = ["Sampler", "TransformersSampler"]

"""Sampling: one protocol, and the backends behind it."""

from vgf_llm.sampling.protocol import Sampler
from vgf_llm.sampling.reference_sampler import ReferenceSampler

__all__ = ["Sampler", "ReferenceSampler"]

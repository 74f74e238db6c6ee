"""Old name of :mod:`vgf_llm.engines.vllm_processor`, kept for one release: servers are given it by name."""

from vgf_llm.engines.vllm_processor import PlanProcessor

__all__ = ["PlanProcessor"]

"""Old name of :mod:`vgf_llm.engines.vllm_worker`, kept for one release: servers are given it by name."""

from vgf_llm.engines.vllm_worker import FolderWorker

__all__ = ["FolderWorker"]

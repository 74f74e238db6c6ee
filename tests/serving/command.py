"""``vgf-llm serve`` on the tiny models, as its users run it: a process of its own, the engine in a process of that."""

from __future__ import annotations

import httpx

from benchmarks.serving_process import served
from vgf_llm.engines.vllm_env import IN_OWN_PROCESS, UNBOUND_THREADS

ENVIRONMENT = {**IN_OWN_PROCESS, **UNBOUND_THREADS}


def serve(models, *flags):
    """The command on a free port, once it listens."""
    own = [
        "--model_name_or_path", models.model_name_or_path, "--reward_model", models.reward_model, "--device", "cpu",
        "--served_name", "tiny", "--top_k", "12", "--max_new_tokens", "8", "--engine.kv_cache_gib", "0.05",
        "--engine.eager", "true",
    ]  # fmt: skip
    return served([*own, *flags], ENVIRONMENT)


def client(server):
    return httpx.Client(base_url=server.url, timeout=120)

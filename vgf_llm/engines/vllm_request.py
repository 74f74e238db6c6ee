"""What both ways of asking vLLM share: the names that it knows this package's parts by, and a request's fields."""

from __future__ import annotations

from typing import Any

from vgf_llm.engines.engine import EngineRequest, engine_seed
from vgf_llm.text.plans import distribution_rule

PROCESSOR = "vgf_llm.engines.vllm_processor:PlanProcessor"
WORKER = "vgf_llm.engines.vllm_worker.FolderWorker"
PLAN_ARGUMENT = "vgf_plan"
"""Argument beyond vLLM's own that carries a plan."""


def request_fields(request: EngineRequest) -> dict[str, Any]:
    """Return the fields of a request that vLLM's Python and its HTTP interface call by the same name.

    A plan picks tokens by setting all other logits to -inf, so temperature 0 takes them; a request without a
    distribution is greedy too. Whatever ends a text is named, the model's own EOS is not.
    """
    own = request.sampling
    fields: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stop_token_ids": list(request.eos_ids),
        "stop": list(request.stop),
        "ignore_eos": True,
        "logit_bias": request.logit_bias,
        "prompt_logprobs": request.prompt_logprobs,
    }
    if request.plan is None and own is not None:
        fields |= {**distribution_rule(own), "seed": engine_seed(request.seed)}
    return fields

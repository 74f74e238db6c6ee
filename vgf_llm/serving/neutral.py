"""Fields of a request that ask for nothing: taken out before the rest is checked.

Clients send OpenAI's and vLLM's fields with the values that mean "as usual", and ``null`` for whatever is unset. Such a
value passes whether or not this server does what the field is about; any other value is refused by name.
"""

from __future__ import annotations

from typing import Any

_NULL = (None,)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": _NULL,
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "max_completion_tokens": _NULL,
    "max_tokens": _NULL,
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": _NULL,
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": _NULL,
    "presence_penalty": (0,),
    "prompt_cache_retention": _NULL,
    "reasoning_effort": _NULL,
    "response_format": ({"type": "text"},),
    "seed": _NULL,
    "service_tier": ("auto", "default"),
    "stop": ("", []),
    "store": (False,),
    "stream": (False,),
    "stream_options": _NULL,
    "suffix": ("",),
    "temperature": _NULL,
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": _NULL,
    "user": _NULL,
    "verbosity": _NULL,
    "web_search_options": _NULL,
    # notes for OpenAI's own abuse reports and caches, without effect on the answer
    "prompt_cache_key": _NULL,
    "safety_identifier": _NULL,
    # vLLM's
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": _NULL,
    "bad_words": ([],),
    "cache_salt": _NULL,
    "chat_template": _NULL,
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "guided_choice": _NULL,
    "guided_decoding_backend": _NULL,
    "guided_grammar": _NULL,
    "guided_json": _NULL,
    "guided_regex": _NULL,
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": _NULL,
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": _NULL,
    "prompt_logprobs": _NULL,
    "repetition_penalty": (1,),
    "request_id": _NULL,
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": _NULL,
    "thinking_token_budget": _NULL,
    "top_k": _NULL,
    "transport": _NULL,
    "truncate_prompt_tokens": _NULL,
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
OF_A_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": _NULL,
    "function_call": _NULL,
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": _NULL,
    "tool_calls": ([],),
}
OF_A_PART: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "cache_control": _NULL,
    "image_url": _NULL,
    "input_audio": _NULL,
}


def without_neutral(body: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """Return an object without the fields whose values ask for nothing; whatever is not an object as it is.

    Args:
        body: Parsed JSON.
        neutral: Values that ask for nothing, by field; ``null`` does for each of them.
    """
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if not _asks_for_nothing(name, value, neutral)}


def _asks_for_nothing(name: str, value: Any, neutral: dict[str, tuple[Any, ...]]) -> bool:
    if name not in neutral:
        return False
    if value is None:
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral[name])

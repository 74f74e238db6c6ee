"""The gold column of the Pythia recipes: a second reward model, trained with another seed, as a Python reward function.

It has seen the same data as the first one, so it is a held-out proxy and no gold: it shows over-optimisation of one
model's own faults, not of what both get wrong.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from vgf_llm.data import encode_prompt, encode_response

_ROWS = 16  # responses a forward


def tldr(prompts: list[str], responses: list[str]) -> list[float]:
    """Score summaries by the model in outputs/pythia_tldr/held_out."""
    return score("outputs/pythia_tldr/held_out", prompts, responses)


def hh(prompts: list[str], responses: list[str]) -> list[float]:
    """Score answers by the model in outputs/pythia_hh/held_out."""
    return score("outputs/pythia_hh/held_out", prompts, responses)


@torch.no_grad()
def score(folder: str | Path, prompts: list[str], responses: list[str]) -> list[float]:
    """Score responses by a trained reward model.

    Args:
        folder: its output_dir.
        prompts: one a response.
        responses: plain text.

    Returns:
        One reward a response.
    """
    model, tokenizer = _load(str(folder))
    rows = [
        encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response, eos=True)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    rewards: list[float] = []
    for start in range(0, len(rows), _ROWS):
        padded = tokenizer.pad({"input_ids": rows[start : start + _ROWS]}, return_tensors="pt").to(model.device)
        rewards += model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).tolist()
    return rewards


@functools.cache
def _load(folder: str) -> tuple[Any, Any]:
    from reward_models import load_reward_model
    from vgf_llm.models import load_tokenizer

    cuda = torch.cuda.is_available()
    model = load_reward_model(folder, dtype=torch.bfloat16 if cuda else torch.float32, device="cuda" if cuda else "cpu")
    return model, load_tokenizer(folder)

"""A reward model of another tokenizer as a reward function: it reads texts, in its own tokens and chat template.

Its gradient is of no use in the policy's token space; a value learned from its rewards is what moves particles.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from reward_models.loading import TOKENIZER_NAMES, load_reward_model
from reward_models.modelling import RewardModel
from reward_models.pairs import stack_rows
from vgf_llm.data import encode_prompt, encode_response
from vgf_llm.models import fingerprint, load_tokenizer

_ROWS = 32  # responses scored in one forward


class ForeignReward:
    """Score texts with a reward model and its own tokenizer; called like any reward function.

    Args:
        model: Frozen.
        tokenizer: The one it was trained with.
    """

    def __init__(self, model: RewardModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.__name__ = type(model).__name__

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one reward a response; each response is read as ended by EOS."""
        rows = [
            (encode_prompt(self.tokenizer, prompt), encode_response(self.tokenizer, response, eos=True))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        rewards: list[float] = []
        for start in range(0, len(rows), _ROWS):
            batch = stack_rows(rows[start : start + _ROWS], self.tokenizer.pad_token_id)
            rewards += self.model(**{name: tensor.to(self.model.device) for name, tensor in batch.items()}).tolist()
        return rewards


def foreign_reward(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, device: str | torch.device, dtype: torch.dtype
) -> ForeignReward | None:
    """Return a folder's model as a function of texts where its tokenizer is not the policy's, else None.

    Raises:
        ModelError: The model cannot be loaded.
    """
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_NAMES):
        return None
    own = load_tokenizer(str(folder))
    if fingerprint(own) == fingerprint(tokenizer):
        return None
    return ForeignReward(load_reward_model(folder, tokenizer=own, dtype=dtype, device=device), own)

"""Rewards as substitutions need them: asked for token ids, one prompt at a time, and counted.

`reward_models.fidelity.exact_changes` asks a reward model for `prefix` and `score`. A Python function, or a model of
another tokenizer, reads texts: :class:`CalledReward` decodes the ids and offers the same two methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.foreign import foreign_reward
from reward_models.functions import RewardFunction, call_function, load_function
from reward_models.loading import load_reward_model
from vgf_llm.data.dialogue import PromptText
from vgf_llm.data.encoding import EncodedPrompt


class TextPrompt(EncodedPrompt):
    """Token ids of a prompt with its text and the other columns of its row.

    Attributes:
        text: As reward functions read it.
    """

    text: PromptText

    def __init__(self, ids: Sequence[int], text: PromptText) -> None:
        """Keep the text with its ids."""
        super().__init__(ids, text.prompt)
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickling."""
        return TextPrompt, (list(self), self.text)


class CountedReward(Protocol):
    """A reward of token ids.

    Attributes:
        calls: Responses that were scored so far.
    """

    calls: int

    def prefix(self, prompts: Sequence[Any]) -> Any:
        """Prepare B prompts; the result is handed back to :meth:`score` and has ``select(rows_R)``."""
        ...

    def score(self, prefix: Any, tokens_BNT: Tensor, mask_BNT: Tensor) -> Tensor:
        """Return the rewards [B, N], float32, of token ids [B, N, T], right padded."""
        ...


@dataclass(frozen=True)
class CalledPrompts:
    """Prompts of a function: their texts."""

    texts: list[PromptText]

    def select(self, rows_R: Tensor) -> CalledPrompts:
        """Pick prompts by index (int64); they may repeat."""
        return CalledPrompts([self.texts[row] for row in rows_R.tolist()])


class CalledReward:
    """Ask a function of texts for the rewards of token ids; a text that comes twice in a batch is asked for once.

    Args:
        function: Called as ``function(prompts, responses)``.
        tokenizer: Decodes responses, special tokens dropped.
    """

    def __init__(self, function: RewardFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self.function, self.tokenizer, self.calls = function, tokenizer, 0

    def prefix(self, prompts: Sequence[TextPrompt]) -> CalledPrompts:
        """Return the prompts' texts."""
        return CalledPrompts([prompt.text for prompt in prompts])

    def score(self, prefix: CalledPrompts, tokens_BNT: Tensor, mask_BNT: Tensor) -> Tensor:
        """Return the function's rewards [B, N].

        Raises:
            ModelError: The function raises, or returns something else than finite numbers.
        """
        B, N, _ = tokens_BNT.shape
        mask_BNT = mask_BNT.bool().expand_as(tokens_BNT)
        rows = zip(tokens_BNT.flatten(0, 1).tolist(), mask_BNT.flatten(0, 1).tolist(), strict=True)
        kept = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        pairs = [(index // N, text) for index, text in enumerate(texts)]
        new = list(dict.fromkeys(pairs))
        self.calls += len(new)
        rewards = call_function(self.function, [prefix.texts[b] for b, _ in new], [text for _, text in new])
        known = dict(zip(new, rewards, strict=True))
        return torch.tensor([known[pair] for pair in pairs], device=tokens_BNT.device).view(B, N)


class ModelReward:
    """Count what a reward model of the reference's tokens is asked.

    Args:
        value: A reward model or ensemble.
    """

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def prefix(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Run B prompts once."""
        return self.value.prefix(prompts)

    def score(self, prefix: Any, tokens_BNT: Tensor, mask_BNT: Tensor) -> Tensor:
        """Return the model's rewards [B, N]."""
        self.calls += tokens_BNT.shape[0] * tokens_BNT.shape[1]
        scores: Tensor = self.value.score(prefix, tokens_BNT, mask_BNT.expand_as(tokens_BNT)).float()
        return scores


def read_reward(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device = "cpu",
    outputs: Mapping[str, float] | None = None,
) -> CountedReward:
    """Load a reward by name: a folder is a reward model or classifier, anything else a Python function.

    Args:
        name: A folder, ``module:function``, or a function of `reward_models.functions`.
        tokenizer: The reference's. A model of another tokenizer is asked for texts.
        device: Where a model goes; its parameters are float32, because changes are small.
        outputs: Weights of the outputs of a model with several.

    Raises:
        ConfigError: There is no such function.
        ModelError: The model cannot be loaded.
    """
    if not Path(name).is_dir():
        return CalledReward(load_function(name), tokenizer)
    foreign = foreign_reward(name, tokenizer, device, torch.float32, outputs)
    if foreign is not None:
        return CalledReward(foreign, tokenizer)
    return ModelReward(load_reward_model(name, tokenizer=tokenizer, device=device, outputs=outputs))

"""Classifiers as reward functions: text in, score out, in their own tokenizer; encoders too, and several outputs.

Nothing here is differentiable. A classifier reads the conversation under its own chat template, answer included.
Without one an encoder reads prompt and response as a pair, and a decoder reads them as one text that ends in EOS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.classification import output_names, own_tokenizer, read_classifier
from reward_models.outputs import output_weights
from reward_models.sources import imported_outputs, shown_name
from vgf_llm.data.dialogue import PromptText, as_messages, as_text
from vgf_llm.errors import DataError
from vgf_llm.models.architecture import max_positions
from vgf_llm.runs.files import shorten

_ROWS = 32  # conversations scored in one forward


class ClassifierReward:
    """Score texts with a classifier; called like any reward function.

    Args:
        model: Frozen, in eval mode.
        tokenizer: Its own.
        weights_K: Weight of each output.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights_K: Tensor) -> None:
        self.model, self.tokenizer, self.weights_K = model, tokenizer, weights_K
        self.is_encoder = not hasattr(model, "score")
        self.__name__ = type(model).__name__

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one reward per response.

        Raises:
            DataError: A conversation is longer than the model's positions, or the template refuses it.
        """
        rows = [self._encoded(*pair) for pair in zip(prompts, responses, strict=True)]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        rewards = [0.0] * len(rows)
        for start in range(0, len(rows), _ROWS):
            chosen = order[start : start + _ROWS]
            for index, reward in zip(chosen, self._scores([rows[index] for index in chosen]), strict=True):
                rewards[index] = reward
        return rewards

    def _scores(self, rows: list[dict[str, list[int]]]) -> list[float]:
        """Score rows in one forward, padded on the right; one by one where the model knows no padding token."""
        pad_id = self.model.config.pad_token_id
        if pad_id is None and len(rows) > 1:
            return [score for row in rows for score in self._scores([row])]
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": pad_id or 0, "attention_mask": 0, "token_type_ids": 0}
        batch = {
            name: torch.tensor(
                [row[name] + [value] * (longest - len(row[name])) for row in rows], device=self.model.device
            )
            for name, value in fill.items()
            if name in rows[0]
        }
        logits: Tensor = self.model(**batch).logits.float()
        if logits.dim() == 3:  # a token classifier: its outputs at the last token
            last_R = batch["attention_mask"].sum(dim=1) - 1
            logits = logits[torch.arange(len(rows), device=logits.device), last_R]
        found: list[float] = (logits @ self.weights_K.to(logits.device)).tolist()
        return found

    def _encoded(self, prompt: str, response: str) -> dict[str, list[int]]:
        row = self._tokens(PromptText(prompt).prompt, response)
        limit, length = max_positions(self.model.config), len(row["input_ids"])
        if limit is not None and length > limit:
            raise DataError(
                f"reward model {self.__name__}: the prompt {shorten(repr(prompt))} with its response has {length} "
                f"tokens in its own tokenizer, and the model {limit} positions; shorten the prompts, lower "
                "max_new_tokens, or name another reward model"
            )
        return row

    def _tokens(self, prompt: Any, response: str) -> dict[str, list[int]]:
        tokenizer: Any = self.tokenizer
        if tokenizer.chat_template:
            talk = [*as_messages(prompt), {"role": "assistant", "content": response}]
            try:
                text = tokenizer.apply_chat_template(talk, tokenize=False)
            except Exception as error:  # jinja2 raises several types; all mean a refused conversation
                raise DataError(
                    f"reward model {self.__name__}: its chat template refuses {shorten(repr(talk), 200)}: {error}"
                ) from error
            found = tokenizer(text, add_special_tokens=False)
        elif self.is_encoder:
            found = tokenizer(as_text(prompt), response)
        else:
            found = _with_eos(tokenizer(as_text(prompt) + response), tokenizer.eos_token_id)
        return {name: list(ids) for name, ids in found.items()}


def _with_eos(row: Mapping[str, list[int]], eos_id: int) -> dict[str, list[int]]:
    """End a row of ids, and what goes with them, in EOS, once."""
    if row["input_ids"][-1:] == [eos_id]:
        return dict(row)
    more = {"input_ids": eos_id, "attention_mask": 1, "token_type_ids": 0}
    return {name: [*values, more[name]] for name, values in row.items()}


def classifier_reward(
    folder: str | Path,
    outputs: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variables: Mapping[str, Any] | None = None,
) -> ClassifierReward:
    """Load a classifier as a function of texts.

    Args:
        folder: Of the classifier.
        outputs: Weights of its outputs, by name or number.
        device: Where it goes.
        dtype: Of its parameters.
        variables: Of the policy's chat template; the classifier's own takes those that it reads.

    Raises:
        ModelError: It cannot be loaded.
        ConfigError: It has several outputs and no weights, or a weight of an output that there is not.
    """
    model: Any = read_classifier(folder, dtype)
    weights_K = output_weights(output_names(model), outputs or imported_outputs(folder), f"'{shown_name(folder)}'")
    return ClassifierReward(model.to(device), own_tokenizer(folder, variables), weights_K)

"""A reward model of another tokenizer as a reward function: it reads texts, in its own tokens and chat template.

Its gradient is of no use in the policy's token space; a value learned from its rewards is what moves particles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reward_models.called import ClassifierReward, classifier_reward
from reward_models.calling import CalledReward
from reward_models.classification import classifier_class, is_decoder, own_tokenizer, same_ids
from reward_models.composed import ComposedReward
from reward_models.functions import RewardFunction, load_function
from reward_models.grammar import Part, is_composed, read_composed
from reward_models.inputs import called_part
from reward_models.loading import TOKENIZER_NAMES, load_reward_model, outputs_of
from reward_models.modelling import RewardModel
from reward_models.pairs import stack_rows
from reward_models.sources import imported_outputs, local_folder, shown_name
from vgf_llm.data.dialogue import PromptText
from vgf_llm.data.encoding import encode_prompt, encode_response, template_variables
from vgf_llm.data.endings import check_ids, padding_id
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.models.architecture import max_positions
from vgf_llm.models.loading import fingerprint, load_tokenizer
from vgf_llm.runs.files import shorten
from vgf_llm.settings import RewardCallSettings

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
        """Return one reward per response, closed as the model's own template closes the assistant's turn.

        A prompt of several turns (:class:`vgf_llm.data.dialogue.PromptText`) is read as its messages.

        Raises:
            DataError: Prompt and response are longer than the model, or hold a token that it has no row for.
        """
        rows = [self._encoded(*pair) for pair in zip(prompts, responses, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(rows), _ROWS):
            batch = stack_rows(rows[start : start + _ROWS], self._padding)
            rewards += self.model(**{name: tensor.to(self.model.device) for name, tensor in batch.items()}).tolist()
        return rewards

    @property
    def _padding(self) -> int:
        return padding_id(self.tokenizer, len(self.model.embedding_table_VD))

    def _encoded(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        ids = encode_prompt(self.tokenizer, PromptText(prompt).prompt)
        answer = encode_response(self.tokenizer, response, eos=True)
        where = f"reward model {self.__name__}: the prompt {shorten(repr(prompt))} with its response"
        check_ids(self.tokenizer, [*ids, *answer], len(self.model.embedding_table_VD), where)
        most, length = max_positions(self.model.body.config), len(ids) + len(answer)
        if most is not None and length > most:
            raise DataError(
                f"{where} has {length} tokens in its own tokenizer and chat template, and the model {most} positions; "
                "shorten the prompts, lower max_new_tokens, or name another reward model"
            )
        return ids, answer


def foreign_reward(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    dtype: torch.dtype,
    outputs: Mapping[str, float] | None = None,
) -> ForeignReward | ClassifierReward | None:
    """Return a folder's model as a function of texts where its tokenizer is not the policy's, else None.

    An encoder is such a function whatever its tokenizer. The model's own template takes those variables that are fixed
    in the policy's and that it reads.

    Raises:
        ModelError: The model cannot be loaded.
        ConfigError: As for :func:`reward_models.outputs.output_weights`.
    """
    if classifier_class(folder) is not None:
        if is_decoder(folder) and same_ids(load_tokenizer(str(folder)), tokenizer):
            return None
        return classifier_reward(folder, outputs, device, dtype, template_variables(tokenizer))
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_NAMES):
        return None
    own = load_tokenizer(str(folder))
    if fingerprint(own) == fingerprint(tokenizer):
        return None
    model = load_reward_model(folder, tokenizer=own, dtype=dtype, device=device, outputs=outputs)
    return ForeignReward(model, own_tokenizer(folder, template_variables(tokenizer)))


def text_reward(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    calls: RewardCallSettings | None = None,
    variables: Mapping[str, Any] | None = None,
) -> RewardFunction:
    """Return a scorer of texts by name.

    Args:
        name: A Python function, a folder's reward model with its own tokenizer, or a YAML file that composes them.
        device: Of models.
        dtype: Of models.
        calls: How functions and servers are called; None: plainly, without a cache.
        variables: Of the policy's chat template; a model's own takes those that it reads.

    Raises:
        ConfigError: There is no such function, the file is wrong, or the model has several outputs.
        ModelError: The model cannot be loaded.
    """
    if is_composed(name):

        def scorer(part: Part) -> RewardFunction:
            if part.reward is not None and Path(part.reward).is_dir():
                return text_reward(part.reward, device, dtype, calls, variables)
            return called_part(part, calls)

        return ComposedReward(read_composed(name), scorer, name)
    name = local_folder(name)
    if not Path(name).is_dir():
        return CalledReward(load_function(name), calls, name=name)
    _check_one_output(name)
    if classifier_class(name) is not None:
        return classifier_reward(name, None, device, dtype, variables)
    model = load_reward_model(name, tokenizer=load_tokenizer(name), dtype=dtype, device=device)
    return ForeignReward(model, own_tokenizer(name, variables))


def _check_one_output(folder: str) -> None:
    """Refuse a model with several outputs where their weights cannot be given.

    Raises:
        ConfigError: Naming the model and its outputs.
    """
    names = outputs_of(folder)
    if len(names) > 1 and not imported_outputs(folder):
        advice = "name a model with one output"
        if classifier_class(folder) is not None:
            advice += ", or a folder of `vgf-llm import-reward --reward_outputs`, which keeps weights"
        raise ConfigError(
            f"'{shown_name(folder)}' has {len(names)} outputs ({', '.join(names)}), and a gold reward or a part of a "
            f"composed one takes no weights; {advice}"
        )

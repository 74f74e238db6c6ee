"""Loads what every transporting command needs: the reference, the value, and proof that they speak the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.loading import load_reward_model
from reward_models.modelling import RewardModel
from reward_models.secant import FACTS_NAME, load_secant_head, secant_gradient
from reward_models.sources import local_folder, shown_name
from vgf_llm.console.screen import say
from vgf_llm.data.dialogue import Prompt, PromptText
from vgf_llm.data.encoding import encode_prompts as encode
from vgf_llm.engines.backend import Backend
from vgf_llm.engines.transformers_backend import TransformersBackend
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.machine.device import resolve_device
from vgf_llm.machine.precision import with_dtype
from vgf_llm.models.architecture import decoder_layers, input_table, max_positions
from vgf_llm.models.base import tokenizer_of
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.protocols import Reference, Value
from vgf_llm.text.reference import TorchReference

R_co = TypeVar("R_co", bound=Reference, covariant=True)


@dataclass(frozen=True)
class Pipeline(Generic[R_co]):
    """A reference, a value in the same token space with its gradient, and their tokenizer.

    The gradient is the reward model's secant head where its folder has one, else the exact one.
    """

    reference: R_co
    value: RewardModel
    tokenizer: PreTrainedTokenizerBase
    gradient: GradientSource

    def close(self) -> None:
        """Let go of the engine, where there is one."""
        self.reference.close()


@overload
def load_pipeline(models: ModelSettings, sampling: SamplingSettings) -> Pipeline[TorchReference]: ...


@overload
def load_pipeline(models: ModelSettings, sampling: SamplingSettings, backend: Backend[R_co]) -> Pipeline[R_co]: ...


def load_pipeline(
    models: ModelSettings, sampling: SamplingSettings, backend: Backend[Any] | None = None
) -> Pipeline[Any]:
    """Load the base model and the reward model.

    Args:
        models: Their names, dtype and device.
        sampling: The reference distribution.
        backend: Runs the base model; transformers in this process by default.

    Raises:
        ConfigError: If no reward model is named.
        ModelError: If one cannot be loaded, the reward model's tokenizer or template differs from the base's, or its
            embedding table is smaller than the vocabulary.
        VGFError: If the backend does not start.
    """
    folder = models.reward_model
    if folder is None:
        raise ConfigError("reward_model is not set; train one with `vgf-llm reward` and name its folder")
    folder = local_folder(folder)
    if not Path(folder).is_dir():
        raise ModelError(
            f"reward_model {folder!r} is not a folder; train one with `vgf-llm reward` and name its folder"
        )
    models = with_dtype(models)
    device, dtype = resolve_device(models.device), getattr(torch, models.dtype)
    tokenizer = tokenizer_of(models)
    value = load_reward_model(
        folder, tokenizer=tokenizer, dtype=dtype, device=device, outputs=models.reward_outputs or None
    )
    backend = backend or TransformersBackend()
    base, table_VD = backend.load(models, tokenizer, device), value.embedding_table_VD
    check_table(value, tokenizer, base.rows)
    tell_other_table(value, base.lm, shown_name(folder))
    gradient = load_gradient(folder, value)  # what can fail comes before an engine is started
    reference = backend.start(base.within(len(table_VD)), models, sampling, table_VD)
    return Pipeline(reference, value, tokenizer, gradient)


def check_table(value: Value, tokenizer: PreTrainedTokenizerBase, base_rows: int) -> int:
    """Return the tokens that base and value share: a tokenizer may hold tokens without a row, and a table padding.

    Raises:
        ModelError: If the value's table is shorter than both the tokenizer and the base model's table.
    """
    vocabulary, own = min(len(tokenizer), base_rows), len(value.embedding_table_VD)
    if own < vocabulary:
        raise ModelError(
            f"the reward model's table has {own} tokens, the tokenizer {len(tokenizer)} (base model: {base_rows}); "
            "train the reward model on this base model"
        )
    return vocabulary


def tell_other_table(value: RewardModel, base: PreTrainedModel, folder: str) -> None:
    """Say on standard error that the value's input embeddings are not the base's, though training left them alone.

    Moves are not wrong then: they are made in the value's own table, and tilt the base by token id. But the value was
    made from another base, so its rewards are of other responses.

    Args:
        value: The reward model.
        base: The base model; one without weights is not compared.
        folder: Of the reward model, for the message.
    """
    own_VD, base_VD = input_table(value), input_table(base)
    if base_VD.is_meta or value.config.train_embeddings:
        return
    rows = min(len(own_VD), len(base_VD))
    if own_VD.shape[1] == base_VD.shape[1] and torch.equal(own_VD[:rows], base_VD[:rows]):
        return
    say(
        f"WARNING: '{folder}' was made from another base model than this one: their input embeddings differ. "
        "Responses are moved in the reward model's own table, by token id; but it was trained for another base's "
        "responses",
    )


def load_gradient(folder: str | Path, value: RewardModel) -> GradientSource:
    """Return the secant head of a reward model's folder as a source of directions, or the exact gradient without one.

    Raises:
        ModelError: If there is a head, but not of this model.
    """
    if not (Path(folder) / FACTS_NAME).is_file():
        return exact_gradient
    head = load_secant_head(folder, value)
    source = secant_gradient(head)
    body = sum(parameter.numel() for parameter in decoder_layers(value.body)[1].parameters())
    return replace(source, passes=source.passes + sum(p.numel() for p in head.parameters()) / body)


def encode_prompts(pipeline: Pipeline, prompts: list) -> list[list[int]]:
    """Encode prompts and check that each leaves room for a response.

    Raises:
        DataError: Naming the prompt that is empty or too long.
    """
    reference = pipeline.reference
    limit = max_positions(reference.model.config)
    rows = len(pipeline.value.embedding_table_VD)
    if reference.vocabulary is not None:
        rows = min(rows, reference.vocabulary)
    new_tokens = reference.sampling.max_new_tokens
    return encode(pipeline.tokenizer, prompts, rows, limit, new_tokens, reference.reserved_positions)


def prompt_text(prompt: Prompt) -> PromptText:
    """Return a prompt as plain text, for reports and reward functions: all of it, as a dialogue where it has turns."""
    return PromptText(prompt)

"""Loads what every transporting command needs: the reference, the value, and proof that they speak the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.loading import load_reward_model
from reward_models.modelling import RewardModel
from reward_models.secant import FACTS_NAME, load_secant_head, secant_gradient
from vgf_llm.console.screen import say
from vgf_llm.data.dialogue import Prompt, PromptText
from vgf_llm.data.endings import check_ids, padding_id
from vgf_llm.engines.start import engine_reference
from vgf_llm.errors import ConfigError, DataError, ModelError
from vgf_llm.machine.device import resolve_device
from vgf_llm.machine.precision import with_dtype
from vgf_llm.models.architecture import decoder_layers, max_positions
from vgf_llm.models.loading import eos_token_ids, load_causal_lm, load_skeleton, load_tokenizer
from vgf_llm.settings import DecoderName, EngineSettings, ModelSettings, SamplingSettings
from vgf_llm.text.decoders import (
    BlockDecoder,
    EditDecoder,
    EditGreedyDecoder,
    NearestDecoder,
    PivotDecoder,
    PriorDecoder,
)
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.protocols import Decoder, Reference, Value
from vgf_llm.text.reference import TorchReference


@dataclass(frozen=True)
class Pipeline:
    """A reference, a value in the same token space with its gradient, and their tokenizer.

    The gradient is the reward model's secant head where its folder has one, else the exact one.
    """

    reference: Reference
    value: RewardModel
    tokenizer: PreTrainedTokenizerBase
    gradient: GradientSource

    def close(self) -> None:
        """Let go of the engine, where there is one."""
        self.reference.close()


def load_pipeline(models: ModelSettings, sampling: SamplingSettings, engine: EngineSettings | None = None) -> Pipeline:
    """Load the base model and the reward model.

    Args:
        models: Their names, dtype and device.
        sampling: The reference law.
        engine: Runs the base model in a vLLM engine; in this process without it.

    Raises:
        ConfigError: If no reward model is named.
        ModelError: If one cannot be loaded, the reward model's tokenizer or template differs from the base's, or its
            embedding table is smaller than the vocabulary.
    """
    if models.reward_model is None:
        raise ConfigError("reward_model is not set; train one with `vgf-llm reward` and name its folder")
    if not Path(models.reward_model).is_dir():
        raise ModelError(
            f"reward_model {models.reward_model!r} is not a folder; train one with `vgf-llm reward` and name its folder"
        )
    models = with_dtype(models)
    device, dtype = resolve_device(models.device), getattr(torch, models.dtype)
    tokenizer = load_tokenizer(
        models.model_name_or_path,
        pad_token=models.pad_token,
        trust_remote_code=models.trust_remote_code,
        chat_template_kwargs=models.chat_template_kwargs,
    )
    value = load_reward_model(models.reward_model, tokenizer=tokenizer, dtype=dtype, device=device)
    if engine is None:
        base = load_causal_lm(
            models.model_name_or_path, dtype=dtype, device=device, trust_remote_code=models.trust_remote_code
        )
    else:
        base = load_skeleton(models.model_name_or_path, trust_remote_code=models.trust_remote_code)
    table_V, own_V = len(value.embedding_table_VD), base.get_input_embeddings().weight.shape[0]
    vocabulary = check_table(value, tokenizer, own_V)
    tell_other_table(value, base, models.reward_model)
    gradient = load_gradient(models.reward_model, value)  # what can fail comes before an engine is started
    if engine is None:
        eos_ids, pad_id = eos_token_ids(base, tokenizer), padding_id(tokenizer, min(own_V, table_V))
        reference: Reference = TorchReference(base, sampling, eos_ids, pad_id, vocabulary)
    else:
        reference = engine_reference(models, sampling, engine, tokenizer, value.embedding_table_VD, device)
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
    """Say on standard error that the value's input embeddings are not the base's: particles mean something else to it.

    Args:
        value: The reward model.
        base: The base model; one without weights is not compared.
        folder: Of the reward model, for the message.
    """
    own_VD, base_VD = value.get_input_embeddings().weight, base.get_input_embeddings().weight
    if base_VD.is_meta or value.config.train_embeddings:
        return
    rows = min(len(own_VD), len(base_VD))
    if own_VD.shape[1] == base_VD.shape[1] and torch.equal(own_VD[:rows], base_VD[:rows]):
        return
    say(
        f"WARNING: '{folder}' was made from another base model than this one: their input embeddings differ, so what "
        "moves a response for one means something else to the other; train the reward model on this base",
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


def make_decoder(
    name: DecoderName, reference: Reference, value: Value, options: dict[str, Any] | None = None
) -> Decoder:
    """Return the decoder of that name.

    Raises:
        ConfigError: If it has no such option, or the option no such value.
    """
    options = options or {}
    makers: dict[str, Callable[..., Decoder]] = {
        "prior": PriorDecoder,
        "block": BlockDecoder,
        "edit": EditDecoder,
        "edit_greedy": EditGreedyDecoder,
        "pivot": PivotDecoder,
    }
    if name == "nearest":
        maker = partial(
            NearestDecoder, value.embedding_table_VD, (*reference.eos_ids, reference.pad_id), reference.vocabulary
        )
    else:
        maker = partial(makers[name], reference, value.embedding_table_VD)
    known = [key for key, one in signature(maker).parameters.items() if one.kind is Parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"decoder_options: the decoder {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    try:
        return maker(**options)
    except (ValueError, TypeError) as error:  # out of range, or of another type
        raise ConfigError(f"decoder_options {options} of {name!r}: {error}") from error


def encode_prompts(pipeline: Pipeline, prompts: list) -> list[list[int]]:
    """Encode prompts and check that each leaves room for a response.

    Raises:
        DataError: Naming the prompt that is empty or too long.
    """
    from vgf_llm.data.encoding import check_prompt_fits, encode_prompt

    reference = pipeline.reference
    limit = max_positions(reference.model.config)
    rows = len(pipeline.value.embedding_table_VD)
    if reference.vocabulary is not None:
        rows = min(rows, reference.vocabulary)
    encoded = []
    for index, prompt in enumerate(prompts):
        ids = encode_prompt(pipeline.tokenizer, prompt)
        if not ids:
            raise DataError(f"prompt {index} is empty; remove it or write something")
        check_ids(pipeline.tokenizer, ids, rows, f"prompt {index}")
        check_prompt_fits(ids, limit, reference.sampling.max_new_tokens, index, reference.reserved_positions)
        encoded.append(ids)
    return encoded


def prompt_text(prompt: Prompt) -> PromptText:
    """Return a prompt as plain text, for reports and reward functions: all of it, as a dialogue where it has turns."""
    return PromptText(prompt)

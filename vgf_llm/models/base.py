"""A base model with its tokenizer and the ids that end and pad its texts, made in one place for every command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vgf_llm.data.endings import padding_id
from vgf_llm.models.architecture import max_positions, vocabulary_rows
from vgf_llm.models.loading import eos_token_ids, load_causal_lm, load_skeleton, load_tokenizer


class NamesTokenizer(Protocol):
    """Settings that name a base model, as every command has them."""

    @property
    def model_name_or_path(self) -> str:
        """Its name, folder, or "default"."""
        ...

    @property
    def pad_token(self) -> str | None:
        """Padding token of the vocabulary, or None."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Whether code in its repository may run."""
        ...

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]:
        """Variables of the chat template."""
        ...


class NamesBase(NamesTokenizer, Protocol):
    """Settings that also say how its weights are held."""

    @property
    def dtype(self) -> str:
        """Dtype of its parameters by name, decided."""
        ...


@dataclass(frozen=True)
class LoadedBase:
    """A causal language model and its tokenizer.

    Attributes:
        lm: The model, frozen and in eval mode.
        tokenizer: Its tokenizer; pads on the left.
        most_rows: Rows of another model's table that reads its ids too; None where none does.
    """

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    most_rows: int | None = None

    def within(self, rows: int) -> LoadedBase:
        """Return the same base, with no id beyond the table of another model that reads its texts."""
        return replace(self, most_rows=rows)

    @cached_property
    def rows(self) -> int:
        """Rows of its embedding table that there are in every model that reads its texts."""
        own = vocabulary_rows(self.lm.config)
        return own if self.most_rows is None else min(own, self.most_rows)

    @cached_property
    def vocabulary(self) -> int:
        """Ids that are tokens: a tokenizer may hold tokens without a row, and a table rows that only pad it."""
        return min(len(self.tokenizer), self.rows)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a response."""
        return eos_token_ids(self.lm, self.tokenizer)

    @cached_property
    def pad_id(self) -> int:
        """An id to fill padding with."""
        return padding_id(self.tokenizer, self.rows)

    @property
    def max_positions(self) -> int | None:
        """Tokens that it can read; None where it has no limit."""
        return max_positions(self.lm.config)


def tokenizer_of(settings: NamesTokenizer) -> PreTrainedTokenizerBase:
    """Load the tokenizer that settings name.

    Raises:
        ModelError: It cannot be read, has no EOS, or the padding token or a variable of the template is unknown.
    """
    return load_tokenizer(
        settings.model_name_or_path,
        pad_token=settings.pad_token,
        trust_remote_code=settings.trust_remote_code,
        chat_template_kwargs=settings.chat_template_kwargs,
    )


def load_base(settings: NamesBase, tokenizer: PreTrainedTokenizerBase | None = None, device: str = "cpu") -> LoadedBase:
    """Load the base model that settings name.

    Args:
        settings: Name, dtype, and whether code of the repository may run.
        tokenizer: Where `tokenizer_of` has loaded it already.
        device: Torch device of the weights.

    Raises:
        ModelError: Model or tokenizer cannot be found or read.
    """
    if tokenizer is None:
        tokenizer = tokenizer_of(settings)
    lm = load_causal_lm(
        settings.model_name_or_path,
        dtype=getattr(torch, settings.dtype),
        device=device,
        trust_remote_code=settings.trust_remote_code,
    )
    return LoadedBase(lm, tokenizer)


def base_without_weights(settings: NamesTokenizer, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedBase:
    """Return the base model's shapes, ids and tokenizer, for one that runs elsewhere.

    Raises:
        ModelError: As for `load_base`.
    """
    skeleton = load_skeleton(settings.model_name_or_path, trust_remote_code=settings.trust_remote_code)
    return LoadedBase(skeleton, tokenizer_of(settings) if tokenizer is None else tokenizer)

"""Texts that end at a stop string are valued as they are returned: up to where the stop string begins.

The engine writes until a stop string is complete, and couples a moved text to all of its original. So tokens stay as
they are written, and every value that answers are told apart by is taken of the text that is left, encoded anew. Only
the flow climbs the value of the whole text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.data.prompts import encode_response
from vgf_llm.serving.guards import GuardedValue
from vgf_llm.text.protocols import Moved
from vgf_llm.text.responses import Responses


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the first of its stop strings, and whether it had one."""
    ends = [text.index(one) for one in stop if one in text]
    return (text[: min(ends)], True) if ends else (text, False)


class StoppedValue(GuardedValue):
    """A value of what is left of texts that hold a stop string.

    Args:
        own: The value as the request asks it.
        tokenizer: The model's.
        turn: Held while the tokenizer is used.
        stop: The strings.
    """

    def __init__(self, own: GuardedValue, tokenizer: Any, turn: threading.Lock, stop: Sequence[str]) -> None:
        super().__init__(own.own, own.guard)
        self._tokenizer, self._tokenizer_turn, self._stop = tokenizer, turn, stop

    def score(self, prefix: Any, responses: Tensor, mask_BNT: Tensor) -> Tensor:
        """Return values [B, N] of token ids [B, N, T], each response up to its first stop string."""
        rows = [row[keep].tolist() for row, keep in zip(responses.flatten(0, 1), mask_BNT.flatten(0, 1), strict=True)]
        with self._tokenizer_turn:
            texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
            left = [self._left(row, text) for row, text in zip(rows, texts, strict=True)]
        tokens_RT = pad_sequence([torch.tensor(row, device=responses.device) for row in left], batch_first=True)
        lengths_R = torch.tensor([len(row) for row in left], device=responses.device)
        mask_RT = torch.arange(tokens_RT.shape[1], device=responses.device) < lengths_R.unsqueeze(1)
        shape = (*responses.shape[:2], -1)
        return super().score(prefix, tokens_RT.view(shape), mask_RT.view(shape))

    def _left(self, row: list[int], text: str) -> list[int]:
        text, was_stopped = cut(text, self._stop)
        if not was_stopped:
            return row
        return encode_response(self._tokenizer, text, eos=False) or encode_response(self._tokenizer, "", eos=True)


class StoppedPolicy(ImplicitPolicy):
    """The implicit policy whose originals are valued like its other texts, and not by the flow's first step."""

    def transport(self, value_prefix: object, responses: Responses) -> Moved:
        """Move the particles of responses by one round's flow steps."""
        return replace(super().transport(value_prefix, responses), values_BN=self._score(value_prefix, responses))

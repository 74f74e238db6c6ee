"""Preference pairs as token ids: encoding, length limits with counts, the held-out split, and batches of 2B rows."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from vgf_llm.data.encoding import encode_prompt, encode_response
from vgf_llm.data.endings import check_ids, closed
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.data.sources import local_files
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.models.architecture import max_positions

Row = TypeVar("Row")


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one comparison; differences are by how much chosen is better on each objective, 0: no opinion."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float | None = None
    differences: tuple[float, ...] = ()


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    max_length: int,
    max_response_length: int | None = None,
    truncate: bool = False,
    max_dropped_share: float = 1.0,
) -> tuple[list[EncodedPair], dict[str, int]]:
    """Encode pairs; a response is closed as the template closes a turn unless it fills its room, as when sampled.

    Args:
        tokenizer: with an EOS token.
        pairs: text pairs.
        max_length: longest prompt and response together, in tokens.
        max_response_length: longest response, EOS included; None: what max_length leaves.
        truncate: cut longer responses at the right instead of dropping their pair.
        max_dropped_share: largest share of pairs that may be over length or equal once encoded, in [0, 1].

    Returns:
        The encoded pairs, and the count of dropped or cut pairs by reason.

    Raises:
        DataError: nothing is left, or more is dropped than allowed.
    """
    encoded, counts = [], {"over length, dropped": 0, "over length, cut": 0, "equal once encoded": 0}
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair.prompt)
        room = min(max_length - len(prompt), max_response_length or max_length)
        texts = (pair.chosen, pair.rejected)
        open_ids, responses = zip(*(encode_closed(tokenizer, text) for text in texts), strict=True)
        too_long = any(len(ids) > room for ids in open_ids)
        if room < 1 or (too_long and not truncate):
            counts["over length, dropped"] += 1
            continue
        counts["over length, cut"] += too_long
        chosen, rejected = (ids[:room] for ids in responses)
        if chosen == rejected:
            counts["equal once encoded"] += 1
            continue
        encoded.append(EncodedPair(prompt, chosen, rejected, pair.margin, pair.differences))
    counts = {reason: count for reason, count in counts.items() if count}
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    shorter = f" and max_response_length {max_response_length}" if max_response_length else ""
    limits = f"max_length {max_length}{shorter} (tokens)"
    if not encoded:
        raise DataError(f"no pair of {len(pairs)} is left at {limits}: {reasons}; raise the limits")
    dropped = len(pairs) - len(encoded)
    if dropped > max_dropped_share * len(pairs):
        raise DataError(
            f"{dropped} of {len(pairs)} pairs would be dropped at {limits}, more than the allowed share of "
            f"{max_dropped_share:g}: {reasons}; raise the limits, set over_length to truncate, or raise "
            "max_dropped_share"
        )
    return encoded, counts


def encode_closed(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Encode a response; returns the ids of its text, and the same ids closed as a sampled response is."""
    ids = encode_response(tokenizer, text, eos=False)
    whole = closed(tokenizer, ids)
    return whole[:-1], whole


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], most_rows: int) -> None:
    """Refuse encoded pairs or responses that hold an id the base model has no embedding for.

    Raises:
        DataError: naming the token.
    """
    for number, row in enumerate(rows):
        for name in ("prompt", "chosen", "rejected", "response"):
            check_ids(tokenizer, getattr(row, name, ()), most_rows, f"the {name} of encoded row {number}")


def check_max_length(max_length: int, model_config: PreTrainedConfig) -> None:
    """Refuse inputs longer than the model has positions for.

    Args:
        max_length: longest prompt and response together, in tokens.
        model_config: of the base model; one without max_position_embeddings has no limit.

    Raises:
        ConfigError: naming max_length and the limit.
    """
    limit = max_positions(model_config)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"max_length is {max_length} tokens, but the base model has {limit} positions (max_position_embeddings); "
            f"set max_length to at most {limit}"
        )


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split what has a `prompt` by it into (training, held-out) rows: at least one prompt on either side.

    Raises:
        DataError: all rows have the same prompt.
    """
    keys = [json.dumps(row.prompt) for row in rows]  # type: ignore[attr-defined]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise DataError("eval_share cannot hold back a prompt: all rows have the same one; name an eval_dataset")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, round(share * len(prompts)))])
    return (
        [row for row, key in zip(rows, keys, strict=True) if key not in held],
        [row for row, key in zip(rows, keys, strict=True) if key in held],
    )


class PairCollator:
    """Stack B pairs into 2B right-padded rows, chosen first.

    Beside them stand the margins, 0 where none is stated, or where there are objectives the differences.
    """

    def __init__(self, pad_token_id: int) -> None:
        """Keep the padding id; it is never attended to."""
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and response_mask [2B, S], and margin [B] or difference [B, K]."""
        rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
        if pairs[0].differences:
            target = {"difference": torch.tensor([pair.differences for pair in pairs])}
        else:
            target = {"margin": torch.tensor([pair.margin or 0.0 for pair in pairs])}
        return stack_rows(rows, self.pad_token_id) | target


def stack_rows(rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Stack (prompt, response) rows, padded on the right: input_ids, attention_mask and response_mask [R, S]."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids, attention_mask, response_mask = [], [], []
    for prompt, response in rows:
        padding = longest - len(prompt) - len(response)
        input_ids.append([*prompt, *response, *[pad_token_id] * padding])
        attention_mask.append([1] * (longest - padding) + [0] * padding)
        response_mask.append([0] * len(prompt) + [1] * len(response) + [0] * padding)
    return {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(attention_mask),
        "response_mask": torch.tensor(response_mask),
    }


def file_digest(source: str, split: str = "train") -> str:
    """Return the SHA-256 of a source's local files, one after the other, or "hub" where it has none."""
    files = local_files(source, split)
    if files is None:
        return "hub"
    digest = hashlib.sha256()
    for path in files.paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()

"""Logged responses with their rewards: rows of a file or hub data set, as text and as token ids.

A row is a prompt, a response and a reward. Rows of preference pairs serve too: both of their responses are taken, each
once a prompt, and a reward function says what they are worth (the pair says only which is better).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reward_models.calling import CalledReward
from reward_models.functions import RewardFunction, call_function, load_function
from reward_models.grammar import is_composed
from vgf_llm.console.progress import track
from vgf_llm.data.cells import check_named
from vgf_llm.data.dialogue import Message, Prompt, PromptText, UnusableRowError, as_messages, joined, turns_of
from vgf_llm.data.encoding import encode_prompt
from vgf_llm.data.prompts import load_preferences, prompt_of, read_cell, read_number, repeated_prompts
from vgf_llm.data.rows import Place, Row, read_rows
from vgf_llm.errors import DataError
from vgf_llm.runs.files import shorten
from vgf_llm.settings import RewardCallSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from reward_models.pairs import EncodedPair


_SHOWN = 64  # responses between two counts of a bar


@dataclass(frozen=True)
class LoggedResponse:
    """A response that was given to a prompt, and its reward."""

    prompt: Prompt
    response: str
    reward: float


@dataclass(frozen=True)
class EncodedResponse:
    """Token ids of one logged response."""

    prompt: list[int]
    response: list[int]
    reward: float


def load_logged(
    source: str,
    split: str = "train",
    limit: int | None = None,
    prompt_column: str = "prompt",
    response_column: str = "response",
    reward_column: str = "reward",
    reward_function: str | None = None,
    max_dropped_share: float = 0.2,
    system_column: str = "system",
    calls: RewardCallSettings | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[LoggedResponse]:
    """Read logged responses.

    Args:
        source: as for `vgf_llm.data.rows.read_rows`.
        split: split of a hub data set whose name does not state one.
        limit: only the first so many rows (count, > 0).
        prompt_column: text or messages.
        response_column: text, or a list whose last message is the assistant's, with or without the turns before it;
            may be empty (the model stopped at once). Where no row has the column, rows are read as preference pairs.
        reward_column: a number, higher is better.
        reward_function: fills rewards that are missing, as `reward_models.functions.load_function` takes it, or a YAML
            file of a composed reward.
        max_dropped_share: of preference pairs, as in `vgf_llm.data.prompts.load_preferences`.
        system_column: a system turn, where rows have it.
        calls: how functions and servers are called.
        variables: of the policy's chat template, for a reward model of a composed reward.

    Returns:
        The responses in file order, at least one.

    Raises:
        DataError: the source cannot be read, a column is missing or malformed, or a reward is missing and there is no
            function.
        ConfigError, ModelError: the function does not exist, or does not return finite numbers.
    """
    rows = read_rows(source, split, limit)
    check_named(rows, source, "system_column", system_column, "system")
    pairs = not any(response_column in row for _, row in rows) and any("chosen" in row for _, row in rows)
    if pairs:
        preferences = load_preferences(
            source, split, limit, prompt_column, max_dropped_share=max_dropped_share, system_column=system_column
        )
        seen = [(PromptText(pair.prompt), text) for pair in preferences.pairs for text in (pair.chosen, pair.rejected)]
        texts = list({(repr(prompt.prompt), text): (prompt, text) for prompt, text in seen}.values())
        rewards: list[float | None] = [None] * len(texts)
        missing = f"{source}: preference pairs have no rewards"
    else:
        texts, rewards, missing = [], [], ""
        for number, row in rows:
            prompt = prompt_of(row, source, number, prompt_column, system_column)
            others = {name: value for name, value in row.items() if name not in (prompt_column, response_column)}
            if prompt_column != response_column:
                _check_open(row, source, number, prompt_column)
            before, response = _response(row, response_column, source, number)
            prompt = _continued(prompt, before, f"{source}, row {number}, column '{response_column}'")
            texts.append((PromptText(prompt, others, f"{source}, row {number}"), response))
            rewards.append(read_number(row.get(reward_column), source, number, reward_column))
            if rewards[-1] is None and not missing:
                there = ", ".join(map(str, row))
                missing = f"{source}, row {number}: no reward in column '{reward_column}'; columns: {there}"
        cut = repeated_prompts([(prompt.prompt, text) for prompt, text in texts], source)
        texts = [(p, text[len(p) :] if is_cut else text) for (p, text), is_cut in zip(texts, cut, strict=True)]
    if missing and reward_function is None:
        raise DataError(f"{missing}; name a reward_function, or the column of rewards with --reward_column")
    blanks = [index for index, reward in enumerate(rewards) if reward is None]
    if blanks and reward_function is not None:
        filled = _filled(reward_function, [texts[index] for index in blanks], calls, variables)
        for index, reward in zip(blanks, filled, strict=True):
            rewards[index] = reward
    return [
        LoggedResponse(prompt.prompt, text, float(reward or 0.0))
        for (prompt, text), reward in zip(texts, rewards, strict=True)
    ]


def _filled(
    name: str,
    texts: list[tuple[PromptText, str]],
    calls: RewardCallSettings | None,
    variables: Mapping[str, Any] | None,
) -> list[float]:
    """Return the rewards of a function; one that scores response by response, or parts, shows how far it is."""
    function = _filler(name, calls, variables)
    by_parts = not isinstance(function, CalledReward) or function.signature.one_by_one
    size = _SHOWN if by_parts else len(texts)
    pieces = [texts[start : start + size] for start in range(0, len(texts), size)]
    rewards: list[float] = []
    for piece in track(pieces, f"scoring by {name}", unit="responses", size=len):
        prompts, responses = zip(*piece, strict=True)
        rewards += call_function(function, list(prompts), list(responses))
    return rewards


def _filler(name: str, calls: RewardCallSettings | None, variables: Mapping[str, Any] | None) -> RewardFunction:
    """Return what fills missing rewards; models are imported where a composed reward is named alone."""
    if not is_composed(name):
        return CalledReward(load_function(name), calls, name=name)
    from reward_models.foreign import text_reward

    return text_reward(name, calls=calls, variables=variables)


def _check_open(row: Row, source: str, number: Place, column: str) -> None:
    """Refuse a prompt that is answered already: its answer would be lost before the response of another cell."""
    messages = as_messages(read_cell(row, column, source, number))
    if messages[-1]["role"] == "assistant" and messages[-1]["content"].strip():
        raise DataError(
            f"{source}, row {number}, column '{column}': the prompt ends in the assistant's turn "
            f"{shorten(repr(messages[-1]['content']))}; end it before the answer"
        )


def _continued(prompt: Prompt, before: list[Message], where: str) -> Prompt:
    """Join a prompt and the turns that a response's cell holds before the response, which repeat or continue it."""
    try:
        return joined(prompt, before)
    except UnusableRowError as error:
        raise DataError(f"{where}: {error}") from error


def _response(row: Row, column: str, source: str, number: Place) -> tuple[list[Message], str]:
    """Return the turns before a response, where its cell holds any, and the response."""
    value = read_cell(row, column, source, number, empty_ok=True, option="response_column")
    if row[column] is None:
        raise DataError(f"{source}, row {number}, column '{column}': expected text or messages, got None")
    if isinstance(value, str):
        turns = turns_of(value)
        value = [{"role": turn.role, "content": turn.text} for turn in turns] if turns else value
    if isinstance(value, str):
        return [], value
    if not value or value[-1]["role"] != "assistant":
        role = repr(value[-1]["role"]) if value else "none"
        raise DataError(
            f"{source}, row {number}, column '{column}': the last message must be the assistant's, got {role}"
        )
    before = [{"role": turn["role"], "content": turn["content"].strip()} for turn in value[:-1]]
    return before, str(value[-1]["content"])


def encode_logged(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[LoggedResponse],
    max_length: int,
    max_response_length: int | None = None,
    truncate: bool = False,
    max_dropped_share: float = 1.0,
) -> tuple[list[EncodedResponse], dict[str, int]]:
    """Encode responses; each is closed as the template closes a turn unless it fills its room, as when sampled.

    Args:
        tokenizer: with an EOS token.
        rows: text rows.
        max_length: longest prompt and response together, in tokens.
        max_response_length: longest response, EOS included; None: what max_length leaves.
        truncate: cut longer responses at the right, with the reward of the whole, instead of dropping them.
        max_dropped_share: largest share of rows that may be dropped, in [0, 1].

    Returns:
        The encoded rows, and the count of dropped or cut ones by reason.

    Raises:
        DataError: nothing is left, or more is dropped than allowed.
    """
    from reward_models.pairs import encode_closed

    encoded, dropped, cut = [], 0, 0
    for row in rows:
        prompt, (text, response) = encode_prompt(tokenizer, row.prompt), encode_closed(tokenizer, row.response)
        room = min(max_length - len(prompt), max_response_length or max_length)
        if room < 1 or (len(text) > room and not truncate):
            dropped += 1
            continue
        cut += len(text) > room
        encoded.append(EncodedResponse(prompt, response[:room], row.reward))
    if not encoded or dropped > max_dropped_share * len(rows):
        limit = f" and max_response_length {max_response_length}" if max_response_length else ""
        raise DataError(
            f"{dropped} of {len(rows)} responses would be dropped at max_length {max_length}{limit} (tokens), "
            f"more than the allowed share of {max_dropped_share:g}; raise the limits, set over_length to truncate, or "
            "raise max_dropped_share"
        )
    counts = {"over length, dropped": dropped, "over length, cut": cut}
    return encoded, {reason: count for reason, count in counts.items() if count}


def response_pairs(rows: Sequence[EncodedResponse]) -> list[EncodedPair]:
    """Pair the responses of each prompt, first with second, third with fourth and so on; equal rewards make no pair.

    Returns:
        Disjoint pairs, the better response as `chosen`, the difference of rewards as `margin`.
    """
    from reward_models.pairs import EncodedPair

    groups: dict[tuple[int, ...], list[EncodedResponse]] = {}
    for row in rows:
        groups.setdefault(tuple(row.prompt), []).append(row)
    pairs = []
    for group in groups.values():
        for left, right in zip(group[::2], group[1::2], strict=False):
            worse, better = sorted((left, right), key=lambda row: row.reward)
            if worse.reward < better.reward:
                margin = better.reward - worse.reward
                pairs.append(EncodedPair(better.prompt, better.response, worse.response, margin))
    return pairs


class LoggedCollator:
    """Stack responses into right-padded rows."""

    def __init__(self, pad_token_id: int) -> None:
        """Keep the padding id; it is never attended to."""
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[EncodedResponse]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and response_mask [R, S], and reward [R]."""
        import torch

        from reward_models.pairs import stack_rows

        stacked = stack_rows([(row.prompt, row.response) for row in rows], self.pad_token_id)
        return stacked | {"reward": torch.tensor([row.reward for row in rows], dtype=torch.float32)}

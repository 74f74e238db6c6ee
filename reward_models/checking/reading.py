"""Checks of how a model reads a conversation: padding, batches, BOS, template, closing, and the position of the score.

Differences are in standard deviations of the scores, so that one limit fits every model. Another reading (without the
template, with another BOS, without the closing) is called better where it wins more of the same pairs in a one-sided
sign test at 0.005.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_models.checking.line import Line, judged, skipped
from reward_models.checking.subject import Reading, Side, Subject, TokenRow, leading, rendered
from reward_models.pair_figures import is_better
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.models.architecture import max_positions
from vgf_llm.models.loading import load_tokenizer

_MOST_APART = 0.01  # standard deviations
_ROWS = 8
_FEW_PAIRS = 24  # that another reading is tried on
_NO_LIMIT = 10**6  # tokenizers without a length state a huge one


def check_padding(subject: Subject, rows: Sequence[TokenRow], alone: Tensor, unit: float) -> list[Line]:
    """Compare scores alone with scores in a padded batch, on the tokenizer's side and on the other one.

    Where padding changes nothing, the subject is scored in padded batches from here on.

    Args:
        subject: Anything that reads tokens.
        rows: Of uneven length (`uneven`).
        alone: Their scores one by one.
        unit: Standard deviation of scores.
    """
    if subject.kind != "ours" and subject.pad_id is None:
        advice = "set pad_token_id in config.json, to a token that ends no answer"
        seen = "config.json has no pad_token_id, so transformers refuses batches; scored one by one here"
        return [Line("padding", seen, "one is set", "warn", advice)]
    own, other = subject.padding_side, _other(subject.padding_side)
    apart = {side: _apart(subject.scores(rows, len(rows), side), alone, unit) for side in (own, other)}
    value = f"largest difference {apart[own]:.2g} standard deviations, padded on the {own}"
    is_same, is_same_there = apart[own] <= _MOST_APART, apart[other] <= _MOST_APART
    if is_same:
        advice = ""
    elif is_same_there and subject.kind != "decoder" or subject.pad_id == subject.tokenizer.pad_token_id:
        advice = f"positions shift with the padding: set padding_side to {other!r} in tokenizer_config.json"
    else:
        advice = (
            "the score is read at a padding position: give config.json the pad_token_id of the tokenizer "
            f"({subject.tokenizer.pad_token_id}, {subject.tokenizer.pad_token!r})"
        )
    subject.rows_per_forward = _ROWS if is_same else 1
    threshold = f"at most {_MOST_APART:g}"
    beside = f"largest difference {apart[other]:.2g} standard deviations, padded on the {other}"
    return [
        judged("padding", value, threshold, "pass" if is_same else "fail", advice),
        Line("other side", beside + ("" if is_same_there else f"; pad on the {own} only"), "", "pass"),
    ]


def _other(side: Side) -> Side:
    return "left" if side == "right" else "right"


def uneven(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return a few rows, from the longest to the shortest."""
    order = sorted(rows, key=lambda row: len(row.ids))
    step = max(1, len(order) // _ROWS)
    return order[::-1][::step][:_ROWS]


def _apart(found: Tensor, expected: Tensor, unit: float) -> float:
    apart = float((found - expected).abs().max()) / unit
    return apart if apart == apart else float("inf")


def check_batch(subject: Subject, rows: Sequence[TokenRow], unit: float) -> Line:
    """Compare the score of a row alone with its score in a batch of rows of the same length."""
    if subject.kind != "ours" and subject.pad_id is None:
        return skipped("batch size", "no pad_token_id: scored one by one")
    first = rows[0]
    shifted = [TokenRow([*row.ids, *first.ids][: len(first.ids)], first.start, first.types) for row in rows[1:_ROWS]]
    alone, together = subject.scores([first], 1), subject.scores([first, *shifted], _ROWS)[:1]
    apart = _apart(together, alone, unit)
    advice = (
        "the score depends on what else is in the batch (routing with a capacity, batch statistics): score one by one"
    )
    value = f"largest difference {apart:.2g} standard deviations in a batch of {1 + len(shifted)}"
    return judged("batch size", value, f"at most {_MOST_APART:g}", "pass" if apart <= _MOST_APART else "fail", advice)


def check_pad_token(subject: Subject) -> Line:
    """Compare the padding of tokenizer and configuration with each other, and with the EOS that closes an answer."""
    tokenizer, pad_id = subject.tokenizer, subject.pad_id
    if subject.kind == "ours" or pad_id is None:
        seen = "read by attention mask" if subject.kind == "ours" else "none is set"
        return skipped("pad token", seen)
    value = f"config.json {_token(tokenizer, pad_id)}, tokenizer {_token(tokenizer, tokenizer.pad_token_id)}"
    threshold = "the same, and no token that closes an answer"
    if pad_id != tokenizer.pad_token_id:
        advice = f"set pad_token_id to {tokenizer.pad_token_id} in config.json: padding is found by id there"
        return Line("pad token", value, threshold, "fail", advice)
    if subject.kind == "decoder" and subject.closing[-1:] == [pad_id]:
        advice = (
            "padding is also what closes an answer, so the score is read at the token before it; scores here do the "
            "same. Train with another padding token"
        )
        return Line("pad token", value, threshold, "warn", advice)
    return Line("pad token", value, threshold)


def check_position(subject: Subject, rows: Sequence[TokenRow]) -> Line:
    """Name the token that the score is read at; it must stand at the same place of every conversation's end."""
    if subject.kind != "decoder":
        return skipped("position", "pooled by the model itself")
    pad_id, tokenizer = subject.pad_id, subject.tokenizer
    places = [_read_from_end(row.ids, pad_id) for row in rows]
    closing = subject.closing
    seen = sorted({row.ids[len(row.ids) - 1 - place] for row, place in zip(rows, places, strict=True)})
    names = ", ".join(_token(tokenizer, one) for one in seen[:3]) + (f" and {len(seen) - 3} more" if seen[3:] else "")
    at = f"{min(places)}" if min(places) == max(places) else f"{min(places)} to {max(places)}"
    value = f"{names}, {at} tokens before the end"
    threshold = "the last token, or one of the closing"
    if min(places) != max(places):
        advice = (
            f"the padding token {_token(tokenizer, pad_id)} occurs in answers: set another pad_token_id and train again"
        )
        return Line("position", value, threshold, "fail", advice)
    if places[0] and places[0] >= len(closing) and all(row.ids[-len(closing) :] == closing for row in rows):
        advice = "the score is read before the closing, at the answer's last word; see the line `pad token`"
        return Line("position", value, threshold, "warn", advice)
    return Line("position", value, threshold)


def _read_from_end(ids: Sequence[int], pad_id: int | None) -> int:
    """Return how many tokens before the end transformers reads the score: at the last id that is not padding."""
    last = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] != pad_id), 0)
    return len(ids) - 1 - last


def _token(tokenizer: Any, one: int | None) -> str:
    return "none" if one is None else f"{tokenizer.convert_ids_to_tokens(one)!r} ({one})"


def check_bos(subject: Subject, pairs: Sequence[PreferencePair], rows: Sequence[TokenRow], won: list[bool]) -> Line:
    """Count the BOS tokens of a conversation; with one too many or too few, see whether one wins more pairs."""
    bos, tokenizer = subject.tokenizer.bos_token_id, subject.tokenizer
    if bos is None or subject.kind == "encoder":
        return skipped("BOS", "the tokenizer has none" if bos is None else "the tokenizer writes the encoder's own")
    counts = {leading(row.ids, bos) for row in rows}
    adds = leading(list(tokenizer("a")["input_ids"]), bos)
    writes = tokenizer.chat_template is not None and str(rendered(tokenizer, "a", "b")).startswith(tokenizer.bos_token)
    value = f"{'/'.join(map(str, sorted(counts)))} at the start; tokenizer adds {adds}, template writes {int(writes)}"
    if max(counts) > 1:
        advice = "the template writes BOS more than once: take one out of it"
        return Line("BOS", value, "at most one", "fail", advice)
    if subject.kind == "decoder" and _wins_more(subject, pairs, "other bos", won):
        advice = (
            f"pairs are won more often {'without' if max(counts) else 'with'} a BOS, so it was trained that way: "
            "change the chat template"
        )
        return Line("BOS", value, "the one of training", "fail", advice)
    if adds and not max(counts):
        advice = (
            "the tokenizer adds a BOS and the chat template does not write one: engines that encode the rendered text "
            "(vLLM) read another conversation than TRL's training; write it in the template"
        )
        return Line("BOS", value, "one, or none anywhere", "warn", advice)
    if adds and writes:
        value += "; encode rendered text with add_special_tokens=False"
    return Line("BOS", value, "at most one")


def check_template(
    subject: Subject, pairs: Sequence[PreferencePair], won: list[bool], base_tokenizer: Any | None
) -> Line:
    """Look whether the chat template is the one of training."""
    tokenizer = subject.tokenizer
    if subject.kind == "ours":
        return _template_of_ours(subject)
    if not tokenizer.chat_template:
        return Line("template", "none: prompt and answer are joined as text")
    if subject.kind == "decoder" and _wins_more(subject, pairs, "plain", won):
        advice = "pairs are won more often as plain text, so it was trained without this chat template: take it away"
        return Line("template", "its own loses to plain text", "the one of training", "fail", advice)
    other = _template_of_base(subject)
    if other is not None and other != tokenizer.chat_template:
        advice = "the adapter's template is not its base's; make sure that it is the one of training"
        return Line("template", "adapter and base have different templates", "the same", "warn", advice)
    if base_tokenizer is not None and base_tokenizer.chat_template != tokenizer.chat_template:
        return Line("template", "its own, not the base model's: prompts are read under its own")
    return Line("template", "its own")


def _template_of_ours(subject: Subject) -> Line:
    from reward_models.card import CARD_NAME, read_card
    from vgf_llm.models.loading import fingerprint

    if not (Path(subject.name) / CARD_NAME).is_file():
        return skipped("template", "the folder has no card")
    card, found = read_card(subject.name), fingerprint(subject.tokenizer)
    is_same = (card.tokenizer_sha256, card.template_sha256) == (found.tokenizer, found.template)
    value = "tokenizer and template of its card" if is_same else "not the tokenizer or template of its card"
    return judged("template", value, "those of training", "pass" if is_same else "fail", "put the tokenizer back")


def _template_of_base(subject: Subject) -> str | None:
    """Return the chat template of an adapter's base where that is a folder here."""
    try:
        named = json.loads((Path(subject.name) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    base = str(named.get("base_model_name_or_path") or "")
    if not (Path(base) / "tokenizer_config.json").is_file():
        return None
    found: str | None = load_tokenizer(base).chat_template
    return found


def check_closing(
    subject: Subject, pairs: Sequence[PreferencePair], won: list[bool], base_tokenizer: Any | None
) -> Line:
    """Look at what closes an answer: the template's own ids, which the score is read at."""
    tokenizer = subject.tokenizer
    if subject.kind == "encoder":
        return skipped("closing", "the tokenizer writes the encoder's own")
    value = f"{tokenizer.decode(subject.closing)!r}"
    if subject.kind == "decoder" and _wins_more(subject, pairs, "no closing", won):
        advice = "pairs are won more often without it, so it was trained on open answers: take it out of the template"
        return Line("closing", f"{value} loses to none", "the one of training", "fail", advice)
    if tokenizer.chat_template and not set(subject.closing) & set(_special_ids(tokenizer)):
        advice = "the template closes an answer with no special token, so an answer that stops early looks complete"
        return Line("closing", value, "a special token", "warn", advice)
    if base_tokenizer is not None and base_tokenizer.eos_token_id != tokenizer.eos_token_id:
        value += f"; the base ends in {base_tokenizer.eos_token!r}, which is read as this closing"
    return Line("closing", value)


def _special_ids(tokenizer: Any) -> list[int]:
    added = [one for one, token in tokenizer.added_tokens_decoder.items() if token.special]
    return [*tokenizer.all_special_ids, *added]


def _wins_more(subject: Subject, pairs: Sequence[PreferencePair], reading: Reading, won: list[bool]) -> bool:
    first = pairs[:_FEW_PAIRS]
    scores, n = subject.scores(subject.rows(first, reading)), len(first)
    return is_better((scores[:n] > scores[n:]).tolist(), won[:n])


def check_longest(subject: Subject, rows: Sequence[TokenRow]) -> tuple[Line, list[bool]]:
    """Count conversations that are longer than the model, or than the tokenizer cuts at.

    Returns:
        The line, and for each row whether it fits the model.
    """
    network = subject.model.body if subject.kind == "ours" else subject.model
    limit = max_positions(network.config)
    longest = max(len(row.ids) for row in rows)
    fits = [limit is None or len(row.ids) <= limit for row in rows]
    stated = int(min(subject.tokenizer.model_max_length or _NO_LIMIT, _NO_LIMIT))
    cut = sum(len(row.ids) > stated for row in rows)
    value = f"longest {longest} tokens, model {limit or 'without limit'}"
    value += f", tokenizer {stated}" if stated < _NO_LIMIT else ""
    if not all(fits):
        advice = f"{fits.count(False)} conversations are too long and left out here; commands refuse them: shorten them"
        return Line("truncation", value, "all fit the model", "fail", advice), fits
    if cut:
        advice = (
            f"truncation=True would cut {cut} conversations at the tokenizer's model_max_length, and with them the end "
            "that the score is read at: raise model_max_length"
        )
        return Line("truncation", value, "all fit the tokenizer", "warn", advice), fits
    return Line("truncation", value, "all fit"), fits


def finite(scores: Tensor) -> bool:
    """Return whether all scores are numbers."""
    return bool(torch.isfinite(scores).all())

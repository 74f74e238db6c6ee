"""Runs all checks of a reward model in order and returns their lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reward_models.checking.gradient import check_dtype, check_gradient, check_read_here
from reward_models.checking.line import Line, judged, skipped
from reward_models.checking.pairs import Pairs
from reward_models.checking.quality import (
    check_accuracy,
    check_calibration,
    check_length,
    check_numbers,
    check_pairs,
    check_parts,
    check_spread,
)
from reward_models.checking.reading import (
    check_batch,
    check_bos,
    check_closing,
    check_longest,
    check_pad_token,
    check_padding,
    check_position,
    check_template,
    finite,
    uneven,
)
from reward_models.checking.subject import Subject, load_subject
from reward_models.composed import scored
from reward_models.constraints import words_of
from vgf_llm.data.dialogue import PromptText
from vgf_llm.errors import ConfigError, ModelError

_FIRST = 4  # pairs that are also read as the commands do
_OF_TOKENS = ("padding", "pad token", "position", "BOS", "template", "closing", "truncation", "gradient", "dtype")


def check_reward(
    name: str, outputs: Mapping[str, float], pairs: Pairs, device: str | torch.device, base_tokenizer: Any | None = None
) -> Iterator[Line]:
    """Yield the lines of a reward model's report; what cannot be loaded is a failed line.

    Args:
        name: Folder of a reward model, a Python function, or a file that composes several.
        outputs: Weights of the outputs where there are several.
        pairs: What it scores.
        device: It is run on.
        base_tokenizer: Of the base model whose responses it is to score; None: unknown.

    Raises:
        ConfigError: There is no such function, or the weights of outputs are missing.
    """
    try:
        subject = load_subject(name, outputs, device)
    except ConfigError:
        raise
    except ModelError as error:
        yield Line("weights", "cannot be loaded", "all weights are there", "fail", str(error))
        return
    yield Line("weights", {"function": "none"}.get(subject.kind, "all there, none left over"), "", "pass")
    yield check_pairs(len(pairs.kept), pairs.dropped)
    yield from (
        _check_function(subject, pairs) if subject.kind == "function" else _check_model(subject, pairs, base_tokenizer)
    )


def _check_model(subject: Subject, pairs: Pairs, base_tokenizer: Any | None) -> Iterator[Line]:
    rows = subject.rows(pairs.kept)
    longest, fits = check_longest(subject, rows)
    yield longest
    n = len(pairs.kept)
    both = [fits[at] and fits[at + n] for at in range(n)]
    kept = [pair for pair, fit in zip(pairs.kept, both, strict=True) if fit]
    rows = [row for row, fit in zip(rows, both * 2, strict=True) if fit]
    if not kept:
        return
    few = uneven(rows)
    alone = subject.scores(few, 1)
    padding = check_padding(subject, few, alone, _spread(alone)) if finite(alone) else []
    scores, n = subject.scores(rows), len(kept)
    yield check_numbers(scores.tolist())
    if not finite(scores):
        return
    yield check_spread(scores.tolist())
    unit = _spread(scores)
    if unit <= 1e-6 * max(1.0, abs(float(scores.mean()))):
        return
    won = (scores[:n] > scores[n:]).tolist()
    yield from padding
    yield check_batch(subject, rows, unit)
    yield check_pad_token(subject)
    yield check_position(subject, rows)
    yield check_bos(subject, kept, rows, won)
    yield check_template(subject, kept, won, base_tokenizer)
    yield check_closing(subject, kept, won, base_tokenizer)
    if subject.kind != "ours":
        native = torch.cat([scores[:n][:_FIRST], scores[n:][:_FIRST]])
        yield check_read_here(subject, kept[:_FIRST], native, unit)
    yield from _check_scores(scores, [len(row.ids) for row in rows], pairs.is_given)
    yield check_gradient(subject, kept)
    yield check_dtype(subject, kept[:8], unit)


def _spread(scores: Tensor) -> float:
    return max(float(scores.std(correction=0)), 1e-9)


def _check_scores(scores: Tensor, lengths: Sequence[int], is_given: bool) -> Iterator[Line]:
    n = len(scores) // 2
    chosen, rejected = scores[:n].tolist(), scores[n:].tolist()
    yield check_accuracy(chosen, rejected, is_given)
    yield check_length(chosen, rejected, lengths[:n], lengths[n:])
    yield check_calibration(chosen, rejected)


def _check_function(subject: Subject, pairs: Pairs) -> Iterator[Line]:
    assert subject.function is not None
    asked: list[str] = [PromptText(pair.prompt) for pair in pairs.kept]
    prompts = asked * 2
    responses = [pair.chosen for pair in pairs.kept] + [pair.rejected for pair in pairs.kept]
    found, parts = scored(subject.function, prompts, responses)
    yield check_numbers(found)
    if parts:
        yield check_parts(parts)
    scores = torch.tensor(found, dtype=torch.float64)
    if not finite(scores):
        return
    spread = check_spread(found)
    yield spread
    if spread.verdict == "fail":
        return
    again = [float(subject.function([p], [r])[0]) for p, r in zip(prompts[:8], responses[:8], strict=True)]
    apart = max(abs(one - other) for one, other in zip(found, again, strict=False))
    advice = "the function gives other scores alone, or when called again; best-of-N compares scores of different calls"
    value = f"largest difference {apart:.2g} between one call and single calls"
    yield judged("batch size", value, "0", "pass" if apart <= 1e-6 * (1 + scores.abs().max()) else "fail", advice)
    yield from _check_scores(scores, [len(words_of(text)) for text in responses], pairs.is_given)
    for check in _OF_TOKENS:
        yield skipped(check, "a function reads texts")

"""What is known about a trained reward model, written beside its weights as reward_card.json and README.md.

Held-out pair accuracy with Wilson's score interval (1927), by tercile of the stated margin; Pearson correlation of
score and response length; scale; gradient fidelity; and the fingerprints of the tokenizer and chat template it was
trained with.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.pair_figures import calibration, length_control
from vgf_llm.errors import ModelError
from vgf_llm.runs.files import write_json_atomic, write_text_atomic
from vgf_llm.statistics.intervals import wilson_interval

if TYPE_CHECKING:
    from vgf_llm.models.loading import Fingerprint

CARD_NAME = "reward_card.json"


@dataclass
class RewardCard:
    """Facts of one trained reward model; figures are over the held-out pairs, None where they were not measured."""

    base_model: str
    """Name or folder of the causal LM that the body was cut from."""
    num_layers: int
    """Decoder layers kept."""
    pooling: str
    """Tokens the head reads: "last" or "mean" (of the response)."""
    adapter: bool
    """True where the folder holds a LoRA, False where it holds the whole model."""
    tokenizer_sha256: str
    """Fingerprint of vocabulary, merges and special tokens."""
    template_sha256: str
    """Fingerprint of the chat template."""
    chat_template: bool
    """Whether prompts are put through a chat template."""
    max_length: int
    """Longest prompt and response together in training, in tokens."""
    train_pairs: int
    """Pairs trained on."""
    held_out_pairs: int
    """Pairs measured on."""
    accuracy: float | None = None
    """Share of held-out pairs whose chosen response scores higher."""
    accuracy_interval: tuple[float, float] | None = None
    """Wilson's 95% interval of the accuracy."""
    objectives: dict[str, dict[str, Any]] | None = None
    """Accuracy over the pairs with an opinion, its interval, and their number, by objective. All other figures are of
    the mean of the objectives."""
    accuracy_by_margin: dict[str, float] | None = None
    """Accuracy in the terciles of the stated margin, smallest first."""
    length_controlled_accuracy: float | None = None
    """Mean of the accuracies where chosen is longer and where it is shorter; None where one side has no pair."""
    calibration: dict[str, float | None] | None = None
    """Confidence and calibration error of pair probabilities, see `reward_models.pair_figures.Calibration`."""
    length_correlation: float | None = None
    """Pearson correlation of score and response length in tokens."""
    score_mean: float | None = None
    """Mean score of held-out responses."""
    score_std: float | None = None
    """Standard deviation of their scores."""
    fidelity: dict[str, float] | None = None
    """Gradient fidelity, see `reward_models.fidelity.Fidelity`."""
    train_responses: int | None = None
    """Responses that a value was trained on; None for a model trained on pairs."""
    held_out_responses: int | None = None
    """Responses that a value was measured on."""
    value_error: float | None = None
    """Root mean squared error of a value at the end of held-out responses, in units of the reward."""
    explained_variance: float | None = None
    """1 - var(reward - value) / var(reward) there, at most 1; None where all rewards are equal."""
    imported_from: str | None = None
    """Folder or hub name that the weights were imported from; None for a model trained here."""
    max_response_length: int | None = None
    """Longest response in training, in tokens; None: what max_length leaves."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Training rows left out or cut, by reason."""
    data_files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each data file; "hub" for a data set of the hub."""
    seed: int = 0
    """Of head, data order and noise."""
    training: dict[str, Any] = field(default_factory=dict)
    """Learning rate, steps, batch and whatever else differs from run to run."""


def write_card(card: RewardCard, folder: str | Path) -> None:
    """Write README.md and then reward_card.json, which says that a training is complete, into the model's folder."""
    write_text_atomic(Path(folder) / "README.md", card_markdown(card))
    write_json_atomic(Path(folder) / CARD_NAME, dataclasses.asdict(card))


def read_card(folder: str | Path) -> RewardCard:
    """Read a card.

    Raises:
        ModelError: there is none, or it is not one.
    """
    path = Path(folder) / CARD_NAME
    try:
        return RewardCard(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ModelError(f"'{folder}' has no {CARD_NAME}; training writes it beside the weights") from error
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{path}' is not a reward card of this version ({error}); train the model again") from error


def check_fingerprint(card: RewardCard, tokenizer: Any) -> None:
    """Refuse a tokenizer or chat template other than the one the reward model was trained with.

    Raises:
        ModelError: naming which of the two differs.
    """
    from vgf_llm.models.loading import Fingerprint

    compare_fingerprints(Fingerprint(card.tokenizer_sha256, card.template_sha256), tokenizer, "card", card.base_model)


def compare_fingerprints(wanted: Fingerprint, tokenizer: Any, place: str, base_model: str) -> None:
    """Refuse a tokenizer whose fingerprint is not the wanted one, found in `place`.

    Raises:
        ModelError: naming which of tokenizer and chat template differs.
    """
    from vgf_llm.models.loading import fingerprint

    seen = fingerprint(tokenizer)
    for what, expected, got in (
        ("tokenizer", wanted.tokenizer, seen.tokenizer),
        ("chat template", wanted.template, seen.template),
    ):
        if expected != got:
            raise ModelError(
                f"the {what} differs from the one this reward model was trained with (fingerprint {got[:12]}, {place} "
                f"{expected[:12]}); use the tokenizer saved beside the model, or a model trained for {base_model!r}"
            )


def pair_figures(
    chosen: Sequence[float], rejected: Sequence[float], margins: Sequence[float | None], lengths: Sequence[int]
) -> dict[str, Any]:
    """Compute the card's held-out figures.

    Args:
        chosen: scores of the preferred responses.
        rejected: scores of the others.
        margins: stated margin of each pair; None where there is none.
        lengths: response lengths in tokens, those of chosen first, then those of rejected.

    Returns:
        Fields of `RewardCard` by name.
    """
    wins = [c > r for c, r in zip(chosen, rejected, strict=True)]
    scores = [*chosen, *rejected]
    mean, n = sum(scores) / len(scores), len(chosen)
    controlled = length_control(chosen, rejected, lengths[:n], lengths[n:])
    return {
        "length_controlled_accuracy": controlled.accuracy,
        "calibration": calibration(chosen, rejected).to_dict() if all(map(math.isfinite, scores)) else None,
        "accuracy": sum(wins) / len(wins),
        "accuracy_interval": wilson_interval(sum(wins), len(wins)),
        "accuracy_by_margin": _by_margin(wins, margins),
        "length_correlation": pearson_correlation(scores, [float(length) for length in lengths]),
        "score_mean": mean,
        "score_std": math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)),
    }


def pearson_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None where one side is constant."""
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    scale = math.sqrt(sum((a - x_mean) ** 2 for a in x) * sum((b - y_mean) ** 2 for b in y))
    return covariance / scale if scale > 0 else None


def _by_margin(wins: Sequence[bool], margins: Sequence[float | None]) -> dict[str, float] | None:
    if len(wins) < 3 or any(margin is None for margin in margins):
        return None
    order = sorted(range(len(wins)), key=lambda index: margins[index] or 0.0)
    figures = {}
    for part, name in enumerate(("small", "medium", "large")):
        members = order[part * len(order) // 3 : (part + 1) * len(order) // 3]
        low, high = margins[members[0]], margins[members[-1]]
        figures[f"{name} ({low:.3g} to {high:.3g})"] = sum(wins[index] for index in members) / len(members)
    return figures


def card_rows(card: RewardCard) -> list[tuple[str, str]]:
    """Return the card as (name, value) lines for a table."""
    rows = [
        ("base model", f"{card.base_model}, first {card.num_layers} layers{', LoRA' if card.adapter else ''}"),
        ("pooling", f"{card.pooling} (by attention mask)"),
        ("scale and sign", f"higher is better; mean {_number(card.score_mean)}, std {_number(card.score_std)}"),
        ("chat template", "yes" if card.chat_template else "no"),
        ("longest input (tokens)", str(card.max_length)),
    ]
    if card.imported_from is not None:
        rows.append(("imported from", card.imported_from))
    elif card.train_responses is None:
        rows.append(("training pairs", str(card.train_pairs)))
    else:
        rows += [
            ("training responses", str(card.train_responses)),
            ("held-out responses", str(card.held_out_responses)),
            ("value error (root mean square)", _number(card.value_error)),
            ("explained variance", _number(card.explained_variance)),
        ]
    rows.append(("held-out pairs", str(card.held_out_pairs)))
    rows += _objective_rows(card)
    if card.accuracy is not None and card.accuracy_interval is not None:
        low, high = card.accuracy_interval
        rows.append(("held-out accuracy", f"{card.accuracy:.3f} (95% {low:.3f} to {high:.3f})"))
    for name, accuracy in (card.accuracy_by_margin or {}).items():
        rows.append((f"  margin {name}", f"{accuracy:.3f}"))
    if card.length_controlled_accuracy is not None:
        rows.append(("length-controlled accuracy", f"{card.length_controlled_accuracy:.3f}"))
    rows.append(("correlation with length", _number(card.length_correlation)))
    if card.calibration:
        c = card.calibration
        rows.append(("confidence of pairs / calibration error", f"{c['confidence']:.2f} / {c['error']:.2f}"))
    if card.fidelity:
        f = card.fidelity
        interval = f"95% {f['low']:.2f} to {f['high']:.2f}, {f['n']} responses"
        rows.append(("gradient fidelity (Spearman)", f"{f['spearman']:.2f} ({interval})"))
        gains = f"{f['top8_gain']:.2f} / {f['best8_gain']:.2f} / {f['random8_gain']:.2f}"
        share = f" ({f['top8_gain'] / f['best8_gain']:.0%} of the best)" if f["best8_gain"] > 0 else ""
        rows.append(("gain of 8: by gradient / best / random", gains + share))
    rows += [(f"dropped: {reason}", str(count)) for reason, count in card.dropped.items()]
    return rows


def _objective_rows(card: RewardCard) -> list[tuple[str, str]]:
    """Return the accuracy on each objective, and the score that all other figures are of."""
    rows = []
    for name, found in (card.objectives or {}).items():
        measured = "not measured"
        if found["pairs"]:
            low, high = found["interval"]
            measured = f"accuracy {found['accuracy']:.3f} (95% {low:.3f} to {high:.3f}, {found['pairs']} pairs)"
        rows.append((f"objective {name}", measured))
    if len(rows) > 1:
        rows.append(("score of all other figures", f"mean of the {len(rows)} objectives (weights 1/{len(rows)})"))
    return rows


def card_markdown(card: RewardCard) -> str:
    """Render README.md of a trained reward model."""
    lines = [
        "# Reward model" if card.train_responses is None else "# Value model",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name.strip()} | {value} |" for name, value in card_rows(card)),
    ]
    lines += [
        "",
        f"Load it with `reward_models.load_reward_model(folder, tokenizer=...{_outputs_wanted(card)})`, which checks "
        "these fingerprints:",
        "",
    ]
    lines += [
        f"- tokenizer `{card.tokenizer_sha256}`",
        f"- chat template `{card.template_sha256}`",
        "",
        "Trained on:" if card.imported_from is None else "Measured on:",
        "",
    ]
    lines += [f"- {name}: `{digest}`" for name, digest in card.data_files.items()]
    settings = ", ".join(f"{key} {value}" for key, value in card.training.items())
    lines += ["", f"Seed {card.seed}; {settings}." if settings else f"Seed {card.seed}."]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _outputs_wanted(card: RewardCard) -> str:
    """Return the argument of weights that a model with several objectives is loaded with."""
    names = list(card.objectives or {})
    return f", outputs={{{', '.join(f'{name!r}: 1.0' for name in names)}}}" if len(names) > 1 else ""

"""The end of a training: fidelity is measured, the card written, and the figures are printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from reward_models.settings import TrainingData
from vgf_llm.console.screen import emit, say, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reward_models.card import RewardCard


def data_files(script: TrainingData) -> dict[str, str]:
    """Return the SHA-256 of each data file that a training read."""
    from reward_models.pairs import file_digest

    read = ((script.train_dataset, script.train_split), (script.eval_dataset, script.eval_split))
    return {source: file_digest(source, split) for source, split in read if source}


def report(
    card: RewardCard,
    script: TrainingData,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    lm: Any,
    groups: list[tuple[list[int], list[list[int]]]],
    **further: Any,
) -> RewardCard:
    """Measure gradient fidelity on held-out groups of responses, write the card, print it and one line of JSON.

    Args:
        card: all but its fidelity.
        script: output folder, and how fidelity is measured.
        model: the trained model.
        tokenizer: its tokenizer.
        lm: the base model, whose shortlist substitutions come from.
        groups: (prompt, responses), as many responses in each, token ids.
        further: figures for the line of JSON.
    """
    from rich.table import Table

    from reward_models.assess import measure_fidelity
    from reward_models.card import card_rows, write_card

    if script.fidelity_responses and groups:
        try:
            card.fidelity = measure_fidelity(
                model,
                lm,
                groups,
                tokenizer,
                responses=script.fidelity_responses,
                substitutions=script.fidelity_substitutions,
                shortlist=script.fidelity_shortlist,
            ).to_dict()
        except (
            ValueError
        ) as error:  # a score that no token changes, after a step or two: the rest is still worth a card
            say(f"warning: gradient fidelity is not on the card ({error})")
    write_card(card, script.output_dir)
    kind = "Reward model" if card.train_responses is None else "Value model"
    table = Table(title=f"{kind} in {script.output_dir}", show_header=False)
    for name, text in card_rows(card):
        table.add_row(name, text)
    show(table)
    fidelity = card.fidelity or {}
    figures = {
        "accuracy": card.accuracy,
        "fidelity": fidelity.get("spearman"),
        "fidelity_interval": [fidelity["low"], fidelity["high"]] if fidelity else None,
        "top8_share": fidelity["top8_gain"] / fidelity["best8_gain"] if fidelity.get("best8_gain") else None,
        "length_correlation": card.length_correlation,
        "length_controlled_accuracy": card.length_controlled_accuracy,
    }
    emit(json.dumps(figures | further | {"steps": card.training["steps"], "train_sec": card.training["seconds"]}))
    return card

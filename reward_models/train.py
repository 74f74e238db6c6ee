"""Train a reward model on preference pairs.

    python -m reward_models.train --config recipes/<task>/reward.yaml
    accelerate launch -m reward_models.train --config recipes/<task>/reward.yaml

Writes weights (or adapter and head), tokenizer and card into output_dir, prints the card, and ends with one line of
JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward_models.frame import train_scores
from reward_models.reporting import data_files, report
from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import stage, stages, working
from vgf_llm.console.screen import say
from vgf_llm.errors import DataError
from vgf_llm.runs.resume import check_resume
from vgf_llm.settings.parse import parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reward_models.card import RewardCard
    from reward_models.pairs import EncodedPair
    from vgf_llm.data.prompts import Preferences


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0; errors that are the user's to mend are VGFErrors."""
    script, model, training = parse(
        RewardScript,
        RewardModelSettings,
        RewardTraining,
        argv=argv,
        prog="vgf-llm reward",
        description="Train a reward model on preference pairs.",
    )
    check_resume(training.resume, script.output_dir)
    with library_output(script.output_dir), stages(2):
        run(script, model, training)
    return 0


def run(script: RewardScript, settings: RewardModelSettings, training: RewardTraining) -> RewardCard | None:
    """Train, save, measure and report; returns the card on the main process, None on others.

    What an earlier run left in output_dir is cleared away once every input has been read and found good.

    Raises:
        VGFError: data, model, configuration or output folder are unusable; checked before any training.
    """
    return train_scores(_Pairs(script, training), script, settings, training)


class _Pairs:
    """Training on preference pairs, as the frame asks for it (`frame.Task`)."""

    rows = "pairs"
    libraries: tuple[str, ...] = ("reward_models.trainer",)
    shares_base = False
    loss: tuple[str, ...] = ("use_margin", "margin_scale", "centring")

    def __init__(self, script: RewardScript, training: RewardTraining) -> None:
        self.script, self.training = script, training

    @property
    def objectives(self) -> list[str]:
        """Names of the outputs that the model gets; empty for one without a name."""
        return list(self.script.objectives)

    def read(self) -> tuple[Preferences, Preferences | None]:
        """Return the pairs, and the held-out ones where they are named."""
        return read_texts(self.script)

    def encode(self, tokenizer: Any, texts: Any) -> tuple[list[Any], list[Any], dict[str, int]]:
        """Return the encoded pairs, the held-out ones, and what was dropped, by reason."""
        return load_pairs(self.script, tokenizer, self.training.seed, texts)

    def trainer(self, padding_id: int, **parts: Any) -> Any:
        """Return the trainer of the parts."""
        from reward_models.objective_trainer import ObjectiveTrainer
        from reward_models.pairs import PairCollator
        from reward_models.trainer import RewardTrainer

        kind = ObjectiveTrainer if self.objectives else RewardTrainer
        return kind(data_collator=PairCollator(padding_id), **parts)

    def facts(self, train_rows: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return fields of the card, and what it states of the loss."""
        of_loss: dict[str, Any] = {"margin in the loss": self.training.use_margin, "centring": self.training.centring}
        if self.objectives:
            columns = (f"{name} from {column}" for name, column in self.script.objectives.items())
            of_loss["objectives"] = "; ".join(columns)
        return {"train_pairs": len(train_rows)}, of_loss

    def finish(
        self, settings: RewardModelSettings, tokenizer: Any, held_out: list[Any], lm: Any, facts: dict[str, Any]
    ) -> RewardCard:
        """Read the saved model back, measure it, write its card and print it."""
        return finish(self.script, settings, tokenizer, held_out, lm, facts)


def load_pairs(
    script: RewardScript,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    texts: tuple[Preferences, Preferences | None] | None = None,
) -> tuple[list[EncodedPair], list[EncodedPair], dict[str, int]]:
    """Read, split and encode the pairs: training, held out, and what was dropped of the training rows, by reason."""
    from reward_models.pairs import encode_pairs, hold_out

    train, held_out = texts or read_texts(script)
    if held_out is not None:
        train_texts, held_texts = train.pairs, held_out.pairs
    else:
        train_texts, held_texts = hold_out(train.pairs, script.eval_share, seed)
    limits = (
        script.max_length,
        script.max_response_length,
        script.over_length == "truncate",
        script.max_dropped_share,
    )
    kept, counted = [], []
    for name, rows in (("training", train_texts), ("held out", held_texts)):
        try:
            encoded, counts = encode_pairs(tokenizer, rows, *limits)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
        say(f"{name}: {len(encoded)} pairs encoded; dropped or cut: {reasons}")
        kept.append(encoded)
        counted.append(counts)
    _check_opinions(kept[0], script.objectives)
    dropped = train.dropped | counted[0]
    return kept[0], kept[1], {reason: count for reason, count in dropped.items() if count}


def _check_opinions(pairs: list[EncodedPair], objectives: Mapping[str, str]) -> None:
    """Say how many training pairs state each objective; refuse one that none is left for."""
    for index, (name, column) in enumerate(objectives.items()):
        count = sum(pair.differences[index] != 0 for pair in pairs)
        say(f"objective {name}: {count} of {len(pairs)} training pairs have an opinion")
        if not count:
            raise DataError(
                f"training: no pair that is left has an opinion on the objective '{name}' (column '{column}'); hold "
                "back fewer, raise the limits, or leave the objective out"
            )


def read_texts(script: RewardScript) -> tuple[Preferences, Preferences | None]:
    """Read the pairs, and the held-out ones where they are named; imports no model library for local files."""
    train = _preferences(script, script.train_dataset, script.train_split, script.limit)
    if script.eval_dataset is None:
        return train, None
    return train, _preferences(script, script.eval_dataset, script.eval_split, script.eval_limit)


def _preferences(script: RewardScript, source: str, split: str, limit: int | None) -> Preferences:
    from vgf_llm.data.prompts import load_preferences

    preferences = load_preferences(
        source,
        split=split,
        limit=limit,
        prompt_column=script.prompt_column,
        chosen_column=script.chosen_column,
        rejected_column=script.rejected_column,
        margin_column=script.margin_column,
        max_dropped_share=script.max_dropped_share,
        system_column=script.system_column,
        preference_column=script.preference_column,
        objectives=script.objectives,
    )
    say(preferences.report())
    return preferences


def finish(
    script: RewardScript,
    settings: RewardModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[EncodedPair],
    lm: Any,
    facts: dict[str, Any],
) -> RewardCard:
    """Read the saved model back, measure it, write its card and print it."""
    from reward_models.assess import build_card, objective_figures
    from reward_models.loading import load_reward_model
    from reward_models.outputs import even_weights, fold_objectives

    stage("measuring it on held-out pairs")
    names, further = list(script.objectives), {}
    with working("reading the saved model back and scoring the held-out pairs"):
        base = lm if settings.lora_r else None
        model = load_reward_model(script.output_dir, base=base, dtype=lm.dtype, device=lm.device, fold=False)
        if names:
            facts["objectives"] = objective_figures(model, tokenizer, held_out)
            further["objectives"] = {name: found["accuracy"] for name, found in facts["objectives"].items()}
            fold_objectives(model, even_weights(names), f"'{script.output_dir}'")
        card = build_card(model, tokenizer, held_out, script.output_dir, data_files=data_files(script), **facts)
    pairs = [(pair.prompt, [pair.chosen, pair.rejected]) for pair in held_out]
    return report(card, script, model, tokenizer, lm, pairs, **further)


if __name__ == "__main__":
    sys.exit(run_main(main))

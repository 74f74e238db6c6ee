"""Train a token-level value from logged responses and their rewards.

    python -m reward_models.train_value --config recipes/<task>/value.yaml
    accelerate launch -m reward_models.train_value --config recipes/<task>/value.yaml

Every prefix of a response is regressed on its TD(lambda) target (`value_losses`). Writes weights (or adapter and
heads), tokenizer and card into output_dir, prints the card, and ends with one line of JSON. The folder loads like any
reward model's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward_models.frame import train_scores
from reward_models.reporting import data_files, report
from reward_models.settings import RewardModelSettings
from reward_models.value_settings import ValueScript, ValueTraining
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
    from reward_models.logged import EncodedResponse, LoggedResponse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0; errors that are the user's to mend are VGFErrors."""
    script, model, training = parse(
        ValueScript,
        RewardModelSettings,
        ValueTraining,
        argv=argv,
        prog="vgf-llm value",
        description="Train a token-level value from logged responses and their rewards.",
    )
    check_resume(training.resume, script.output_dir)
    with library_output(script.output_dir), stages(2):
        run(script, model, training)
    return 0


def run(script: ValueScript, settings: RewardModelSettings, training: ValueTraining) -> RewardCard | None:
    """Train, save, measure and report; returns the card on the main process, None on others.

    What an earlier run left in output_dir is cleared away once every input has been read and found good.

    Raises:
        VGFError: data, model, configuration or output folder are unusable; checked before any training.
    """
    return train_scores(_Responses(script, training, settings.chat_template_kwargs), script, settings, training)


class _Responses:
    """Training on logged responses, as the frame asks for it (`frame.Task`)."""

    rows = "responses"
    libraries: tuple[str, ...] = ("reward_models.value_trainer",)
    loss: tuple[str, ...] = ("td_lambda", "expectile", "target_tau")
    objectives: list[str] = []

    def __init__(self, script: ValueScript, training: ValueTraining, variables: Mapping[str, Any]) -> None:
        self.script, self.training, self.variables = script, training, variables

    @property
    def shares_base(self) -> bool:
        """Whether a LoRA may stand on the base's own weights: an engine shards them in one place only."""
        from vgf_llm.machine.precision import is_sharded

        return not is_sharded(self.training)

    def read(self) -> tuple[list[LoggedResponse], list[LoggedResponse] | None]:
        """Return the responses, and the held-out ones where they are named."""
        return read_texts(self.script, self.variables)

    def encode(self, tokenizer: Any, texts: Any) -> tuple[list[Any], list[Any], dict[str, int]]:
        """Return the encoded responses, the held-out ones, and what was dropped or cut, by reason."""
        return load_responses(self.script, tokenizer, self.training.seed, texts)

    def trainer(self, padding_id: int, **parts: Any) -> Any:
        """Return the trainer of the parts."""
        from reward_models.logged import LoggedCollator
        from reward_models.value_trainer import ValueTrainer

        return ValueTrainer(data_collator=LoggedCollator(padding_id), **parts)

    def facts(self, train_rows: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return fields of the card, and what it states of the loss."""
        training = self.training
        of_loss = {"lambda": training.td_lambda, "expectile": training.expectile, "target tau": training.target_tau}
        return {"train_pairs": 0, "train_responses": len(train_rows)}, of_loss

    def finish(
        self, settings: RewardModelSettings, tokenizer: Any, held_out: list[Any], lm: Any, facts: dict[str, Any]
    ) -> RewardCard:
        """Read the saved value back, measure it, write its card and print it."""
        return finish(self.script, settings, tokenizer, held_out, lm, facts)


def load_responses(
    script: ValueScript,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    texts: tuple[list[LoggedResponse], list[LoggedResponse] | None] | None = None,
) -> tuple[list[EncodedResponse], list[EncodedResponse], dict[str, int]]:
    """Read, split by prompt and encode: training, held out, and what was dropped or cut of the training rows."""
    from reward_models.logged import encode_logged
    from reward_models.pairs import hold_out

    train_texts, held_texts = texts or read_texts(script)
    if held_texts is None:
        train_texts, held_texts = hold_out(train_texts, script.eval_share, seed)
    truncate = script.over_length == "truncate"
    limits = (script.max_length, script.max_response_length, truncate, script.max_dropped_share)
    kept, counted = [], []
    for name, rows in (("training", train_texts), ("held out", held_texts)):
        try:
            encoded, counts = encode_logged(tokenizer, rows, *limits)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
        say(f"{name}: {len(encoded)} responses encoded; {reasons}")
        kept.append(encoded)
        counted.append(counts)
    return kept[0], kept[1], counted[0]


def read_texts(
    script: ValueScript, variables: Mapping[str, Any] | None = None
) -> tuple[list[LoggedResponse], list[LoggedResponse] | None]:
    """Read the responses, and the held-out ones where they are named; imports no model library for local files.

    `variables` of the policy's chat template reach that of a reward model that fills in rewards.
    """
    train = _logged(script, script.train_dataset, script.train_split, script.limit, variables)
    if script.eval_dataset is None:
        return train, None
    return train, _logged(script, script.eval_dataset, script.eval_split, script.eval_limit, variables)


def _logged(
    script: ValueScript, source: str, split: str, limit: int | None, variables: Mapping[str, Any] | None
) -> list[LoggedResponse]:
    from reward_models.logged import load_logged

    rows = load_logged(
        source,
        split,
        limit,
        script.prompt_column,
        script.response_column,
        script.reward_column,
        script.reward_function,
        script.max_dropped_share,
        script.system_column,
        script,
        variables,
    )
    say(f"{source}: {len(rows)} responses")
    return rows


def finish(
    script: ValueScript,
    settings: RewardModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[EncodedResponse],
    lm: Any,
    facts: dict[str, Any],
) -> RewardCard:
    """Read the saved value back, measure it, write its card and print it."""
    from reward_models.assess import build_card, score_responses
    from reward_models.loading import load_reward_model
    from reward_models.logged import response_pairs
    from reward_models.value_trainer import value_figures
    from vgf_llm.data.endings import padding_id

    stage("measuring it on held-out responses")
    with working("reading the saved value back and scoring the held-out responses"):
        base = lm if settings.lora_r else None
        model = load_reward_model(script.output_dir, base=base, dtype=lm.dtype, device=lm.device)
        values_R, rewards_R = score_responses(model, held_out, padding_id(tokenizer, len(model.embedding_table_VD)))
    figures = {
        name: None if math.isnan(figure) else figure for name, figure in value_figures(values_R, rewards_R).items()
    }
    facts |= figures | {"score_mean": float(values_R.mean()), "score_std": float(values_R.std(correction=0))}
    facts |= {"held_out_responses": len(held_out), "data_files": data_files(script)}
    card = build_card(model, tokenizer, response_pairs(held_out), script.output_dir, **facts)
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for row in held_out:
        by_prompt.setdefault(tuple(row.prompt), []).append(row.response)
    size = min(2, *(len(group) for group in by_prompt.values()))
    groups = [(list(prompt), group[:size]) for prompt, group in by_prompt.items()]
    return report(card, script, model, tokenizer, lm, groups, **figures)


if __name__ == "__main__":
    sys.exit(run_main(main))

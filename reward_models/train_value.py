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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reward_models.settings import RewardModelSettings
from reward_models.train import check_training, data_files, fit, report, training_facts, untrained_model
from reward_models.value_settings import ValueScript, ValueTraining
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, stage, stages, working
from vgf_llm.console.screen import say
from vgf_llm.errors import DataError
from vgf_llm.models.inputs import check_positions
from vgf_llm.runs.files import check_writable
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
    with library_output(script.output_dir), stages(2):
        run(script, model, training)
    return 0


def run(script: ValueScript, settings: RewardModelSettings, training: ValueTraining) -> RewardCard | None:
    """Train, save, measure and report; returns the card on the main process, None on others.

    What an earlier run left in output_dir is cleared away once every input has been read and found good.

    Raises:
        VGFError: data, model, configuration or output folder are unusable; checked before any training.
    """
    output_dir = check_writable(script.output_dir)
    check_training(settings, training, output_dir)
    check_positions(settings.model_name_or_path, script.max_length)
    with working(f"reading {script.train_dataset}"):
        texts = read_texts(script)
    load_libraries("reward_models.value_trainer", "vgf_llm.runs.hf_arguments")
    import torch
    from transformers import set_seed

    from reward_models.logged import LoggedCollator
    from reward_models.pairs import check_max_length, check_rows
    from reward_models.trainer import checkpoint_to_resume
    from reward_models.value_trainer import ValueTrainer
    from vgf_llm.data.endings import padding_id
    from vgf_llm.machine.precision import for_training, is_sharded
    from vgf_llm.models.architecture import vocabulary_rows
    from vgf_llm.models.loading import load_causal_lm, load_tokenizer
    from vgf_llm.runs.hf_arguments import training_arguments

    settings, training = for_training(settings, training)
    arguments = training_arguments(training, output_dir)
    checkpoint = checkpoint_to_resume(training, output_dir, adapter=settings.lora_r > 0)
    remote = settings.trust_remote_code
    tokenizer = load_tokenizer(
        settings.model_name_or_path,
        pad_token=settings.pad_token,
        trust_remote_code=remote,
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    with working("encoding the responses"):
        train_rows, held_out, dropped = load_responses(script, tokenizer, training.seed, texts)

    set_seed(training.seed)
    dtype = getattr(torch, settings.dtype)
    with working(f"loading the base model {settings.model_name_or_path}"):
        lm = load_causal_lm(settings.model_name_or_path, dtype=dtype, trust_remote_code=remote)
    check_max_length(script.max_length, lm.config)
    check_rows(tokenizer, [*train_rows, *held_out], vocabulary_rows(lm.config))
    trainer = ValueTrainer(
        model=untrained_model(lm, settings, training.seed, share=not is_sharded(training)),
        args=arguments,
        settings=training,
        train_dataset=train_rows,
        eval_dataset=held_out,
        data_collator=LoggedCollator(padding_id(tokenizer, vocabulary_rows(lm.config))),
        processing_class=tokenizer,
    )
    train_sec = fit(trainer, training, output_dir, checkpoint)
    if not trainer.is_world_process_zero():
        return None
    facts = {
        "max_length": script.max_length,
        "max_response_length": script.max_response_length,
        "train_pairs": 0,
        "train_responses": len(train_rows),
        "dropped": dropped,
        "seed": training.seed,
        "training": training_facts(training, settings.dtype, trainer.state.global_step, train_sec)
        | {"lambda": training.td_lambda, "expectile": training.expectile, "target tau": training.target_tau},
    }
    return finish(script, settings, tokenizer, held_out, lm.to(trainer.accelerator.device), facts)


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
    for name, texts in (("training", train_texts), ("held out", held_texts)):
        try:
            encoded, counts = encode_logged(tokenizer, texts, *limits)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
        say(f"{name}: {len(encoded)} responses encoded; {reasons}")
        kept.append(encoded)
        counted.append(counts)
    return kept[0], kept[1], counted[0]


def read_texts(script: ValueScript) -> tuple[list[LoggedResponse], list[LoggedResponse] | None]:
    """Read the responses, and the held-out ones where they are named; imports no model library for local files."""
    train = _logged(script, script.train_dataset, script.train_split, script.limit)
    if script.eval_dataset is None:
        return train, None
    return train, _logged(script, script.eval_dataset, script.eval_split, script.eval_limit)


def _logged(script: ValueScript, source: str, split: str, limit: int | None) -> list[LoggedResponse]:
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

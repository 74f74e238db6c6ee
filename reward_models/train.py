"""Train a reward model on preference pairs.

    python -m reward_models.train --config recipes/<task>/reward.yaml
    accelerate launch -m reward_models.train --config recipes/<task>/reward.yaml

Writes weights (or adapter and head), tokenizer and card into output_dir, prints the card, and ends with one line of
JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reward_models.settings import RewardModelSettings, RewardScript, RewardTraining, TrainerSettings, TrainingData
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, stage, stages, working
from vgf_llm.console.screen import emit, say, show
from vgf_llm.errors import DataError
from vgf_llm.models.inputs import check_base_model, check_positions
from vgf_llm.runs.claim import check_resumes
from vgf_llm.runs.files import check_writable
from vgf_llm.settings.parse import parse
from vgf_llm.settings.trainer_names import check_trainer_settings

_LAYERS = 6  # as in the recipe on human preferences; docs/fidelity.md has its gradient

if TYPE_CHECKING:
    from pathlib import Path

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
    with library_output(script.output_dir), stages(2):
        run(script, model, training)
    return 0


def run(script: RewardScript, settings: RewardModelSettings, training: RewardTraining) -> RewardCard | None:
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
    load_libraries("reward_models.trainer", "vgf_llm.runs.hf_arguments")
    import torch
    from transformers import set_seed

    from reward_models.pairs import PairCollator, check_max_length, check_rows
    from reward_models.trainer import RewardTrainer, checkpoint_to_resume
    from vgf_llm.data.endings import padding_id
    from vgf_llm.machine.precision import for_training
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
    with working("encoding the pairs"):
        train_pairs, held_out, dropped = load_pairs(script, tokenizer, training.seed, texts)

    set_seed(training.seed)
    dtype = getattr(torch, settings.dtype)
    with working(f"loading the base model {settings.model_name_or_path}"):
        lm = load_causal_lm(settings.model_name_or_path, dtype=dtype, trust_remote_code=remote)
    check_max_length(script.max_length, lm.config)
    check_rows(tokenizer, [*train_pairs, *held_out], vocabulary_rows(lm.config))
    trainer = RewardTrainer(
        model=untrained_model(lm, settings, training.seed),
        args=arguments,
        settings=training,
        train_dataset=train_pairs,
        eval_dataset=held_out,
        data_collator=PairCollator(padding_id(tokenizer, vocabulary_rows(lm.config))),
        processing_class=tokenizer,
    )
    train_sec = fit(trainer, training, output_dir, checkpoint)
    if not trainer.is_world_process_zero():
        return None
    facts = {
        "max_length": script.max_length,
        "max_response_length": script.max_response_length,
        "train_pairs": len(train_pairs),
        "dropped": dropped,
        "seed": training.seed,
        "training": training_facts(training, settings.dtype, trainer.state.global_step, train_sec)
        | {"margin in the loss": training.use_margin, "centring": training.centring},
    }
    return finish(script, settings, tokenizer, held_out, lm.to(trainer.accelerator.device), facts)


def untrained_model(lm: Any, settings: RewardModelSettings, seed: int, share: bool = False) -> Any:
    """Cut the reward model from the base, head at zero, with a LoRA around it (or around the base) where one is set."""
    from reward_models.value_model import build_value_model

    return build_value_model(
        lm,
        num_layers=_layers_kept(settings.num_layers, lm),
        pooling=settings.pooling,
        input_skip=settings.input_skip,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        seed=seed,
        base_name=settings.model_name_or_path,
        train_embeddings=settings.train_embeddings,
        lora_target_modules=settings.lora_target_modules,
        lora_dropout=settings.lora_dropout,
        share=share,
    )


def _layers_kept(stated: int | str | None, lm: Any) -> int | None:
    """Return the decoder layers to keep, None for all: what is stated, or what docs/fidelity.md measured to do well."""
    from vgf_llm.models.architecture import num_layers

    if stated != "auto":
        return stated  # type: ignore[return-value]
    return min(_LAYERS, num_layers(lm.config))


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
    for name, texts in (("training", train_texts), ("held out", held_texts)):
        try:
            encoded, counts = encode_pairs(tokenizer, texts, *limits)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
        say(f"{name}: {len(encoded)} pairs encoded; dropped or cut: {reasons}")
        kept.append(encoded)
        counted.append(counts)
    dropped = train.dropped | counted[0]
    return kept[0], kept[1], {reason: count for reason, count in dropped.items() if count}


def read_texts(script: RewardScript) -> tuple[Preferences, Preferences | None]:
    """Read the pairs, and the held-out ones where they are named; imports no model library for local files."""
    train = _preferences(script, script.train_dataset, script.train_split, script.limit)
    if script.eval_dataset is None:
        return train, None
    return train, _preferences(script, script.eval_dataset, script.eval_split, script.eval_limit)


def check_training(settings: RewardModelSettings, training: TrainerSettings, output_dir: Path) -> None:
    """Look at everything that can be judged without a model: base model, trainer settings, output folder.

    Raises:
        VGFError: Something is unusable.
    """
    from reward_models.folder import check_is_ours

    check_base_model(settings.model_name_or_path)
    check_trainer_settings(training)
    check_resumes(training.resume_from_checkpoint, output_dir)
    check_is_ours(output_dir)


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
    )
    say(preferences.report())
    return preferences


def fit(trainer: Any, training: TrainerSettings, output_dir: str | Path, checkpoint: str | None) -> float:
    """Clear the folder of an earlier run, train, and save weights and tokenizer; returns the seconds of training."""
    from reward_models.folder import clear_earlier_run
    from reward_models.frame import announce, keeps_lines, score_figures
    from reward_models.trainer import add_embedding_noise
    from vgf_llm.console.trainer_screen import shown

    if trainer.is_world_process_zero():
        clear_earlier_run(output_dir, keep_checkpoints=checkpoint is not None)
    trainer.accelerator.wait_for_everyone()
    scale = training.embedding_noise
    noise = add_embedding_noise(trainer.model, scale, training.seed) if scale else None
    start = time.monotonic()
    announce(trainer)
    with shown(trainer, "training", score_figures, keeps_lines(trainer)):
        trainer.train(resume_from_checkpoint=checkpoint)
    train_sec = time.monotonic() - start
    if noise is not None:
        noise.remove()
    with working("saving the model"):
        trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return train_sec


def training_facts(training: TrainerSettings, dtype: str, steps: int, train_sec: float) -> dict[str, Any]:
    """Return the settings that every card states."""
    return {
        "steps": steps,
        "rows a step and device": training.per_device_train_batch_size * training.gradient_accumulation_steps,
        "learning rate": training.learning_rate,
        "head learning rate": training.head_learning_rate or training.learning_rate,
        "embedding noise": training.embedding_noise,
        "dtype": dtype,
        "bf16": training.bf16,
        "seconds": round(train_sec, 1),
    }


def finish(
    script: RewardScript,
    settings: RewardModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[EncodedPair],
    lm: Any,
    facts: dict[str, Any],
) -> RewardCard:
    """Read the saved model back, measure it, write its card and print it."""
    from reward_models.assess import build_card
    from reward_models.loading import load_reward_model

    stage("measuring it on held-out pairs")
    with working("reading the saved model back and scoring the held-out pairs"):
        base = lm if settings.lora_r else None
        model = load_reward_model(script.output_dir, base=base, dtype=lm.dtype, device=lm.device)
        card = build_card(model, tokenizer, held_out, script.output_dir, data_files=data_files(script), **facts)
    pairs = [(pair.prompt, [pair.chosen, pair.rejected]) for pair in held_out]
    return report(card, script, model, tokenizer, lm, pairs)


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
    }
    emit(json.dumps(figures | further | {"steps": card.training["steps"], "train_sec": card.training["seconds"]}))
    return card


if __name__ == "__main__":
    sys.exit(run_main(main))

"""The frame of reward and value training: inputs, model, checkpoints and result are handled alike, rows are not.

A kill at any moment leaves checkpoints that are whole or absent (`vgf_llm.runs.checkpoint`), and in output_dir the
weights of one run (`vgf_llm.runs.result`); the card is written last. `resume: true` continues from the newest
checkpoint and ends bit for bit where the uninterrupted run does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reward_models.settings import RewardModelSettings, TrainerSettings, TrainingData
from vgf_llm.console.progress import load_libraries, working
from vgf_llm.errors import ConfigError
from vgf_llm.models.inputs import check_base_model, check_positions
from vgf_llm.runs.files import check_writable
from vgf_llm.runs.result import copy_result, replaced, settle
from vgf_llm.runs.resume import STATE_NAME, check_resume, refuse_new_run
from vgf_llm.settings.trainer_names import check_trainer_settings

if TYPE_CHECKING:
    from reward_models.card import RewardCard

_LAYERS = 6  # as in the recipe on human preferences; docs/fidelity.md has its gradient
_ADAPTER_NAME = "adapter_config.json"
_OPTIMISATION = (
    "learning_rate",
    "head_learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_ratio",
    "weight_decay",
    "embedding_noise",
    "seed",
)


class Task(Protocol):
    """What differs between a training on pairs and one on logged responses."""

    rows: str
    """What a row is called, in the plural."""
    libraries: tuple[str, ...]
    """Modules that take long to import."""
    loss: tuple[str, ...]
    """Settings of the loss."""

    @property
    def objectives(self) -> list[str]:
        """Names of the outputs that the model gets; empty for one without a name."""

    @property
    def shares_base(self) -> bool:
        """Whether a LoRA may stand on the base's own weights."""

    def read(self) -> Any:
        """Return the texts of training and held-out rows; imports no model library for local files."""

    def encode(self, tokenizer: Any, texts: Any) -> tuple[list[Any], list[Any], dict[str, int]]:
        """Return the training rows, the held-out ones, and what was dropped, by reason."""

    def trainer(self, padding_id: int, **parts: Any) -> Any:
        """Return the `ScoreTrainer` of the parts."""

    def finish(
        self, settings: RewardModelSettings, tokenizer: Any, held_out: list[Any], lm: Any, facts: dict[str, Any]
    ) -> RewardCard:
        """Read the saved model back, measure it, write its card and print it."""

    def facts(self, train_rows: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return fields of the card, and what it states of the loss."""


def train_scores(
    task: Task, script: TrainingData, settings: RewardModelSettings, training: TrainerSettings
) -> RewardCard | None:
    """Train, save, measure and report; returns the card on the main process, None on others.

    What an earlier run left in output_dir is cleared away once every input has been read and found good.

    Raises:
        VGFError: data, model, configuration or output folder are unusable; checked before any training.
    """
    check_resume(training.resume, script.output_dir)
    output_dir = check_writable(script.output_dir)
    settle(output_dir)
    check_training(settings, training, output_dir)
    check_positions(settings.model_name_or_path, script.max_length)
    with working(f"reading {script.train_dataset}"):
        texts = task.read()
    load_libraries(*task.libraries, "vgf_llm.runs.hf_arguments")
    from transformers import set_seed

    from reward_models.pairs import check_max_length, check_rows
    from vgf_llm.machine.precision import for_training
    from vgf_llm.models.base import load_base, tokenizer_of
    from vgf_llm.models.loading import fingerprint
    from vgf_llm.runs.going_on import find
    from vgf_llm.runs.hf_arguments import training_arguments

    settings, training = for_training(settings, training)
    arguments = training_arguments(training, output_dir)
    checkpoint = find(output_dir, training.resume, arguments.process_index == 0, unlisted=True)
    if checkpoint is not None:
        refuse_other_kind(checkpoint, adapter=settings.lora_r > 0)
    tokenizer = tokenizer_of(settings)
    with working(f"encoding the {task.rows}"):
        train_rows, held_out, dropped = task.encode(tokenizer, texts)
    set_seed(training.seed)
    with working(f"loading the base model {settings.model_name_or_path}"):
        base = load_base(settings, tokenizer)
    lm = base.lm
    check_max_length(script.max_length, lm.config)
    check_rows(tokenizer, [*train_rows, *held_out], base.rows)
    model = untrained_model(lm, settings, training.seed, task.shares_base, task.objectives)
    trainer = task.trainer(
        base.pad_id,
        model=model,
        args=arguments,
        settings=training,
        identity=identity_of(task, settings, training, train_rows, fingerprint(tokenizer), model),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    train_sec = fit(trainer, training, output_dir, checkpoint)
    if not trainer.is_world_process_zero():
        return None
    fields, of_loss = task.facts(train_rows)
    facts = {
        "max_length": script.max_length,
        "max_response_length": script.max_response_length,
        "dropped": dropped,
        "seed": training.seed,
        "training": training_facts(training, settings.dtype, trainer.state.global_step, train_sec) | of_loss,
        **fields,
    }
    return task.finish(settings, tokenizer, held_out, lm.to(trainer.accelerator.device), facts)


def check_training(settings: RewardModelSettings, training: TrainerSettings, output_dir: Path) -> None:
    """Look at everything that can be judged without a model: base model, trainer settings, output folder.

    Raises:
        VGFError: Something is unusable.
    """
    from reward_models.folder import check_is_ours

    check_base_model(settings.model_name_or_path)
    check_trainer_settings(training)
    refuse_new_run(training.resume, output_dir)
    check_is_ours(output_dir)


def refuse_other_kind(checkpoint: Path, adapter: bool) -> None:
    """Refuse a checkpoint of no training, or of a LoRA where all weights are trained, or the other way round.

    Raises:
        ConfigError: Naming the folder and what it holds.
    """
    if not (checkpoint / STATE_NAME).is_file():
        raise ConfigError(f"resume: '{checkpoint}' is not a checkpoint: it has no {STATE_NAME}")
    if (checkpoint / _ADAPTER_NAME).is_file() != adapter:
        kinds = ("a LoRA", "lora_r is 0") if not adapter else ("no LoRA", "lora_r is above 0")
        raise ConfigError(f"resume: '{checkpoint}' holds {kinds[0]}, but {kinds[1]}; set lora_r as it was")


def untrained_model(
    lm: Any, settings: RewardModelSettings, seed: int, share: bool = False, objectives: Sequence[str] = ()
) -> Any:
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
        objectives=objectives,
    )


def _layers_kept(stated: int | str | None, lm: Any) -> int | None:
    """Return the decoder layers to keep, None for all: what is stated, or what docs/fidelity.md measured to do well."""
    from vgf_llm.models.architecture import num_layers

    return min(_LAYERS, num_layers(lm.config)) if isinstance(stated, str) else stated


def identity_of(
    task: Task,
    settings: RewardModelSettings,
    training: TrainerSettings,
    train_rows: list[Any],
    tokens: Any,
    model: Any,
) -> dict[str, Any]:
    """Return what a checkpoint is a checkpoint of: model, base weights, data, loss and optimisation.

    Args:
        task: Pairs or responses.
        settings: Of the model, nothing left at "auto".
        training: Of the trainer.
        train_rows: Encoded rows.
        tokens: Fingerprint of the tokenizer.
        model: Untrained; it carries the mark of the base's weights.
    """
    from reward_models.loading import reward_model

    values = ([getattr(row, field.name) for field in dataclasses.fields(row)] for row in train_rows)
    rows = json.dumps([[one for one in row if one != ()] for row in values])  # no differences: as earlier versions
    return {
        "rows": task.rows,
        "model": dataclasses.asdict(settings),
        "weights": reward_model(model).config.base_weights,
        **({"objectives": list(task.objectives)} if task.objectives else {}),
        "tokenizer": [tokens.tokenizer, tokens.template],
        "dataset": hashlib.sha256(rows.encode()).hexdigest(),
        "loss": {name: getattr(training, name) for name in task.loss},
        "optimisation": {name: getattr(training, name) for name in _OPTIMISATION},
        "trainer_arguments": training.trainer_arguments,
    }


def fit(trainer: Any, training: TrainerSettings, output_dir: Path, checkpoint: Path | None) -> float:
    """Train from a checkpoint or anew and put weights and tokenizer in place; returns the seconds of training.

    Raises:
        VGFError: The checkpoint is not whole or of another run, or the folder refuses a write.
    """
    from reward_models.folder import LAST_NAME, clear_earlier_run, stale_names
    from vgf_llm.runs.going_on import check, check_length, is_finished, make_way
    from vgf_llm.runs.trainer_internals import steps_wanted

    first, step, done, before_sec = trainer.is_world_process_zero(), 0, False, 0.0
    if checkpoint is not None:
        engine, steps = trainer.identity["engine"], steps_wanted(trainer)
        step = check(checkpoint, trainer.identity, engine, first=first, allow=training.allow_changes, unlisted=True)
        check_length(checkpoint, steps, training.max_steps)
        done = is_finished(checkpoint, steps)
        before_sec = trained_sec(checkpoint, output_dir, done)
    make_way(output_dir, checkpoint, step, training.resume, first)
    if training.resume is False and first:
        clear_earlier_run(output_dir)
    trainer.accelerator.wait_for_everyone()
    train_sec = before_sec if done else _train(trainer, training, checkpoint, before_sec)
    with working("saving the model"):
        if done and checkpoint is not None:
            _take_result(trainer, checkpoint, output_dir)
        elif first:
            with replaced(output_dir, LAST_NAME, stale_names) as staging:
                trainer.save_model(str(staging))
        else:
            trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return train_sec


def trained_sec(checkpoint: Path, output_dir: Path, done: bool) -> float:
    """Return the seconds of training up to a checkpoint, 0 where an earlier version kept none.

    Of a finished run the card has them then.
    """
    from reward_models.card import CARD_NAME
    from reward_models.trainer import SECONDS_KEY
    from vgf_llm.runs.log_sums import saved_figures

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(saved_figures(checkpoint)[SECONDS_KEY])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads((output_dir / CARD_NAME).read_bytes())["training"]["seconds"]) if done else 0.0
    return 0.0


def _train(trainer: Any, training: TrainerSettings, checkpoint: Path | None, before_sec: float) -> float:
    """Take the steps that are left; returns the seconds, those before the checkpoint included."""
    from reward_models.noise import add_embedding_noise
    from reward_models.training_log import announce, keeps_lines, score_figures
    from vgf_llm.console.trainer_screen import shown

    scale = training.embedding_noise
    noise = add_embedding_noise(trainer.model, scale, training.seed) if scale else None
    trainer.noise = noise
    trainer.started = start = time.monotonic() - before_sec
    announce(trainer)
    with shown(trainer, "training", score_figures, keeps_lines(trainer)):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    train_sec = time.monotonic() - start
    if noise is not None:
        noise.remove()
    return train_sec


def _take_result(trainer: Any, checkpoint: Path, output_dir: Path) -> None:
    """Put the weights of a run that was stopped after its last step in place, from that checkpoint or its best."""
    from transformers import TrainerState

    from reward_models.folder import LAST_NAME, stale_names
    from vgf_llm.console.screen import say
    from vgf_llm.runs.going_on import best_of

    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_NAME))
    if not trainer.is_world_process_zero():
        return
    source = best_of(checkpoint)
    taken = "" if source == checkpoint else f" (the result is that of '{source}', the best)"
    say(f"'{checkpoint}' is of the last step: nothing is left to train{taken}; raise max_steps to train on")
    with replaced(output_dir, LAST_NAME, stale_names) as staging:
        copy_result(source, staging)


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

"""Reward-model training on transformers' Trainer: one forward of 2B rows a batch, Bradley-Terry loss.

`ScoreTrainer` is what reward and value training share: a learning rate for the heads, the logged means, and checkpoints
that are published whole (`vgf_llm.runs.publishing`) and continue bit for bit.

Departs from TRL's RewardTrainer: scores are pooled by mask (pad == eos is harmless), the head is trained and saved
under LoRA too, and checkpoints hold the reward model's own config.json.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from reward_models.loading import reward_model
from reward_models.losses import bradley_terry
from reward_models.noise import EmbeddingNoise
from reward_models.settings import RewardTraining, TrainerSettings
from reward_models.splitting import frozen_tensors, is_split, whole_tensors
from vgf_llm.distributed.fsdp import require_sharding, shard_on_cpu
from vgf_llm.distributed.shards import engine_name
from vgf_llm.machine.precision import require_float32
from vgf_llm.runs.log_sums import ContinuesLogging, save_log_sums
from vgf_llm.runs.publishing import published

SECONDS_KEY = "train_sec"
"""Of a checkpoint's figures: seconds of training up to it, over all runs that made it."""


class ScoreTrainer(Trainer):
    """Trainer of a model with linear heads; a subclass computes the loss and records its metrics.

    Args:
        settings: Learning rates and the loss.
        identity: What a checkpoint is a checkpoint of: model, data, loss, optimisation; the trainer adds the processes,
            what shards and the precision.

    Attributes:
        started: When training began, in seconds of the monotonic clock; earlier by those of the runs before.
    """

    target_name = ""
    """Tensor of a batch that predictions are compared with."""

    def __init__(
        self, *args: Any, settings: TrainerSettings, identity: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        shard_on_cpu()
        super().__init__(*args, **kwargs)
        require_float32(self)
        self.settings: Any = settings
        self.noise: EmbeddingNoise | None = None
        self._identity = identity or {}
        self._frozen = frozen_tensors(self)
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._staging: Path | None = None
        self.started = time.monotonic()

    # Steps -----------------------------------------------------------------------------------------------------------

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Add a training batch's metrics to those of the next log line."""
        self._batches += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimiser, with a learning rate of their own for the linear heads where one is set."""
        if self.optimizer is not None or self.settings.head_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        whole: Any = self.model if model is None else model
        named = whole.named_parameters()
        heads = [p for name, p in named if {"head", "skip_head"} & set(name.split(".")) and p.requires_grad]
        members = {id(parameter) for parameter in heads}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in members]
        optimizer.add_param_group({"params": heads, "lr": self.settings.head_learning_rate, "weight_decay": 0.0})
        return optimizer

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the scores, and what they are compared with (`target_name`)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), scores.detach(), inputs[self.target_name]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean training metrics since the last training line."""
        if "loss" in logs and self._batches:
            logs |= self.means()
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)

    def means(self) -> dict[str, float]:
        """Return the mean of every metric that was recorded since the last training line."""
        return {name: round(float(total / self._batches), 4) for name, total in self._sums.items()}

    def over_devices(self, own: int, device: torch.device) -> Tensor:
        """Add up a count of this process over all of them."""
        count = torch.tensor(own, device=device)
        return torch.as_tensor(self.accelerator.gather(count)).sum() if self.accelerator.num_processes > 1 else count

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must not change when the run is resumed."""
        return self._identity | {
            "processes": self.args.world_size,
            "engine": engine_name(self.accelerator),
            "mixed_precision": str(self.accelerator.mixed_precision),
        }

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as the Trainer does, read back what a checkpoint holds beyond it, and refuse a model left whole."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        require_sharding(self.model_wrapped)
        if resume_from_checkpoint is not None:
            self.add_callback(ContinuesLogging(self, resume_from_checkpoint, self._load_sums))
            self.state.compute_steps(self.args, max_steps)  # of these settings, not of the checkpoint's
            noise = self._noise_path(resume_from_checkpoint)
            if self.noise is not None and noise.is_file():
                self.noise.load_state_dict(load_file(noise))
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, whole where an engine has split it; called on all processes."""
        if not is_split(self):
            super().save_model(output_dir, _internal_call)
            return
        tensors = whole_tensors(self, self._frozen)
        if self.args.should_save:
            self._save(output_dir or self._folder, tensors)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        config = reward_model(self.accelerator.unwrap_model(self.model)).config
        config.save_pretrained(output_dir or self._folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, publish it, and delete those beyond the limit."""
        step, writes = self.state.global_step, self.args.should_save
        with published(
            self._folder,
            step,
            writes=writes,
            wait=self.accelerator.wait_for_everyone,
            identity=lambda: self.identity,
            limit=self.args.save_total_limit,
            best=self._best_name,
        ) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self._best_name() is not None:  # the Trainer has noted the place that it was written to
                self.state.best_model_checkpoint = str(Path(self._folder) / str(self._best_name()))
                if writes:
                    self.state.save_to_json(str(staging / f"checkpoint-{step}" / TRAINER_STATE_NAME))

    @property
    def _folder(self) -> str:
        """Output folder of the run."""
        return str(self.args.output_dir)

    def _best_name(self) -> str | None:
        best = self.state.best_global_step
        return f"checkpoint-{best}" if best and self.state.best_model_checkpoint else None

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, its parent is the folder beside its place."""
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write what every process has of its own: random states, and the sums of the next log line."""
        super()._save_rng_state(output_dir)
        sums = {name: float(total) for name, total in self._sums.items()}
        figures = {"batches": self._batches, "sums": sums, SECONDS_KEY: time.monotonic() - self.started}
        save_log_sums(self, output_dir, figures)
        if self.noise is not None:
            save_file(self.noise.state_dict(), self._noise_path(output_dir))

    def _load_sums(self, saved: dict[str, Any]) -> None:
        self._batches = saved["batches"]
        self._sums = {name: torch.tensor(total, device=self.args.device) for name, total in saved["sums"].items()}

    def _noise_path(self, folder: str | Path) -> Path:
        return Path(folder) / f"noise_state_{self.args.process_index}.safetensors"


class RewardTrainer(ScoreTrainer):
    """Trainer over `PairCollator` batches; its targets are the margins [B]."""

    target_name = "margin"

    def __init__(self, *args: Any, settings: RewardTraining, **kwargs: Any) -> None:
        """Take the Trainer's arguments and the loss settings."""
        super().__init__(*args, settings=settings, compute_metrics=pair_accuracy, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Score 2B rows and compare the halves; outputs are the scores [B, 2]."""
        margin_B = inputs["margin"] * self.settings.margin_scale if self.settings.use_margin else None
        rewards_2B = model(**{name: tensor for name, tensor in inputs.items() if name != "margin"})
        chosen_B, rejected_B = rewards_2B.chunk(2)
        loss, metrics = bradley_terry(chosen_B, rejected_B, margin_B, self.settings.centring)
        if model.training:
            self.record(metrics)
        return (loss, torch.stack([chosen_B, rejected_B], dim=1)) if return_outputs else loss


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of pairs whose chosen response scores higher."""
    chosen_B, rejected_B = prediction.predictions.T  # type: ignore[union-attr]
    return {"accuracy": float((chosen_B > rejected_B).mean())}

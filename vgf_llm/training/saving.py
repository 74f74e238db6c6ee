"""Saving and resuming of a trainer, whole or not at all; a mixin for transformers' Trainer.

A checkpoint holds the policy as users load it (a PEFT adapter, or a transformers model), ``value/`` where a value is
learned, ``trained.safetensors`` with what the policy's own files do not hold exactly, ``target.safetensors``, and the
Trainer's optimiser, scheduler, random states and progress; under DeepSpeed and FSDP their own shards (engine_state.py);
and what the next log line has so far. It is written beside its place and published by one rename (checkpoint.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reward_models.value_model import save_value_model
from vgf_llm.distributed.fsdp import require_sharding
from vgf_llm.distributed.gather import full_tensors
from vgf_llm.distributed.shards import copy_whole, save_engine_state, without_frozen
from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.runs.checkpoint import publish, rotate, saving, staging_folder, writing
from vgf_llm.runs.provenance import write_base
from vgf_llm.training.identity import identity_of_trainer
from vgf_llm.training.log_state import GoesOnLogging, save_log_state

TRAINED_NAME, TARGET_NAME, VALUE_FOLDER = "trained.safetensors", "target.safetensors", "value"


def _restore_on_cpu(storage: Any, location: str) -> Any:
    """Processes of a CPU group call their device cpu:0, which torch.load does not know by itself."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(15, lambda storage: None, _restore_on_cpu)


class SavesWhole:
    """Publishes checkpoints by rename, and reads them back; expects the attributes of `VGFTrainer`."""

    _staging: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        gpus = kwargs["args"].n_gpu
        if gpus > 1:
            raise ConfigError(
                f"this process sees {gpus} GPUs, and would copy the model to all of them at every forward; start one "
                f"process a GPU with `accelerate launch --num_processes {gpus} -m ...`, or set CUDA_VISIBLE_DEVICES=0"
            )
        super().__init__(*args, **kwargs)

    @functools.cached_property
    def whole_identity(self) -> dict[str, Any]:
        """What must not change when the run is resumed; first asked for while the base is whole on every process."""
        return self.identity | identity_of_trainer(self)

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return every trained parameter by name, whole and on the host, on every process."""
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return full_tensors(self.model, names)

    def value_tensors(self) -> dict[str, Tensor]:
        """Return what the value's folder holds, whole and on the host, on every process; empty without a value."""
        if self.learned is None:
            return {}
        model = self.learned.model
        only_trained = hasattr(model, "peft_config")
        named = model.named_parameters()
        return full_tensors(model, [name for name, p in named if p.requires_grad or not only_trained])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy and, where one is learned, the value.

        Raises:
            OutputError: They cannot be written.
        """
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call:
            self._write_model(folder, with_state=True)
            return
        advice = "checkpoints are untouched: free some space and go on with resume: true"
        with writing(f"result '{folder}'", folder, advice):
            self._write_model(folder, with_state=False)

    def _write_model(self, folder: Path, with_state: bool) -> None:
        tensors, value = self.trained_tensors(), self.value_tensors()
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.models.policy.save_pretrained(folder, state_dict=under(tensors, "policy."))
            self.tokenizer.save_pretrained(folder)
            if self.models.is_lora:
                write_base(folder, self.models.policy_lm.name_or_path, self.models.base_weights)
            if self.learned is not None:
                save_value_model(self.learned.model, folder / VALUE_FOLDER, self.tokenizer, value)
                self.learned.save_secant(folder / VALUE_FOLDER, under(tensors, "secant."))
            if with_state:
                self._write_state(folder, tensors)
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write what a resumed run needs beyond what users load."""
        own = tensors if self.models.is_lora else {k: v for k, v in tensors.items() if not k.startswith("policy.")}
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, folder / TRAINED_NAME)
        if self.learned is not None:
            save_file(self.learned.target.state_dict(), folder / TARGET_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, publish it, and delete those beyond the limit."""
        step, output_dir = self.state.global_step, Path(self.args.output_dir)
        if self.args.should_save:
            staging_folder(output_dir, step)
        self.accelerator.wait_for_everyone()
        partial = output_dir / f".checkpoint-{step}.partial"
        with saving(partial):
            self._staging = partial
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with saving(partial):
                _lift(partial, partial / f"checkpoint-{step}")
            publish(partial, output_dir, step, self.whole_identity)
            rotate(output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, its parent is the folder beside its place."""
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the state of the optimiser and the schedule, without frozen weights."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            save_engine_state(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        """Write what every process has of its own: random states, and the sums of the next log line."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        save_log_state(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the trained parameters back, each of them."""
        folder = Path(resume_from_checkpoint)
        found = load_file(folder / TRAINED_NAME)
        if not self.models.is_lora:
            for path in sorted(folder.glob("model*.safetensors")):
                found |= {f"policy.{name}": tensor for name, tensor in load_file(path).items()}
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        missing = sorted(set(parameters) - set(found))
        if missing:
            raise CheckpointError(f"'{folder}' lacks {missing[0]} and {len(missing) - 1} more; it is of another model")
        for name, parameter in parameters.items():
            copy_whole(parameter, found[name])

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as the Trainer does, and read back the value's target and the sums of the next log line."""
        _ = self.whole_identity  # before an engine splits the weights
        resumes_shards = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        with without_frozen(self.model) if resumes_shards else contextlib.nullcontext():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[misc]
        require_sharding(self.model_wrapped)
        if resume_from_checkpoint is not None:
            if self.learned is not None:
                self.learned.target.load_state_dict(load_file(Path(resume_from_checkpoint) / TARGET_NAME))
            self.add_callback(GoesOnLogging(self, resume_from_checkpoint))
            self.state.compute_steps(self.args, max_steps)  # of these settings, not of the checkpoint's
        self.journal.start(self.state.global_step)
        return prepared


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, under their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _lift(target: Path, inner: Path) -> None:
    """Move what the Trainer wrote into its own subfolder up into the staging folder."""
    for path in list(inner.iterdir()):
        os.rename(path, target / path.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(inner)

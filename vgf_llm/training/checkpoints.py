"""The checkpoints and the result of a run, written whole or not at all, and read back.

A checkpoint holds the policy as users load it (a PEFT adapter, or a transformers model), ``value/`` where a value is
learned, ``trained.safetensors`` with what the policy's own files do not hold exactly, ``target.safetensors``,
``reward_statistics.json`` where rewards are standardised by running statistics, ``direction/`` and its
state where one is fitted, and the Trainer's optimiser, scheduler, random states and progress; under DeepSpeed and FSDP
their own shards (shards.py); and what the next log line has so far. It is written next to its place
and published by one rename.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reward_models.running import RunningRewards
from reward_models.value_model import save_value_model
from vgf_llm.distributed.gather import full_tensors, under
from vgf_llm.distributed.shards import copy_whole
from vgf_llm.errors import CheckpointError
from vgf_llm.models.inputs import ADAPTER_NAME
from vgf_llm.runs.checkpoint import writing
from vgf_llm.runs.files import write_json_atomic
from vgf_llm.runs.provenance import BASE_NAME, write_base
from vgf_llm.runs.publishing import published
from vgf_llm.runs.result import replaced
from vgf_llm.training.fitted_direction import DIRECTION_FOLDER
from vgf_llm.training.identity import identity_of_models
from vgf_llm.training.learned_value import LearnedValue
from vgf_llm.training.policy_models import PolicyModels
from vgf_llm.training.transport import Transport

if TYPE_CHECKING:
    from accelerate import Accelerator

STATISTICS_NAME = "reward_statistics.json"
TRAINED_NAME, TARGET_NAME, VALUE_FOLDER = "trained.safetensors", "target.safetensors", "value"


class Checkpoints:
    """Writes what a run has trained, and reads it back.

    Methods that write are called by all processes; the first one writes.

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints kept; None keeps all.
        models: The policy.
        learned: The value that is learned along, or None.
        tokenizer: Saved with what is trained.
        accelerator: Of the run's processes.
        identity: What must not change when the run is resumed, as far as the settings tell.
        running: Statistics of the rewards.
        transport: What has learned to carry responses.

    Attributes:
        staging: Folder that a checkpoint is being written into; None in between.
    """

    def __init__(
        self,
        output_dir: str | Path,
        limit: int | None,
        models: PolicyModels,
        learned: LearnedValue | None,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        identity: dict[str, Any],
        running: RunningRewards,
        transport: Transport,
    ) -> None:
        self.running, self.transport = running, transport
        self.output_dir, self.limit = Path(output_dir), limit
        self.models, self.learned, self.tokenizer = models, learned, tokenizer
        self.accelerator = accelerator
        self.staging: Path | None = None
        self._identity, self._whole_identity = identity, dict[str, Any]()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when the run is resumed; first asked for while the base is whole on every process."""
        if not self._whole_identity:
            self._whole_identity = self._identity | identity_of_models(self.models, self.accelerator)
        return self._whole_identity

    def write_result(self, model: nn.Module, folder: Path) -> None:
        """Write the policy and, where one is learned, the value.

        Raises:
            OutputError: They cannot be written.
        """
        with self.replacing(folder) if self.is_first else contextlib.nullcontext(folder) as staging:
            self.write(model, staging, with_state=False)
        self.accelerator.wait_for_everyone()  # the files are in their places

    @contextlib.contextmanager
    def replacing(self, folder: Path) -> Iterator[Path]:
        """Yield a hidden folder whose content takes the place of an earlier result; called on one process.

        A kill leaves the old result or the new one (`vgf_llm.runs.result`).

        Raises:
            OutputError: It cannot be written.
        """
        advice = "checkpoints are untouched: free some space and continue with resume: true"
        last = ADAPTER_NAME if self.models.is_lora else "config.json"
        with writing(f"result '{folder}'", folder, advice), replaced(folder, last, self._stale) as staging:
            yield staging

    def _stale(self, folder: Path) -> list[str]:
        """Name what an earlier run left that the new result would be read together with."""
        own = () if self.models.is_lora else ("model*.safetensors", "model.safetensors.index.json")
        patterns = (ADAPTER_NAME, "adapter_*", BASE_NAME, VALUE_FOLDER, STATISTICS_NAME, DIRECTION_FOLDER, *own)
        return list(dict.fromkeys(path.name for pattern in patterns for path in sorted(folder.glob(pattern))))

    def write(self, model: nn.Module, folder: Path, with_state: bool) -> None:
        """Write policy and value into a folder.

        Args:
            model: The `PolicyAndValue` without its wrapper.
            folder: Made if missing.
            with_state: Whether what a resumed run needs beyond what users load is written too.

        Raises:
            OSError, RuntimeError, SafetensorError: Something cannot be written.
        """
        tensors, value = trained_tensors(model), self._value_tensors()
        if self.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self.models.save_policy(folder, under(tensors, "policy."))
            self.tokenizer.save_pretrained(folder)
            if self.models.is_lora:
                write_base(folder, str(self.models.policy_lm.name_or_path), self.models.base_weights)
            if self.learned is not None:
                save_value_model(self.learned.model, folder / VALUE_FOLDER, self.tokenizer, value)
                self.learned.save_secant(folder / VALUE_FOLDER, under(tensors, "secant."))
            if self.running.by_name:
                write_json_atomic(folder / STATISTICS_NAME, self.running.state_dict())
            self.transport.save(folder, with_state)
            if with_state:
                self._write_state(folder, tensors)
        self.accelerator.wait_for_everyone()

    def _value_tensors(self) -> dict[str, Tensor]:
        """Return what the value's folder holds, whole and on the host, on every process; empty without a value."""
        if self.learned is None:
            return {}
        model = self.learned.model
        only_trained = hasattr(model, "peft_config")
        named = model.named_parameters()
        return full_tensors(model, [name for name, p in named if p.requires_grad or not only_trained])

    def _write_state(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        own = tensors if self.models.is_lora else {k: v for k, v in tensors.items() if not k.startswith("policy.")}
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, folder / TRAINED_NAME)
        if self.learned is not None:
            save_file(self.learned.target.state_dict(), folder / TARGET_NAME)

    @contextlib.contextmanager
    def publishing(self, step: int) -> Iterator[None]:
        """Let a checkpoint be written inside the block, then publish it and delete those beyond the limit.

        The Trainer writes ``checkpoint-<step>`` into `staging`.

        Raises:
            OutputError: Something could not be written.
        """
        wait = self.accelerator.wait_for_everyone
        with published(
            self.output_dir, step, writes=self.is_first, wait=wait, identity=lambda: self.identity, limit=self.limit
        ) as staging:
            self.staging = staging
            try:
                yield
            finally:
                self.staging = None

    def load(self, model: nn.Module, folder: Path) -> None:
        """Read the trained parameters back, each of them.

        Raises:
            CheckpointError: One is missing.
        """
        found = load_file(folder / TRAINED_NAME)
        if not self.models.is_lora:
            for path in sorted(folder.glob("model*.safetensors")):
                found |= {f"policy.{name}": tensor for name, tensor in load_file(path).items()}
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        missing = sorted(set(parameters) - set(found))
        if missing:
            raise CheckpointError(f"'{folder}' lacks {missing[0]} and {len(missing) - 1} more; it is of another model")
        for name, parameter in parameters.items():
            copy_whole(parameter, found[name])

    def load_target(self, folder: Path) -> None:
        """Read the value's target back, where there is one."""
        if self.learned is not None:
            self.learned.target.load_state_dict(load_file(folder / TARGET_NAME))

    def load_transport(self, folder: Path) -> None:
        """Read back what the transport has learned; called on all processes.

        Raises:
            CheckpointError: It is missing.
        """
        self.transport.load(folder)

    def load_running(self, folder: Path) -> None:
        """Read the rewards' statistics back, where there are some; called on all processes.

        Raises:
            CheckpointError: They are missing.
        """
        if not self.running.by_name:
            return
        try:
            self.running.load_state_dict(json.loads((folder / STATISTICS_NAME).read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"'{folder}' lacks the statistics of {error}; it is of other rewards") from error


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every trained parameter by name, whole and on the host; called on all processes."""
    return full_tensors(model, [name for name, parameter in model.named_parameters() if parameter.requires_grad])

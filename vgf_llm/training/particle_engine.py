"""The engine that a run's particles are sampled and decoded in: started, given the policy's weights, proved, closed.

    particles_from: reference   the engine runs the frozen base, and is given nothing
    particles_from: policy      it is given the adapter, or all weights, before the first prompts of every step

Every process starts an engine of its own; behind a URL there is one for all, and the first process alone gives it
weights. These go through a folder of safetensors under ``output_dir``, gathered from all processes and written by the
first. All weights are removed as soon as every engine has them, an adapter when the next one has taken its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vgf_llm.distributed.gather import full_tensors, under
from vgf_llm.distributed.processes import of_first
from vgf_llm.engines.engine import EngineRequest, EngineText, TakesWeights
from vgf_llm.engines.engine_reference import EngineReference, check_truncated
from vgf_llm.engines.inspected_engine import InspectedEngine
from vgf_llm.engines.vllm_env import IN_THIS_PROCESS, runs_in_this_process, stated
from vgf_llm.errors import ConfigError
from vgf_llm.models.architecture import max_positions
from vgf_llm.models.base import LoadedBase
from vgf_llm.runs.checkpoint import writing
from vgf_llm.settings import SamplingSettings
from vgf_llm.training.metrics import MetricSums
from vgf_llm.training.policy_models import PolicyModels
from vgf_llm.training.settings import PolicySettings, VGFSettings
from vgf_llm.training.sync_proof import require_sync, sync_bound, sync_distance

if TYPE_CHECKING:
    from accelerate import Accelerator

PUSHED_FOLDER = ".pushed"


@dataclass(frozen=True)
class EngineRun:
    """The run that an engine is for.

    Attributes:
        models: Policy and reference.
        base: Tokenizer and ids of the base model.
        table_VD: Input embeddings that particles live in.
        metrics: Gets the distance between the engine's weights and the trainer's.
        accelerator: Of the run's processes.
        output_dir: Folder of the run.
        longest_prompt_tokens: Of the training prompts.
    """

    models: PolicyModels
    base: LoadedBase
    table_VD: Tensor
    metrics: MetricSums
    accelerator: Accelerator
    output_dir: Path
    longest_prompt_tokens: int

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)


class ParticleEngine:
    """An engine with a run's policy or reference in it.

    Args:
        run: Whose weights they are.
        method: Says which of them, and whether they are proved.
        sampling: The distribution of responses.
        start: Starts the engine.
        dtype: Of the engine's parameters.
        adapter: LoRA that the base model is, by what the engine knows it as.

    Raises:
        EngineError: It does not start.
    """

    def __init__(
        self,
        run: EngineRun,
        method: VGFSettings,
        sampling: SamplingSettings,
        start: Callable[[], TakesWeights],
        dtype: str,
        adapter: str | None = None,
    ) -> None:
        self.run, self.dtype = run, dtype
        self.runs_policy, self.proves = method.particles_from == "policy", method.sync_check
        self.shared = method.engine.url is not None
        self.folder = run.output_dir.resolve() / PUSHED_FOLDER
        self._run_id = of_first(uuid.uuid4().hex[:8])  # a folder of an earlier run is never taken for one of this
        self._pushed: Path | None = None
        self._step = 0
        self._unproved = False
        self._clear()
        with _own_gpu(run.device, run.accelerator.num_processes):  # last: nothing may fail between start and close
            self.engine = start()
        self.reference = EngineReference(
            InspectedEngine(self.engine, self._prove),
            run.models.policy_lm,
            sampling,
            run.base.eos_ids,
            run.base.pad_id,
            run.device,
            adapter,
            vocabulary=run.base.vocabulary,
        )

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Give the engine the weights of now, where they are the policy's; what it writes next is proved.

        Called by all processes, with whole weights.

        Args:
            model: The `PolicyAndValue` without its wrapper.
            step: Optimiser steps done.

        Raises:
            EngineError: It does not take them.
        """
        self._step = step
        if self.runs_policy:
            self._push(model)
        self._unproved = self.proves

    def close(self) -> None:
        """Stop the engine and remove what was pushed."""
        try:
            self.engine.close()
        finally:
            self._clear()

    def _push(self, model: nn.Module) -> None:
        run, before = self.run, self._pushed
        folder = self.folder / f"{self._run_id}-{self._step}"
        if folder == before:
            return
        self._pushed = folder
        names = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("policy.")]
        tensors = under(full_tensors(model, names), "policy.")
        if run.is_first:
            with writing("the weights that the engine is given", folder, "free some space, and resume"):
                run.models.save_policy(folder, tensors)
        run.accelerator.wait_for_everyone()
        if run.models.is_lora:
            self.reference.adapter = self.engine.push_adapter(folder) if self._gives else str(folder)
        elif self._gives:
            self.engine.push_weights(folder)
        run.accelerator.wait_for_everyone()
        # Weights are in the engine for good; vLLM may read an adapter again for as long as it answers with it.
        needless = before if run.models.is_lora else folder
        if run.is_first and needless is not None:
            shutil.rmtree(needless, ignore_errors=True)

    @property
    def _gives(self) -> bool:
        return not self.shared or self.run.is_first

    def _prove(self, requests: Sequence[EngineRequest], texts: Sequence[EngineText]) -> None:
        """Compare what the engine wrote first in a step with the trainer's weights."""
        if not self._unproved:
            return
        self._unproved, models = False, self.run.models
        policy = contextlib.nullcontext(models.policy_lm)
        with policy if self.runs_policy else models.reference() as model:
            distance, tokens = sync_distance(model, requests, texts, self.reference.pad_id)
            bound = sync_bound(model, self.dtype)
        self.run.metrics.add("sync/logps_abs", distance)
        require_sync(distance, tokens, bound, self._step + 1, self.engine.name, self.dtype)

    def _clear(self) -> None:
        if self.run.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)


EngineMaker = Callable[[EngineRun], ParticleEngine]
"""Starts the engine of a run."""


def engine_maker(
    policy: PolicySettings, method: VGFSettings, sampling: SamplingSettings, processes: int
) -> EngineMaker | None:
    """Return what starts the engine of a run, or None where it has none.

    Raises:
        ConfigError: Engine, sampling settings and launch do not go together; found before anything is loaded.
        EngineError: The adapter's rank is beyond what vLLM knows.
    """
    if method.backend == "transformers":
        return None
    if method.backend != "vllm":
        raise ConfigError(f"backend must be transformers or vllm in training, got {method.backend!r}")
    from vgf_llm.engines.start import adapter_of, start_engine
    from vgf_llm.engines.vllm_engine import lora_room
    from vgf_llm.models.loading import base_model_name
    from vgf_llm.settings import ModelSettings

    pushes, own = method.particles_from == "policy", method.engine.url is None
    check_truncated(sampling)
    if own and processes > 1:
        _require_engines_apart(method, processes)
    if pushes and policy.lora_r:
        lora_room(policy.lora_r)
    models = ModelSettings(policy.model_name_or_path, dtype=policy.dtype, trust_remote_code=policy.trust_remote_code)
    adapter = adapter_of(models) if own and not pushes else None
    if pushes:  # an adapter that is trained on in full is part of the weights that are pushed
        models = dataclasses.replace(models, model_name_or_path=base_model_name(models.model_name_or_path))

    def make(run: EngineRun) -> ParticleEngine:
        def start() -> TakesWeights:
            lora = run.models.lora_config if pushes else None
            longest = _longest_tokens(run, sampling)
            return start_engine(models, sampling, method.engine, run.table_VD, pushed=lora, max_length=longest)

        return ParticleEngine(run, method, sampling, start, policy.dtype, adapter)

    return make


def _longest_tokens(run: EngineRun, sampling: SamplingSettings) -> int:
    """Return the most tokens that the engine will hold of a text: less than its model's limit needs less memory."""
    needed = run.longest_prompt_tokens + sampling.max_new_tokens
    limit = max_positions(run.models.policy_lm.config) or needed + 1
    return min(needed + 1, limit)  # an engine writes a token after what it is to read


def _require_engines_apart(method: VGFSettings, processes: int) -> None:
    if method.engine.tensor_parallel > 1:
        raise ConfigError(
            f"engine.tensor_parallel must be 1 where each of {processes} processes starts an engine on its own device, "
            f"got {method.engine.tensor_parallel}; start a server for all of them and name it in engine.url"
        )
    if runs_in_this_process():
        raise ConfigError(
            f"{stated(IN_THIS_PROCESS)} would run an engine inside each of {processes} processes, whose "
            "group it cannot join; unset it"
        )


@contextlib.contextmanager
def _own_gpu(device: torch.device, processes: int) -> Iterator[None]:
    """Let an engine that is started see no GPU but this process's."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device.type != "cuda" or processes == 1:
        yield
        return
    own = str(device.index) if seen is None else seen.split(",")[device.index]
    os.environ["CUDA_VISIBLE_DEVICES"] = own
    try:
        yield
    finally:
        if seen is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = seen

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vgf_llm.distributed.gather import full_tensors
from vgf_llm.distributed.processes import of_first
from vgf_llm.engines.engine import EngineRequest, EngineText, TakesWeights
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.errors import ConfigError
from vgf_llm.models.architecture import max_positions
from vgf_llm.runs.checkpoint import writing
from vgf_llm.settings import SamplingSettings
from vgf_llm.training.saving import under
from vgf_llm.training.settings import PolicySettings, VGFSettings
from vgf_llm.training.sync_proof import require_sync, sync_bound, sync_distance

if TYPE_CHECKING:
    from vgf_llm.training.trainer import VGFTrainer

PUSHED_FOLDER = ".pushed"
EngineStart = Callable[[Tensor], TakesWeights]
"""Starts an engine, given the input embeddings that particles live in."""


class ParticleEngine:
    """An engine with a trainer's policy or reference in it.

    Args:
        trainer: Whose weights they are.
        start: Starts the engine.
        dtype: Of the engine's parameters.
        adapter: LoRA that the base model is, by what the engine knows it as.

    Raises:
        EngineError: It does not start.
    """

    def __init__(self, trainer: VGFTrainer, start: EngineStart, dtype: str, adapter: str | None = None) -> None:
        self.trainer, self.dtype = trainer, dtype
        self.runs_policy = trainer.method.particles_from == "policy"
        self.shared = trainer.method.engine.url is not None
        self.folder = Path(trainer.args.output_dir).resolve() / PUSHED_FOLDER
        self._run = of_first(uuid.uuid4().hex[:8])  # a folder of an earlier run is never taken for one of this
        self._pushed: Path | None = None
        self._unproved = False
        self._clear()
        value, _ = trainer.flow_value()
        # Made first: nothing is to fail between the start of an engine and where it is closed.
        self.law = EngineReference(
            None,
            trainer.models.policy_lm,
            trainer.sampling,
            trainer.eos_ids,
            trainer.pad_id,
            trainer.args.device,
            adapter,
            vocabulary=trainer.vocabulary,
        )
        self.law.on_written = self._prove
        with _own_gpu(trainer):
            self.engine = self.law.engine = start(value.embedding_table_VD)

    def begin_step(self) -> None:
        """Give the engine the weights of now, where they are the policy's; what it writes next is proved.

        Called by all processes, with whole weights.

        Raises:
            EngineError: It does not take them.
        """
        if self.runs_policy:
            self._push()
        self._unproved = self.trainer.method.sync_check

    def close(self) -> None:
        """Stop the engine and remove what was pushed."""
        try:
            self.engine.close()
        finally:
            self._clear()

    def _push(self) -> None:
        trainer, before = self.trainer, self._pushed
        folder = self.folder / f"{self._run}-{trainer.state.global_step}"
        if folder == before:
            return
        self._pushed = folder
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad and name.startswith("policy.")]
        tensors = under(full_tensors(trainer.model, names), "policy.")
        if trainer.args.should_save:
            with writing("the weights that the engine is given", folder, "free some space, and resume"):
                trainer.models.policy.save_pretrained(folder, state_dict=tensors)
        trainer.accelerator.wait_for_everyone()
        if trainer.models.is_lora:
            self.law.adapter = self.engine.push_adapter(folder) if self._gives else str(folder)
        elif self._gives:
            self.engine.push_weights(folder)
        trainer.accelerator.wait_for_everyone()
        # Weights are in the engine for good; vLLM may read an adapter again for as long as it answers with it.
        needless = before if trainer.models.is_lora else folder
        if trainer.args.should_save and needless is not None:
            shutil.rmtree(needless, ignore_errors=True)

    @property
    def _gives(self) -> bool:
        return not self.shared or self.trainer.is_world_process_zero()

    def _prove(self, requests: list[EngineRequest], texts: list[EngineText]) -> None:
        """Hold what the engine wrote first in a step against the trainer's weights."""
        if not self._unproved or not texts:
            return
        self._unproved, trainer = False, self.trainer
        policy = contextlib.nullcontext(trainer.models.policy_lm)
        with policy if self.runs_policy else trainer.models.reference() as model:
            distance, tokens = sync_distance(model, requests, texts, self.law.pad_id)
            bound = sync_bound(model, self.dtype)
        trainer.metrics.add("sync/logps_abs", distance)
        require_sync(distance, tokens, bound, trainer.state.global_step + 1, self.engine.name, self.dtype)

    def _clear(self) -> None:
        if self.trainer.args.should_save:
            shutil.rmtree(self.folder, ignore_errors=True)


EngineMaker = Callable[["VGFTrainer"], ParticleEngine]
"""Starts the engine of a trainer."""


class SamplesInEngine:
    """Keeps an engine for as long as training lasts; a mixin that expects the attributes of `VGFTrainer`."""

    particle_engine: ParticleEngine | None = None
    make_engine: EngineMaker | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; the engine, where there is one, is closed however that ends."""
        if self.make_engine is None:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        self.particle_engine = self.make_engine(self)
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            engine, self.particle_engine = self.particle_engine, None
            engine.close()


def engine_maker(
    policy: PolicySettings, method: VGFSettings, sampling: SamplingSettings, processes: int
) -> EngineMaker | None:
    """Return what starts the engine of a run, or None where it has none.

    Raises:
        ConfigError: The engine, the sampling law and the launch do not go together; found before anything is loaded.
        EngineError: The adapter's rank is beyond what vLLM knows.
    """
    if method.backend != "vllm":
        return None
    from vgf_llm.engines.start import adapter_of, start_engine
    from vgf_llm.engines.vllm_engine import lora_room
    from vgf_llm.models.loading import base_model_name
    from vgf_llm.settings import ModelSettings

    pushes, own = method.particles_from == "policy", method.engine.url is None
    if not sampling.top_k:
        raise ConfigError("top_k must be at least 1 with backend vllm, got 0: an engine reports the top k of a law")
    if own and processes > 1:
        _require_engines_apart(method, processes)
    if pushes and policy.lora_r:
        lora_room(policy.lora_r)
    models = ModelSettings(policy.model_name_or_path, dtype=policy.dtype, trust_remote_code=policy.trust_remote_code)
    adapter = adapter_of(models) if own and not pushes else None
    if pushes:  # an adapter that is trained on in full is part of the weights that are pushed
        models = dataclasses.replace(models, model_name_or_path=base_model_name(models.model_name_or_path))

    def make(trainer: VGFTrainer) -> ParticleEngine:
        def start(table_VD: Tensor) -> TakesWeights:
            lora = trainer.models.policy.peft_config["default"].to_dict() if pushes and trainer.models.is_lora else None
            return start_engine(models, sampling, method.engine, table_VD, pushed=lora, max_length=_longest(trainer))

        return ParticleEngine(trainer, start, policy.dtype, adapter)

    return make


def _longest(trainer: VGFTrainer) -> int:
    """Return the most tokens that the engine will hold of a text: less than its model's limit needs less memory."""
    needed = max(len(row.ids) for row in trainer.train_dataset) + trainer.sampling.max_new_tokens
    limit = max_positions(trainer.models.policy_lm.config) or needed + 1
    return min(needed + 1, limit)  # an engine writes a token after what it is to read


def _require_engines_apart(method: VGFSettings, processes: int) -> None:
    if method.engine.tensor_parallel > 1:
        raise ConfigError(
            f"engine.tensor_parallel must be 1 where each of {processes} processes starts an engine on its own device, "
            f"got {method.engine.tensor_parallel}; start a server for all of them and name it in engine.url"
        )
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        raise ConfigError(
            f"VLLM_ENABLE_V1_MULTIPROCESSING=0 would run an engine inside each of {processes} processes, whose "
            "group it cannot join; unset it"
        )


@contextlib.contextmanager
def _own_gpu(trainer: VGFTrainer) -> Iterator[None]:
    """Let an engine that is started see no GPU but this process's."""
    device, seen = trainer.args.device, os.environ.get("CUDA_VISIBLE_DEVICES")
    if device.type != "cuda" or trainer.accelerator.num_processes == 1:
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

"""VGFTrainer: sample, transport, decode, score, learn the value, distil; on transformers' Trainer.

An optimiser step takes its micro-batches of prompts first, rolls each out, counts what the losses are divided by over
all of them and all processes, and only then runs forward and backward. So one process with a batch of 2B, two with B,
and accumulation over two of B take the same step.

The work is done by objects that know nothing of the trainer: `Distributions` (what is sampled from), `Transport`
(what carries responses), `RolloutWorker` (sample, transport, decode, score), `Learner` (batches and losses), `Observer`
(log lines), `Checkpoints` and `ParticleEngine`.

Departs from TRL's GRPOTrainer: no policy gradient; what is learned from are transported responses, and the distance
they went is part of every log line.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from vgf_llm.distributed.fsdp import require_sharding
from vgf_llm.distributed.gather import summed, whole_weights
from vgf_llm.distributed.shards import save_engine_state, without_frozen
from vgf_llm.errors import ConfigError, DivergedError
from vgf_llm.machine.precision import require_float32
from vgf_llm.models.base import LoadedBase
from vgf_llm.runs.log_sums import load_log_sums, save_log_sums
from vgf_llm.runs.trainer_internals import rows_per_forward
from vgf_llm.settings import SamplingSettings
from vgf_llm.training.batch import Counts, TrainBatch, without_effect
from vgf_llm.training.checkpoints import Checkpoints
from vgf_llm.training.distillation import make_distillation
from vgf_llm.training.distributions import Distributions
from vgf_llm.training.learned_value import LearnedValue
from vgf_llm.training.learner import Learner
from vgf_llm.training.metrics import MetricSums
from vgf_llm.training.observing import Observer, ends_in_log_line
from vgf_llm.training.particle_engine import EngineMaker, EngineRun
from vgf_llm.training.policy_models import PolicyAndValue, PolicyModels
from vgf_llm.training.rewards import Rewards
from vgf_llm.training.rollout import PromptBatch, PromptRow, Rollout, own_rows
from vgf_llm.training.rollout_worker import RolloutWorker
from vgf_llm.training.run_log import RunLog
from vgf_llm.training.settings import VGFSettings
from vgf_llm.training.transport import make_transport


class VGFTrainer(Trainer):
    """Fine-tune a policy, and a value if one is learned, on transported responses.

    Args:
        models: Policy and reference.
        learned: The value that is learned along, or None: the rewards' own models drive the flow.
        rewards: What responses are scored by.
        method: Budget, decoder, loss.
        sampling: The distribution that responses are sampled from.
        base: Tokenizer and ids of the base model.
        identity: What must not change when the run is resumed.
        args: Of transformers' Trainer.
        train_dataset: Prompts.
        make_engine: Starts the engine that particles are sampled and decoded in; None: transformers does, here.
        callbacks: Further callbacks of transformers' Trainer.

    Raises:
        ConfigError: This process sees several GPUs, or trained weights are in a half precision.
    """

    def __init__(
        self,
        models: PolicyModels,
        learned: LearnedValue | None,
        rewards: Rewards,
        method: VGFSettings,
        sampling: SamplingSettings,
        base: LoadedBase,
        identity: dict[str, Any],
        *,
        args: TrainingArguments,
        train_dataset: list[PromptRow],
        make_engine: EngineMaker | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        _refuse_data_parallel(args.n_gpu)
        dataset: Any = train_dataset  # neither are what the Trainer's annotations ask for
        collator: Any = PromptBatch
        super().__init__(
            model=PolicyAndValue(models.policy, *(() if learned is None else (learned.model, learned.secant))),
            args=args,
            train_dataset=dataset,
            processing_class=base.tokenizer,
            data_collator=collator,
            callbacks=callbacks,
        )
        require_float32(self)
        self.model_accepts_loss_kwargs = True  # losses are divided by global counts, never by accumulation steps
        models.to(args.device)
        if learned is not None:
            learned.start()
        self.models, self.learned, self.method, self.base = models, learned, method, base
        self.rewards = rewards
        self.output_dir = Path(str(args.output_dir))
        self.prompts, self.make_engine, self.metrics = train_dataset, make_engine, MetricSums()
        self.run_log = RunLog(self.output_dir, base.tokenizer, writes=self.is_world_process_zero())
        self.distributions = Distributions(models, base, sampling, method, args.seed)
        self.transport = make_transport(method, self.distributions, rewards, learned, self.metrics, self.accelerator)
        self.worker = RolloutWorker(self.distributions, self.transport, rewards, self.metrics)
        self.learner = Learner(make_distillation(method), learned, self.distributions, self.metrics, self.accelerator)
        self.observer = Observer(
            self.distributions, rewards, method.budget, self.metrics, self.run_log, self.accelerator
        )
        self.checkpoints = Checkpoints(
            self.output_dir,
            args.save_total_limit,
            models,
            learned,
            base.tokenizer,
            self.accelerator,
            identity,
            rewards.running,
            self.transport,
        )
        self._resumed_from: Path | None = None
        self.add_callback(_AroundSteps(self))

    @property
    def module(self) -> nn.Module:
        """Everything that trains, as `PolicyAndValue`, without what wraps it for training."""
        return cast(nn.Module, self.model)

    # One optimiser step: roll out every micro-batch, count, then learn ------------------------------------------------

    def own(self, rows: list[PromptRow]) -> tuple[list[PromptRow], bool]:
        """Return what is this process's own of the prompts of a forward, and whether it counts."""
        left = 0
        if self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            left = len(self.prompts) % (rows_per_forward(self) * self.accelerator.num_processes)
        return own_rows(rows, self.accelerator.process_index, left)

    def micro_batch(self, rows: list[PromptRow], count: bool) -> TrainBatch:
        """Roll out this process's own prompts, and return the tensors of their forward."""
        seen, step = self.rewards.running.seen, self.state.global_step
        with self.metrics.muted(not count):
            rollout = self.rollout(rows)
            batch = self.learner.batch(rollout, step)
        if count:
            self.transport.see(rollout, step)
        else:
            self.rewards.running.forget(seen)
        return batch if count else without_effect(batch)

    def rollout(self, prompts: list[PromptRow]) -> Rollout:
        """Sample, transport, decode and score; measure, where the step ends in a log line."""
        self.module.eval()
        rollout = self.worker(prompts, self.state.global_step)
        if ends_in_log_line(self.args, self.state):
            self.observer.observe(rollout, self.transport.value, self.state.global_step)
        return rollout

    def step_counts(self, batches: list[TrainBatch]) -> Counts:
        """Return what the step's losses are divided by: sums over its forwards and over all processes."""
        counts = torch.stack([batch.counts.stacked() for batch in batches]).sum(0)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return Counts.unstacked(counts)

    def refuse_to_diverge(self, name: str, value: Tensor) -> None:
        """Stop before weights that are not numbers are trained on, or saved.

        Raises:
            DivergedError: The value is infinite or NaN.
        """
        if not torch.isfinite(value):
            raise DivergedError(
                f"step {self.state.global_step + 1}: the {name} is {float(value.detach())}; lower learning_rate (now "
                f"{self.args.learning_rate:g}), or set max_grad_norm; checkpoints written before are whole"
            )

    def begin(self) -> None:
        """Start the clock of log lines, and continue the line that a checkpoint was written in the middle of."""
        self.observer.logged_at = time.perf_counter()
        folder, self._resumed_from = self._resumed_from, None
        if folder is not None and (figures := load_log_sums(self, folder)) is not None:
            self.metrics.load_state_dict(figures)

    def end_step(self) -> None:
        """Let value, direction and the rewards' statistics follow, before a checkpoint of the step is written."""
        self.rewards.running.end_step(lambda table: summed(table, self.accelerator))
        if self.learned is not None or self.transport.learns:
            with whole_weights(self.accelerator, self.model_wrapped):
                if self.learned is not None:
                    self.learned.follow()
                self.transport.end_step(self.state.global_step - 1)

    @contextlib.contextmanager
    def engine_running(self) -> Iterator[None]:
        """Keep the engine of the particles, where the settings ask for one, for as long as the context lasts."""
        if self.make_engine is None:
            yield
            return
        engine = self.distributions.engine = self.make_engine(
            EngineRun(
                self.models,
                self.base,
                self.transport.table_VD,
                self.metrics,
                self.accelerator,
                self.output_dir,
                max(len(row.ids) for row in self.prompts),
            )
        )
        try:
            yield
        finally:
            self.distributions.engine = None
            engine.close()

    # Hooks of transformers' Trainer -----------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; the engine, where there is one, is closed however that ends."""
        with self.engine_running():
            return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[PromptBatch], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Take the step's prompts, roll them out, and count what the losses are divided by over all processes."""
        started = time.perf_counter()
        with whole_weights(self.accelerator, self.model_wrapped):
            if self.distributions.engine is not None:
                self.distributions.engine.begin_step(self.module, self.state.global_step)
            taken = (next(epoch_iterator, None) for _ in range(num_batches))
            own = [self.own(prompts.rows) for prompts in taken if prompts is not None]
            self.module.eval()
            self.transport.begin_step([rows for rows, count in own if count], self.state.global_step)
            batches = [self.micro_batch(rows, count) for rows, count in own]
        if not batches:
            return [], None
        counts = self.step_counts(batches)
        self.metrics.add("seconds/rollout", time.perf_counter() - started)
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return this forward's share of the step's loss, times the processes that gradients are averaged over."""
        batch: TrainBatch = inputs
        counts: Counts = num_items_in_batch or batch.counts
        started = time.perf_counter()
        with self.metrics.muted(not batch.has_effect):
            loss = self.learner.loss(model, batch, counts)
            self.metrics.add("seconds/forward", time.perf_counter() - started)
        self.refuse_to_diverge("loss", loss)
        processes: int = self.accelerator.num_processes
        return loss * processes

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Rollouts are on the device already, and losses keep their float32 under every engine."""
        return inputs

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing is counted: the Trainer's formula knows neither rollouts nor the value."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Tokens are among the figures of a log line."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimiser, with the learned value's parts at rates of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if self.learned is not None:
            self.learned.give_rates(optimizer)
        # FSDP2 cannot read a group without parameters back
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        """Clip the policy's and the value's gradients apart: the scale of a reward must not slow the policy.

        DeepSpeed clips in its engine, all together.
        """
        if self.learned is None or self.is_deepspeed_enabled:
            norm: Tensor | float | None = super()._clip_grad_norm(model)
            return norm
        for part in self.learned.trained:
            self.accelerator.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)
        norm = self.accelerator.clip_grad_norm_(self.models.policy.parameters(), self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float | None:
        """Return the gradient's norm, which must be finite (but where float16's loss scale is still being found)."""
        norm: float | None = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16:
            self.refuse_to_diverge("gradient's norm", torch.as_tensor(norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last line over all processes; write metrics.jsonl."""
        self.observer.write_line(logs, self.state.global_step, self.state.epoch)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy and, where one is learned, the value; into a checkpoint also what a resumed run needs.

        Raises:
            OutputError: The result cannot be written.
        """
        folder = Path(output_dir) if output_dir else self.output_dir
        if _internal_call:
            self.checkpoints.write(self.module, folder, with_state=True)
        else:
            self.checkpoints.write_result(self.module, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint next to its place, and publish it."""
        with self.checkpoints.publishing(self.state.global_step):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, its parent is the folder next to its place."""
        staging = self.checkpoints.staging
        return super()._get_output_dir(trial) if staging is None else str(staging)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the state of the optimiser and the schedule, without frozen weights."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            save_engine_state(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write what every process has of its own: random states, and the sums of the next log line."""
        super()._save_rng_state(output_dir)
        save_log_sums(self, output_dir, self.metrics.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the trained parameters back, each of them."""
        self.checkpoints.load(self.module, Path(resume_from_checkpoint))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as the Trainer does, and read back the value's target and the length of the run."""
        _ = self.checkpoints.identity  # before an engine splits the weights
        resumes_shards = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        with without_frozen(self.module) if resumes_shards else contextlib.nullcontext():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        require_sharding(self.model_wrapped)
        if resume_from_checkpoint is not None:
            self._resumed_from = Path(resume_from_checkpoint)
            self.checkpoints.load_target(self._resumed_from)
            self.checkpoints.load_running(self._resumed_from)
            self.checkpoints.load_transport(self._resumed_from)
            self.state.compute_steps(self.args, max_steps)  # of these settings, not of the checkpoint's
        self.run_log.start(self.state.global_step)
        return prepared


class _AroundSteps(TrainerCallback):
    """Tells the trainer when training begins and a step ends, and has the last step logged."""

    def __init__(self, trainer: VGFTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step()
        if state.global_step >= state.max_steps:
            control.should_log = True


def _refuse_data_parallel(gpus: int) -> None:
    """Refuse a process that sees several GPUs; transformers would split every forward over them by itself.

    Raises:
        ConfigError: Naming their number.
    """
    if gpus > 1:
        raise ConfigError(
            f"this process sees {gpus} GPUs, and would copy the model to all of them at every forward; start one "
            f"process a GPU with `accelerate launch --num_processes {gpus} -m ...`, or set CUDA_VISIBLE_DEVICES=0"
        )

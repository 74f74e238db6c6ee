"""VGFTrainer: sample, transport, decode, score, learn the value, distil; on transformers' Trainer.

An optimiser step takes its micro-batches of prompts first, rolls each out, counts what the losses are divided by over
all of them and all processes, and only then runs forward and backward. So one process with a batch of 2B, two with B,
and accumulation over two of B take the same step. Samples depend on the run's seed, the step and the prompt alone,
which makes a resumed run the same run.

Departs from TRL's GRPOTrainer: no policy gradient; what is learned from are transported responses, and the distance
they went is part of every log line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from vgf_llm.answering.implicit_policy import Outcome
from vgf_llm.answering.pipeline import make_decoder
from vgf_llm.data.endings import padding_id
from vgf_llm.distributed.gather import whole_weights
from vgf_llm.errors import DivergedError
from vgf_llm.machine.precision import require_float32
from vgf_llm.models.architecture import vocabulary_rows
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import Reference, TorchReference, row_seeds
from vgf_llm.text.law import Shortlist
from vgf_llm.text.noise import combine_seeds
from vgf_llm.text.particles import GradientSource, token_spacing
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.training.journal import Journal
from vgf_llm.training.learned_value import LearnedValue
from vgf_llm.training.losses import dpo, group_weights, kl_anchor, weighted_nll
from vgf_llm.training.metrics import MetricSums, responses_tokens, rollout_metrics
from vgf_llm.training.observing import Observes
from vgf_llm.training.particle_engine import EngineMaker, SamplesInEngine
from vgf_llm.training.policy_models import PolicyAndValue, PolicyModels, response_logps
from vgf_llm.training.rewards import Rewards
from vgf_llm.training.rollout import (
    ObservedPolicy,
    PromptBatch,
    PromptRow,
    Rollout,
    best_pair,
    own_rows,
    policy_rows,
    without_effect,
)
from vgf_llm.training.saving import SavesWhole
from vgf_llm.training.settings import VGFSettings

_SECANT_STREAM = 0x5EC  # the token changes that a secant head learns from
_SHORTLIST = 50  # likeliest tokens these come from, where the sampler's own law is too wide to be kept


class VGFTrainer(SamplesInEngine, SavesWhole, Observes, Trainer):
    """Fine-tune a policy, and a value if one is learned, on transported responses.

    Args:
        models: Policy and reference.
        learned: The value that is learned along, or None: the rewards' own models drive the flow.
        rewards: What responses are scored by.
        method: Budget, decoder, loss.
        sampling: The law that responses are sampled from.
        tokenizer: The policy's.
        eos_ids: Every id that ends a response.
        identity: What must not change when the run is resumed.
        make_engine: Starts the engine that particles are sampled and decoded in; None: transformers does, here.
        kwargs: For transformers' Trainer: args, train_dataset (of `PromptRow`), callbacks.
    """

    def __init__(
        self,
        models: PolicyModels,
        learned: LearnedValue | None,
        rewards: Rewards,
        method: VGFSettings,
        sampling: SamplingSettings,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: tuple[int, ...],
        identity: dict[str, Any],
        make_engine: EngineMaker | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=PolicyAndValue(models.policy, *(() if learned is None else (learned.model, learned.secant))),
            processing_class=tokenizer,
            data_collator=PromptBatch,
            **kwargs,
        )
        require_float32(self)
        self.models, self.learned, self.rewards, self.method = models, learned, rewards, method
        self.sampling, self.tokenizer, self.eos_ids, self.identity = sampling, tokenizer, eos_ids, identity
        self.make_engine = make_engine
        rows = vocabulary_rows(models.policy_lm.config)
        self.vocabulary, self.pad_id = min(len(tokenizer), rows), padding_id(tokenizer, rows)
        self.model_accepts_loss_kwargs = True  # losses are divided by global counts, never by accumulation steps
        models.to(self.args.device)
        self._reward_value = rewards.value() if learned is None else None
        if learned is not None:
            learned.start()
        self._length_unit: float | None = None
        self.metrics = MetricSums()
        self.journal = Journal(self.args.output_dir, tokenizer, writes=self.is_world_process_zero())
        self.add_callback(_AfterStep(self))

    # One optimiser step: roll out every micro-batch, count, then learn ------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[PromptBatch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor] | None]:
        """Take the step's prompts, roll them out, and count what the losses are divided by over all processes."""
        started = time.perf_counter()
        batches = []
        with whole_weights(self.accelerator, self.model_wrapped):
            if self.particle_engine is not None:
                self.particle_engine.begin_step()
            for _ in range(num_batches):
                prompts = next(epoch_iterator, None)
                if prompts is not None:
                    batches.append(self.micro_batch(prompts.rows))
        if not batches:
            return [], None
        names = sorted(batches[0]["counts"])
        counts = torch.stack([torch.stack([batch["counts"][name] for name in names]) for batch in batches]).sum(0)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self.metrics.add("seconds/rollout", time.perf_counter() - started)
        return batches, dict(zip(names, counts, strict=True))

    def micro_batch(self, rows: list[PromptRow]) -> dict[str, Any]:
        """Roll out what is this process's own of its prompts, and return the tensors of their forward."""
        left = 0
        if self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            left = len(self.train_dataset) % (self._train_batch_size * self.accelerator.num_processes)
        rows, count = own_rows(rows, self.accelerator.process_index, left)
        with self.metrics.muted(not count):
            batch = self.compute_targets(self.rollout(rows))
        return batch if count else without_effect(batch)

    def rollout(self, prompts: list[PromptRow]) -> Rollout:
        """Sample, transport, decode and score."""
        self.model.eval()
        seeds_BN = self.seeds(prompts)
        with self.particle_law() as law:
            (originals, sample_sec) = _timed(lambda: self.sample(law, prompts, seeds_BN))
            policy = self.implicit_policy(law)
            (outcome, transport_sec) = _timed(lambda: self.transport(policy, originals, seeds_BN))
        started = time.perf_counter()
        original_scores, transported_scores = self.score(prompts, outcome)
        seconds = {"sample": sample_sec, "transport": transport_sec, "score": time.perf_counter() - started}
        done = Rollout(prompts, outcome, original_scores, transported_scores, policy.first_move, seconds)
        self.metrics.update(rollout_metrics(done))
        self.metrics.total("tokens", responses_tokens(outcome.originals, outcome.transported))
        if self.logs_this_step:
            self.observe(done, policy.value)
        return done

    def seeds(self, prompts: list[PromptRow], stream: int = 0) -> Tensor:
        """Return one seed a particle, [B, N], of the run's seed, this step and the prompts alone."""
        run = combine_seeds(torch.tensor(self.args.seed), self.state.global_step)
        seed = int(combine_seeds(run, stream))
        return row_seeds(seed, [prompt.index for prompt in prompts], self.method.num_particles)

    @contextlib.contextmanager
    def particle_law(self) -> Iterator[Reference]:
        """Yield the law that particles start from and are decoded by: the reference's, or the current policy's."""
        if self.particle_engine is not None:
            yield self.particle_engine.law
            return
        if self.method.particles_from == "policy":
            yield self.law_of(self.models.policy_lm)
            return
        with self.models.reference() as base:
            yield self.law_of(base)

    def law_of(self, model: nn.Module, sampling: SamplingSettings | None = None) -> TorchReference:
        """Return a model as a law; a new one each time, since it remembers prompts under the weights of the moment."""
        return TorchReference(model, sampling or self.sampling, self.eos_ids, self.pad_id, self.vocabulary)

    def sample(self, law: Reference, prompts: list[PromptRow], seeds_BN: Tensor) -> Responses:
        """Draw N responses to each prompt."""
        return ReferenceSampler(law).sample([prompt.ids for prompt in prompts], seeds_BN)

    def flow_value(self) -> tuple[Value, GradientSource]:
        """Return what the flow climbs, and where its direction comes from."""
        return self._reward_value if self.learned is None else self.learned.flow()

    def implicit_policy(self, law: Reference) -> ObservedPolicy:
        """Return the policy that the training budget implies."""
        value, gradient = self.flow_value()
        if self._length_unit is None:
            self._length_unit = token_spacing(value.embedding_table_VD)
        return ObservedPolicy(
            ReferenceSampler(law),
            value,
            make_decoder(self.method.decoder, law, value, self.method.decoder_options),
            self.method.budget,
            gradient=gradient,
            draws=self.method.draws,
            length_unit=self._length_unit,
        )

    def transport(self, policy: ObservedPolicy, originals: Responses, seeds_BN: Tensor) -> Outcome:
        """Move the particles by the training budget and decode them."""
        return policy.improve(originals, seeds_BN)

    def score(self, prompts: list[PromptRow], outcome: Outcome) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return all rewards of the originals and of the transported responses."""
        texts = [prompt.text for prompt in prompts]
        return self.rewards(texts, outcome.originals), self.rewards(texts, outcome.transported)

    # Targets and losses -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> dict[str, Any]:
        """Return the tensors of one forward, and the counts that its losses are to be divided by."""
        started = time.perf_counter()
        batch = self.dpo_batch(rollout) if self.method.loss == "dpo" else self.weighted_batch(rollout)
        rows = batch["rows"]
        if self.method.loss == "dpo" or self.method.kl_coefficient:
            with self.models.reference() as base, self.accelerator.autocast():  # as the policy's own forward
                batch["reference_logps"] = response_logps(base, **_policy_inputs(rows)).masked_fill(~rows["mask"], 0)
        if self.method.kl_coefficient:
            batch["counts"]["tokens"] = rows["mask"].sum().float()
        if self.learned is not None:
            tensors, counts = self.value_batch(rollout)
            batch |= tensors | {"counts": batch["counts"] | counts}
        self.metrics.add("seconds/targets", time.perf_counter() - started)
        return batch

    def weighted_batch(self, rollout: Rollout) -> dict[str, Any]:
        """Return rows and weights of the responses that are distilled by weighted likelihood."""
        weights_BM = group_weights(rollout.pool_rewards_BM, self.method.weight_temperature, self.method.kept)
        keep_BM = weights_BM > 0
        rows, weights_R = policy_rows(rollout.pool, keep_BM), weights_BM[keep_BM]
        self.metrics.add("distilled_reward", rollout.pool_rewards_BM[keep_BM] @ weights_R, float(len(weights_BM)))
        count = (weights_R.unsqueeze(1) * rows["mask"]).sum()
        return {"rows": rows, "weights": weights_R, "counts": {"policy": count}}

    def dpo_batch(self, rollout: Rollout) -> dict[str, Any]:
        """Return rows of the best transported response and its original, one below the other, a pair a prompt.

        A pair whose transport did not raise the reward has weight 0.
        """
        pair_B2 = best_pair(rollout)
        rewards_B2 = rollout.pool_rewards_BM.gather(1, pair_B2)
        pool = rollout.pool.take(pair_B2)
        every_B2 = torch.ones_like(pair_B2, dtype=torch.bool)
        weights_B = (rewards_B2[:, 0] > rewards_B2[:, 1]).float()
        return {"rows": policy_rows(pool, every_B2), "weights": weights_B, "counts": {"policy": weights_B.sum()}}

    def value_batch(self, rollout: Rollout) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what the learned value, and its secant head, learn from, and what their losses are divided by."""
        batch, counts = self.learned.value_batch(rollout)
        if self.learned.secant is not None:
            originals = rollout.outcome.originals
            seeds_BN = self.seeds(rollout.prompts, _SECANT_STREAM)
            tensors, more = self.learned.secant_batch(originals, self.shortlists(originals), seeds_BN)
            batch, counts = batch | tensors, counts | more
        return batch, counts

    def shortlists(self, originals: Responses) -> Shortlist:
        """Return the likeliest tokens at every position of the originals: those the sampler kept, or by a forward."""
        if originals.law is not None:
            return originals.law
        with self.particle_law() as law:
            sampling = dataclasses.replace(self.sampling, top_k=_SHORTLIST)
            return law.shortlists(law.prefix(originals.prompts), originals, sampling)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return this forward's share of the step's loss, times the processes that gradients are averaged over."""
        started = time.perf_counter()
        counts = num_items_in_batch or inputs["counts"]
        with self.metrics.muted(inputs.get("without_effect", False)):
            loss = self.share_of_loss(model, inputs, counts)
            self.metrics.add("seconds/forward", time.perf_counter() - started)
        self.refuse_to_diverge("loss", loss)
        return loss * self.accelerator.num_processes

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

    def share_of_loss(self, model: nn.Module, inputs: dict[str, Any], counts: dict[str, Tensor]) -> Tensor:
        """Run policy and value, and return their losses over the step's counts."""
        logps_RT, values_RS, directions_RSD = model(
            _policy_inputs(inputs["rows"]), inputs.get("value_inputs"), inputs.get("secant_features_RSF")
        )
        loss = self.amortisation_loss(logps_RT, inputs, counts)
        if values_RS is not None:
            part, metrics = self.learned.loss(values_RS, directions_RSD, inputs, counts)
            loss = loss + part
            self.metrics.update(metrics)
        return loss

    def amortisation_loss(self, logps_RT: Tensor, inputs: dict[str, Any], counts: dict[str, Tensor]) -> Tensor:
        """Return the distillation loss, with the KL anchor where one is set."""
        mask_RT, weights = inputs["rows"]["mask"], inputs["weights"]
        if self.method.loss == "dpo":
            policy_B2 = logps_RT.masked_fill(~mask_RT, 0).sum(-1).view(-1, 2)
            reference_B2 = inputs["reference_logps"].sum(-1).view(-1, 2)
            loss, metrics = dpo(
                *policy_B2.unbind(1), *reference_B2.unbind(1), self.method.dpo_beta, weights, counts["policy"]
            )
        else:
            loss, metrics = weighted_nll(logps_RT, mask_RT, weights, counts["policy"])
        if self.method.kl_coefficient:
            penalty, more = kl_anchor(logps_RT, inputs["reference_logps"], mask_RT, counts["tokens"])
            loss, metrics = loss + self.method.kl_coefficient * penalty, metrics | more
        self.metrics.update(metrics)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rollouts are on the device already, and losses keep their float32 under every engine."""
        return inputs

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
            return super()._clip_grad_norm(model)
        for part in self.learned.trained:
            self.accelerator.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)
        return self.accelerator.clip_grad_norm_(self.models.policy.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float | None:
        """Return the gradient's norm, which must be finite (but where float16's loss scale is still being found)."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16:
            self.refuse_to_diverge("gradient's norm", torch.as_tensor(norm))
        return norm

    def update_target(self) -> None:
        """Let the value's target follow it."""
        if self.learned is not None:
            with whole_weights(self.accelerator, self.model_wrapped):
                self.learned.follow()


class _AfterStep(TrainerCallback):
    """Updates the value's target before a checkpoint of the step is written, and logs the last step."""

    def __init__(self, trainer: VGFTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.logged_at = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.update_target()
        if state.global_step >= state.max_steps:
            control.should_log = True


def _policy_inputs(rows: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "input_ids": rows["input_ids"],
        "attention_mask": rows["attention_mask"],
        "length": rows["mask"].shape[1],
    }


def _timed(function: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started

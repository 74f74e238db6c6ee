"""Puts a trainer together: base model, prompts, rewards and value are loaded in this order, and handed to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from reward_models.modelling import RewardModel
from reward_models.value_model import build_value_model
from vgf_llm.answering.pipeline import check_table
from vgf_llm.console.progress import working
from vgf_llm.data.dialogue import PromptText
from vgf_llm.data.encoding import encode_prompts
from vgf_llm.distributed.fsdp import fsdp_was_asked_for, shard_on_cpu
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.errors import ConfigError
from vgf_llm.machine.precision import for_training
from vgf_llm.models.base import LoadedBase, load_base
from vgf_llm.models.whole import loaded_whole
from vgf_llm.runs.hf_arguments import training_arguments
from vgf_llm.settings import SamplingSettings
from vgf_llm.training.identity import identity_of
from vgf_llm.training.learned_value import LearnedValue
from vgf_llm.training.particle_engine import engine_maker
from vgf_llm.training.policy_models import PolicyModels
from vgf_llm.training.rewards import Rewards, load_rewards
from vgf_llm.training.rollout import PromptRow
from vgf_llm.training.settings import OptimSettings, PolicySettings, TrainScript, VGFSettings
from vgf_llm.training.trainer import VGFTrainer


def build(
    script: TrainScript,
    policy: PolicySettings,
    method: VGFSettings,
    optim: OptimSettings,
    sampling: SamplingSettings,
    prompts: Sequence[PromptText],
    callbacks: Sequence[TrainerCallback] = (),
) -> VGFTrainer:
    """Load everything and put the trainer together.

    Args:
        script: Prompts, rewards, output.
        policy: The model.
        method: Budget, decoder, loss.
        optim: Optimisation and checkpoints.
        sampling: The distribution of responses.
        prompts: Of the prompt file.
        callbacks: Further transformers TrainerCallbacks.

    Raises:
        VGFError: Prompts, models or settings are unusable.
    """
    policy, optim = for_training(policy, optim)
    arguments = training_arguments(optim, script.output_dir, ddp_find_unused_parameters=False)
    shard_on_cpu()
    make_engine = engine_maker(policy, method, sampling, arguments.world_size)
    with loaded_whole():
        with working(f"loading the base model {policy.model_name_or_path}"):
            base = load_base(policy)
        reserved = 0 if make_engine is None else EngineReference.reserved_positions
        with working(f"encoding {len(prompts)} prompts"):
            rows = encode_rows(prompts, script.prompts, base, sampling.max_new_tokens, reserved)
        with working("loading the rewards"):
            rewards = rewards_of(script, policy, method, base, arguments)
        set_seed(optim.seed)
        learned = learned_value(policy, method, base, optim.seed) if method.value == "learned" else None
    return VGFTrainer(
        PolicyModels(base.lm, policy),
        learned,
        rewards,
        method,
        sampling,
        base,
        identity_of(script, policy, method, optim, sampling, rows, base.tokenizer, arguments.world_size),
        args=arguments,
        train_dataset=rows,
        make_engine=make_engine,
        callbacks=list(callbacks),
    )


def encode_rows(
    prompts: Sequence[PromptText], source: str, base: LoadedBase, max_new_tokens: int, reserved: int = 0
) -> list[PromptRow]:
    """Encode the prompts of a file; ``reserved`` positions of the model are taken by nothing.

    Raises:
        DataError: A prompt is empty or leaves no room for a response.
        ConfigError: There are no prompts.
    """
    encoded = encode_prompts(
        base.tokenizer, prompts, base.rows, base.max_positions, max_new_tokens, reserved, f" of '{source}'"
    )
    if not encoded:
        raise ConfigError(f"prompts: '{source}' holds none")
    return [PromptRow(index, ids, text) for index, (ids, text) in enumerate(zip(encoded, prompts, strict=True))]


def rewards_of(
    script: TrainScript, policy: PolicySettings, method: VGFSettings, base: LoadedBase, arguments: TrainingArguments
) -> Rewards:
    """Load the rewards of a run.

    Raises:
        ConfigError: A function does not exist.
        ModelError: A reward model cannot be loaded, or its table is shorter than the vocabulary.
    """
    rewards = load_rewards(
        script.rewards,
        script.reward_weights,
        base.tokenizer,
        gold=script.gold,
        outputs=script.reward_outputs or None,
        foreign=method.value == "learned" or method.direction is not None,
        dtype=getattr(torch, policy.dtype),
        device=arguments.device,
        calls=script,
    )
    for member in rewards.members:
        if isinstance(member.scorer, RewardModel):
            check_table(member.scorer, base.tokenizer, base.rows)
    return rewards


def learned_value(policy: PolicySettings, method: VGFSettings, base: LoadedBase, seed: int) -> LearnedValue:
    """Make the value that is learned along, on the base's own weights where they can be shared.

    Raises:
        ModelError: The model that it is to start from does not fit.
    """
    settings = method.learned_value
    model = build_value_model(
        base.lm,
        num_layers=settings.num_layers,
        pooling=settings.pooling,
        input_skip=settings.input_skip,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        seed=seed,
        start_from=settings.start_from,
        tokenizer=base.tokenizer,
        base_name=policy.model_name_or_path,
        # FSDP shards a parameter in one place only, and a policy trained in full moves what would be shared
        share=policy.lora_r > 0 and not fsdp_was_asked_for(),
    )
    return LearnedValue(model, settings, seed)

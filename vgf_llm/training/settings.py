"""Settings of fine-tuning. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vgf_llm.errors import ConfigError, require
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.resume import require_resume
from vgf_llm.settings import (
    BackendName,
    BackendSettings,
    BaseModelSettings,
    DtypeName,
    EngineSettings,
    ParticleSettings,
    RewardCallSettings,
)
from vgf_llm.settings.shared import check_one_pass_budget
from vgf_llm.settings.training import LoraSettings, OptimiserSettings


@dataclass(frozen=True)
class TrainScript(RewardCallSettings):
    """Prompts, rewards and output."""

    prompts: str
    """Training prompts: a file, glob or folder (docs/data.md), or a data set of the hub."""
    output_dir: str
    """Folder for the trained model or adapter, metrics.jsonl, completions and checkpoints."""
    prompt_column: str = "prompt"
    """Column of the prompts, text or messages."""
    system_column: str = field(default="system", kw_only=True)
    """Column of a system turn that goes before the prompt, where rows have it."""
    num_prompts: int | None = None
    """Prompts used, from the first; all when unset."""
    rewards: list[str] = field(default_factory=list)
    """Rewards that are summed: folders of reward models, Python functions as "module:function" or by name, and YAML
    files that compose them (docs/reward_models.md)."""
    reward_weights: list[float] = field(default_factory=list)
    """Weight of each reward; empty weighs all by 1."""
    reward_outputs: dict[str, float] = field(default_factory=dict, kw_only=True)
    """Weights of the outputs of reward models with several, by name or number."""
    gold: str | None = None
    """Python function, folder of a reward model, or YAML file, that is logged and never trained on."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        require(bool(self.rewards), "rewards", self.rewards, "a list of at least one reward")
        wanted = len(self.rewards)
        require(
            len(self.reward_weights) in (0, wanted), "reward_weights", self.reward_weights, f"empty or {wanted} numbers"
        )
        require(self.num_prompts is None or self.num_prompts >= 1, "num_prompts", self.num_prompts, "null or >= 1")


@dataclass(frozen=True)
class PolicySettings(LoraSettings, BaseModelSettings):
    """The model that is fine-tuned; its untrained self is the reference."""

    dtype: DtypeName = "auto"
    """Parameter dtype of base and reward models; whatever is trained is float32 (under DeepSpeed what it says). "auto":
    bfloat16 where the device has units for it, float32 with lora_r 0, under DeepSpeed and under FSDP."""
    lora_r: int = 16
    """LoRA rank; 0 trains all weights next to a frozen copy of the base."""


@dataclass(frozen=True)
class LearnedValueSettings:
    """A value that is learned along with the policy, from the rewards of its responses."""

    num_layers: int | None = 2
    """Decoder layers, from the first; null takes all."""
    pooling: Literal["last", "mean"] = "mean"
    """What the head reads of a prefix: its last token, or the mean over its response tokens."""
    input_skip: bool = True
    """Whether the head also reads the mean input embedding: raises gradient fidelity."""
    lora_r: int = 0
    """LoRA rank on shared base weights; 0 trains a copy of the layers."""
    lora_alpha: float = 32.0
    """LoRA scale; updates count lora_alpha / lora_r."""
    start_from: str | None = None
    """Folder of a trained value or reward model to go on from; null starts from the base model with a zero head."""
    learning_rate: float = 2.0e-5
    """Peak learning rate of the value's body, above 0."""
    head_learning_rate: float = 1.0e-2
    """Peak learning rate of its linear heads, above 0."""
    td_lambda: float = 0.95
    """Lambda of the returns, in [0, 1]: 1 regresses every prefix on the final reward, 0 on the next prefix's value."""
    expectile: float = 0.5
    """Expectile of the regression, in (0, 1): 0.5 is the mean, more is optimistic."""
    target_tau: float = 0.05
    """Share by which the target moves to the value at each step, in (0, 1]."""
    gradient: Literal["exact", "secant"] = "exact"
    """What moves the particles: the value's input gradient, or a secant head that is trained along (no backward)."""
    secant_substitutions: int = 8
    """Token changes per response and step that the secant head learns from, each a forward of the value; at least 1."""
    secant_learning_rate: float = 3.0e-4
    """Peak learning rate of the secant head, above 0."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(self.num_layers is None or self.num_layers >= 1, "num_layers", self.num_layers, "null or at least 1")
        require(self.gradient in ("exact", "secant"), "gradient", self.gradient, '"exact" or "secant"')
        require(self.secant_substitutions >= 1, "secant_substitutions", self.secant_substitutions, "at least 1")
        for key in ("learning_rate", "head_learning_rate", "secant_learning_rate", "lora_alpha"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        require(self.lora_r >= 0, "lora_r", self.lora_r, "at least 0")
        require(0 <= self.td_lambda <= 1, "td_lambda", self.td_lambda, "in [0, 1]")
        require(0 < self.expectile < 1, "expectile", self.expectile, "in (0, 1)")
        require(0 < self.target_tau <= 1, "target_tau", self.target_tau, "in (0, 1]")


@dataclass(frozen=True)
class DirectionOptions:
    """How a direction is fitted while training goes."""

    substitutions: int = 16
    """Token changes per response that the reward is asked for in a step that fits, at least 1."""
    refit_steps: int = 1
    """A direction is fitted in one step of so many, at least 1; the others cost no calls."""
    replay: int = 16384
    """Token changes that are fitted to, the newest of all processes, at least 1."""
    steps: int = 60
    """Optimiser steps of a causal head in each fit, from where it was, at least 1."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        for key in ("substitutions", "refit_steps", "replay", "steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")


@dataclass(frozen=True)
class VGFSettings(ParticleSettings, BackendSettings):
    """The method: how responses are moved, and how the result is learned."""

    num_particles: int = 8
    """Responses per prompt that are sampled and moved, at least 2: weights compare responses."""
    draws: int = 1
    backend: BackendName = "transformers"
    """What samples and decodes: transformers in this process, or a vllm engine, which a policy's weights go to."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """The vllm engine: one per process where it is started here, one for all behind a URL."""
    particles_from: Literal["reference", "policy"] = "reference"
    """Distribution that the particles are sampled from and decoded by."""
    sync_check: bool = True
    """Stop where the engine's log-probabilities of sampled tokens are not the trainer's, looked at in every step."""
    value: Literal["reward", "learned"] = "reward"
    """What moves the particles: the reward models among the rewards, or a value learned from the rewards."""
    learned_value: LearnedValueSettings = field(default_factory=LearnedValueSettings)
    """The learned value; read where value is "learned"."""
    direction: Literal["constant", "table", "causal"] | None = None
    """A direction that is fitted to the rewards while training goes; transported responses are then written in one pass
    (docs/training.md). null: particles are moved by `value`."""
    direction_options: DirectionOptions = field(default_factory=DirectionOptions)
    """How the direction is fitted; read where there is one."""
    loss: Literal["weighted_nll", "dpo"] = "weighted_nll"
    """How transported responses are distilled into the policy."""
    weight_temperature: float = 0.5
    """alpha of the weights softmax(reward / alpha) within a prompt's responses (weighted_nll), above 0."""
    kept: int | None = None
    """Responses of highest weight per prompt that are trained on (weighted_nll); null keeps all."""
    dpo_beta: float = 0.1
    """beta of DPO, above 0."""
    kl_coefficient: float = 0.0
    """Weight of the estimated KL per token from the policy to the reference, on the trained responses; at least 0."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        require(self.num_particles >= 2, "num_particles", self.num_particles, "at least 2: weights compare responses")
        moves = self.decoder != "stream" or self.direction is not None
        require(moves, "decoder", self.decoder, "a decoder that moves samples; to write in one pass, set direction")
        kinds = (None, "constant", "table", "causal")
        require(self.direction in kinds, "direction", self.direction, 'null, "constant", "table" or "causal"')
        require(self.kept is None or self.kept >= 1, "kept", self.kept, "null or at least 1")
        for key in ("weight_temperature", "dpo_beta"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        require(self.kl_coefficient >= 0, "kl_coefficient", self.kl_coefficient, "at least 0")


def check_direction(method: VGFSettings) -> None:
    """Refuse settings that a fitted direction does not go with; nothing is said where there is none.

    Raises:
        ConfigError: Naming the keys.
    """
    kind, budget = method.direction, method.budget
    if kind is None:
        return
    who = f"direction {kind!r}"
    if method.backend != "transformers":
        raise ConfigError(
            f"{who} tilts every token while it is written, in this process: backend must be transformers, got "
            f"{method.backend!r}, which can be given no bonus for a token yet"
        )
    if method.value == "learned":
        raise ConfigError(f"{who} takes the place of a learned value: leave value out")
    if method.decoder not in ("prior", "stream") or method.decoder_options:
        named = f"decoder {method.decoder!r}" if not method.decoder_options else "decoder_options"
        raise ConfigError(f"{who} is the decoder stream with options of its own: leave {named} out")
    if kind == "causal" and method.particles_from == "policy":
        raise ConfigError(
            f"{who} reads hidden states, which must be those of one model: set particles_from to reference, or take "
            "direction constant or table"
        )
    if budget.is_none:
        raise ConfigError(
            f"{who} spends budget.nats, so budget.steps: 0 does nothing; for best-of-N set budget.nats: 0"
        )
    if budget.temperature != TransportBudget().temperature:
        raise ConfigError(f"{who} moves no particles, so budget.temperature does nothing: leave it out")
    check_one_pass_budget(budget, who)


@dataclass(frozen=True)
class OptimSettings(OptimiserSettings):
    """Optimisation, logging and checkpoints."""

    learning_rate: float = 1.0e-4
    """Peak learning rate of AdamW for the policy, above 0."""
    per_device_train_batch_size: int = 4
    """Prompts per device and forward."""
    warmup_ratio: float = 0.05
    lr_scheduler_type: str = "linear"
    """Schedule after the warm-up, by transformers' name."""
    max_grad_norm: float = 1.0
    """Gradient norm that is clipped to; 0 does not clip."""
    logging_steps: int = 10
    """Steps between log lines, each with completions and samples of the policy, which take time."""
    save_total_limit: int | None = 2
    """Checkpoints kept; null keeps all."""
    resume: bool | str = False
    """true continues from the newest whole checkpoint of output_dir, a folder from that one; false starts anew."""
    allow_changes: list[str] = field(default_factory=list)
    """Names of settings that may differ from the checkpoint's on resume, as the error names them."""
    seed: int = 0
    """Of adapters, data order and all samples; 0 to 2**32 - 1."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        require_resume(self.resume)
        limit = self.save_total_limit
        require(limit is None or limit >= 1, "save_total_limit", limit, "null or at least 1")
        require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "at least 0")

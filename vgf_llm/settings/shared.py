"""Options that several commands share. This module imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from vgf_llm.errors import ConfigError, require, require_sampling_seed
from vgf_llm.flow.budget import TransportBudget

DecoderName = Literal["prior", "stream", "block", "edit", "edit_greedy", "pivot", "nearest"]

DECODER_OPTIONS: dict[DecoderName, tuple[str, ...]] = {
    "prior": ("multiplier", "coupling", "after_change"),
    "stream": ("direction", "candidates", "min_probability"),
    "block": ("block_tokens",),
    "edit": (),
    "edit_greedy": ("proposals", "checked"),
    "pivot": ("tilted_tokens",),
    "nearest": (),
}
"""Options of each decoder, in the order of its class: known before any class is imported."""

BackendName = Literal["transformers", "vllm"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BaseModelSettings:
    """A causal language model, and how its tokenizer is used."""

    model_name_or_path: str = "default"
    """Base model: "default" (embedded SmolLM2-135M-Instruct), a local folder, or a name on the hub."""
    pad_token: str | None = field(default=None, kw_only=True)
    """Padding token of the vocabulary; null takes the tokenizer's, else its EOS: padding is masked."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """Variables of the chat template, for example {"enable_thinking": false}; saved with what is trained."""
    trust_remote_code: bool = field(default=False, kw_only=True)
    """Whether code in a model's repository may run."""


@dataclass(frozen=True)
class ModelSettings(BaseModelSettings):
    """The base model, which is the reference, and the value that moves its responses."""

    reward_model: str | None = None
    """Reward model whose gradient moves the particles and that selects: a folder (ours, a classifier, an adapter), or a
    name on the hub."""
    reward_outputs: dict[str, float] = field(default_factory=dict, kw_only=True)
    """Weights of the reward model's outputs, by name or number; needed where it has several."""
    dtype: DtypeName = "auto"
    """Parameter dtype of both models; "auto": bfloat16 where the device has units for it, else float32."""
    device: str = "auto"
    """Torch device, or "auto": cuda where there is one, else cpu."""


@dataclass(frozen=True)
class SamplingSettings:
    """The reference distribution: temperature and truncation of the base model, the same for sampling and decoding."""

    temperature: float = 1.0
    """Softmax temperature, above 0."""
    top_k: int = 50
    """Tokens kept by probability at each position; 0 keeps the whole vocabulary."""
    top_p: float = 1.0
    """Probability mass kept at each position, in (0, 1]."""
    max_new_tokens: int = 24
    """Response length limit in tokens, EOS included, at least 1."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or positive")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")


@dataclass(frozen=True)
class EngineSettings:
    """A vLLM engine: started here, or behind a URL."""

    url: str | None = None
    """URL of a running server, for example http://127.0.0.1:8000; an engine is started here when unset."""
    served_model: str | None = None
    """Name of the model, or of a LoRA, at that server; its first model when unset."""
    memory_share: float = 0.3
    """Share of the device's memory that the engine may take, in (0, 1]."""
    kv_cache_gib: float | None = None
    """Memory for keys and values, in GiB above 0; what the share leaves when unset (set it on a CPU)."""
    tensor_parallel: int = 1
    """Devices that share the model, at least 1."""
    max_sequences: int = 64
    """Texts written side by side, at least 1."""
    eager: bool = False
    """Start without compiling the model: sooner ready, slower after."""
    timeout_sec: float = 300.0
    """Seconds without a sign of life after which the engine is given up, above 0."""
    start_timeout_sec: float = 1200.0
    """Seconds that the engine may take to start, above 0."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(0 < self.memory_share <= 1, "memory_share", self.memory_share, "in (0, 1]")
        gib = self.kv_cache_gib
        require(gib is None or gib > 0, "kv_cache_gib", gib, "null or above 0")
        for key in ("tensor_parallel", "max_sequences"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("timeout_sec", "start_timeout_sec"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        is_url = self.url is None or self.url.startswith(("http://", "https://"))
        require(is_url, "url", self.url, "null or start with http:// or https://")


@dataclass(frozen=True)
class BackendSettings:
    """The backend that the base model runs on."""

    backend: BackendName = "transformers"
    """What runs the base model: transformers in this process, or a vllm engine."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """The vllm engine."""


@dataclass(frozen=True)
class PromptSettings:
    """A file of prompts."""

    prompts: str | None = None
    """Prompt file (.jsonl, .json, .csv, .parquet, .txt), or a data set of the hub."""
    prompt_column: str = "prompt"
    """Column of the prompt file, text or messages."""
    system_column: str = field(default="system", kw_only=True)
    """Column of a system turn that goes before the prompt, where rows have it."""
    num_prompts: int | None = None
    """Prompts used, from the first; all when unset."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        limit = self.num_prompts
        require(limit is None or limit >= 1, "num_prompts", limit, "null or at least 1")


@dataclass(frozen=True)
class ParticleSettings:
    """Particles, their budget and their decoder."""

    budget: TransportBudget = field(default_factory=TransportBudget)
    """Transport budget; steps 0 is best-of-N."""
    decoder: DecoderName = "prior"
    """How moved particles become tokens."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """Options of the decoder, by name; its class lists them."""
    num_particles: int = 8
    """Responses per prompt that are sampled and moved, at least 1."""
    draws: int = 3
    """Texts decoded from each moved response, at least 1; equal with the decoder nearest, separate chains with edit and
    pivot."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        for key in ("draws", "num_particles"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")


@dataclass(frozen=True)
class ImplicitPolicySettings(ParticleSettings):
    """Particles, budget, decoder and selection."""

    select: Literal["max", "softmax", "random"] = "max"
    """The response returned: best by value, drawn by softmax of value / budget.temperature, or any of the pool."""


@dataclass(frozen=True)
class AnswerSettings(ImplicitPolicySettings, PromptSettings, BackendSettings):
    """Prompts, particles, budget and backend of a command that answers prompts."""

    seed: int = 0
    """Seed; a prompt's answer depends on it and on the prompt's position, not on the batch."""
    batch_prompts: int = 4
    """Prompts per batch, at least 1."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        ParticleSettings.__post_init__(self)
        PromptSettings.__post_init__(self)
        require_sampling_seed("seed", self.seed)
        require(self.batch_prompts >= 1, "batch_prompts", self.batch_prompts, "at least 1")


def check_decoder_options(name: str, options: Iterable[str]) -> None:
    """Refuse options that a decoder does not have.

    Raises:
        ConfigError: Naming the option and those that there are.
    """
    known = DECODER_OPTIONS[name]  # type: ignore[index]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"decoder_options: the decoder {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )


def check_one_pass_budget(budget: TransportBudget, who: str) -> None:
    """Refuse a budget that asks for what writing in one pass has not: no particle is moved.

    Args:
        budget: Nothing is said of the empty one.
        who: Writes in one pass, for the message.

    Raises:
        ConfigError: Naming the key.
    """
    if budget.rounds != 1:
        raise ConfigError(f"{who} writes once: budget.rounds must be 1, got {budget.rounds}")
    for key in ("step", "step_size", "steps", "bandwidth"):
        if not budget.is_none and getattr(budget, key) != getattr(TransportBudget(), key):
            raise ConfigError(f"{who} moves no particles, so budget.{key} does nothing: leave it out")
    if budget.kernel != "none":
        raise ConfigError(f"{who} moves no particles: budget.kernel must be none, got {budget.kernel!r}")


def check_backend(decoder: str, backend: str) -> None:
    """Refuse a decoder that the backend cannot run.

    Raises:
        ConfigError: Naming both.
    """
    if decoder == "stream" and backend != "transformers":
        raise ConfigError(
            f"the decoder 'stream' needs backend transformers, got {backend!r}: vllm does not have it yet"
        )

"""Options that several commands share. This module imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from vgf_llm.errors import ConfigError

DecoderName = Literal["prior", "block", "edit", "edit_greedy", "pivot", "nearest"]

DECODER_OPTIONS: dict[DecoderName, tuple[str, ...]] = {
    "prior": ("multiplier", "coupling", "after_change"),
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
class ModelSettings:
    """Which base model is the reference and which value moves its responses."""

    model_name_or_path: str = "default"
    """Base model: "default" (embedded SmolLM2-135M-Instruct), a local folder, or a name on the hub."""
    reward_model: str | None = None
    """Folder of a trained reward model (or adapter); its gradient moves the particles and it selects."""
    dtype: DtypeName = "auto"
    """Parameter dtype of both models; "auto": bfloat16 where the device has units for it, else float32."""
    device: str = "auto"
    """Torch device, or "auto": cuda where there is one, else cpu."""
    pad_token: str | None = None
    """Padding token of the vocabulary; null takes the tokenizer's, else its EOS: padding is masked."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """Variables of the chat template, for example {"enable_thinking": false}; saved with what is trained."""
    trust_remote_code: bool = False
    """Whether code in a model's repository may run."""


@dataclass(frozen=True)
class SamplingSettings:
    """The reference law: temperature and truncation of the base model, the same for sampling and decoding."""

    temperature: float = 1.0
    """Softmax temperature, above 0."""
    top_k: int = 50
    """Tokens kept by probability at each position; 0 keeps the whole vocabulary."""
    top_p: float = 1.0
    """Probability mass kept at each position, in (0, 1]."""
    max_new_tokens: int = 24
    """Response length limit in tokens, EOS included, at least 1."""

    def __post_init__(self) -> None:
        """Validate ranges.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


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
        """Validate ranges.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share must be in (0, 1], got {self.memory_share}")
        if self.kv_cache_gib is not None and not self.kv_cache_gib > 0:
            raise ValueError(f"kv_cache_gib must be null or above 0, got {self.kv_cache_gib}")
        for name in ("tensor_parallel", "max_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout_sec", "start_timeout_sec"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {self.url!r}")


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

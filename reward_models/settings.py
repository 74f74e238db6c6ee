"""Settings of reward and value training. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vgf_llm.errors import require
from vgf_llm.runs.resume import require_resume
from vgf_llm.settings import BaseModelSettings, DtypeName
from vgf_llm.settings.training import LoraSettings, OptimiserSettings


@dataclass(frozen=True)
class TrainingData:
    """Data, limits and output."""

    train_dataset: str
    """Training rows: a file, glob or folder (docs/data.md), or a data set of the hub."""
    output_dir: str
    """Folder for weights, tokenizer, card and checkpoints."""
    system_column: str = field(default="system", kw_only=True)
    """Column of a system turn that goes before the prompt, where rows have it."""
    eval_dataset: str | None = None
    """Held-out rows; null holds back eval_share of the training prompts."""
    train_split: str = "train"
    """Split of a hub data set or folder."""
    eval_split: str = "test"
    """Split of a hub data set or folder of held-out rows."""
    eval_share: float = 0.05
    """Share of training prompts held back where eval_dataset is null, in (0, 0.5]."""
    max_dropped_share: float = 0.2
    """Largest share of rows that may be unusable, and of those left that may be dropped once encoded, in [0, 1]."""
    limit: int | None = None
    """Training rows read, from the first; null reads all."""
    eval_limit: int | None = None
    """Held-out rows read, from the first; null reads all."""
    max_length: int = 1024
    """Longest prompt and response together, in tokens; at most the base model's positions."""
    max_response_length: int | None = None
    """Longest response in tokens, EOS included; one that fills it gets no EOS, as in sampling. Null: max_length."""
    over_length: Literal["drop", "truncate"] = "drop"
    """What happens to a row with a longer response: dropped, or its responses cut at the right. Counted."""
    fidelity_responses: int = 24
    """Held-out responses on which gradient fidelity is measured; 0 skips it."""
    fidelity_substitutions: int = 120
    """One-token substitutions per response, at least 9."""
    fidelity_shortlist: int = 30
    """Length of the base model's shortlist that substitutions come from, at least 2."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(0 < self.eval_share <= 0.5, "eval_share", self.eval_share, "in (0, 0.5]")
        require(0 <= self.max_dropped_share <= 1, "max_dropped_share", self.max_dropped_share, "in [0, 1]")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        for key in ("limit", "eval_limit", "max_response_length"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "null or at least 1")
        require(self.fidelity_responses >= 0, "fidelity_responses", self.fidelity_responses, "at least 0")
        require(self.fidelity_substitutions >= 9, "fidelity_substitutions", self.fidelity_substitutions, "at least 9")
        require(self.fidelity_shortlist >= 2, "fidelity_shortlist", self.fidelity_shortlist, "at least 2")


@dataclass(frozen=True)
class RewardScript(TrainingData):
    """Preference pairs, limits and output."""

    prompt_column: str = "prompt"
    """Column of prompts; where no row has it, the prompt is what chosen and rejected share (all or none)."""
    chosen_column: str = "chosen"
    """Column of better responses."""
    rejected_column: str = "rejected"
    """Column of worse responses."""
    margin_column: str = "margin"
    """Column of how much better, a number, or two of them as score_chosen-score_rejected; optional."""
    preference_column: str = "overall_preference"
    """Where rows have it, which response is better: below 0 that of chosen_column, above 0 the other, 0 neither."""
    objectives: dict[str, str] = field(default_factory=dict)
    """Objectives that the model gets an output for each, by name: a column of how much better chosen is there (below 0:
    rejected is better), or two as for margin_column; null or 0 is no opinion. Empty: one output, for chosen."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        for name, column in self.objectives.items():
            named = bool(str(name).strip()) and not str(name).isdecimal()
            valid = named and isinstance(column, str) and bool(column.strip())
            require(valid, "objectives", self.objectives, "a column by each name, and no name a number")


@dataclass(frozen=True)
class RewardModelSettings(LoraSettings, BaseModelSettings):
    """What is trained."""

    num_layers: int | Literal["auto"] | None = "auto"
    """Decoder layers kept, from the first; "auto" keeps six, or all of a shallower base; null keeps all."""
    pooling: Literal["last", "mean"] = "mean"
    """What the head reads: the last token, or the mean over the response."""
    train_embeddings: bool = False
    """Whether the input embeddings move; off keeps the base model's table, which the flow's particles live in."""
    input_skip: bool = True
    """Whether the head also reads the mean input embedding of the response: raises gradient fidelity."""
    dtype: DtypeName = "auto"
    """Parameter dtype of the body (the head is float32); "auto": float32 where all weights are trained, under a LoRA
    bfloat16 where the device has units for it."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Leaf names of linear layers; empty takes all of the body."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        layers = self.num_layers
        in_range = layers in (None, "auto") or (isinstance(layers, int) and layers >= 1)
        require(in_range, "num_layers", layers, '"auto", null or at least 1')
        require(self.pooling in ("last", "mean"), "pooling", self.pooling, '"last" or "mean"')
        both = bool(self.lora_r) and self.train_embeddings
        require(not both, "train_embeddings", True, "false with lora_r > 0: a LoRA leaves the table alone")


@dataclass(frozen=True)
class TrainerSettings(OptimiserSettings):
    """How a reward or value model is trained, whatever the loss."""

    head_learning_rate: float | None = 1e-2
    """Peak learning rate of the linear heads, which start at 0; above 0, null takes learning_rate. A fast head and a
    slow body keep most of the reward in the input skip, where the gradient holds between tokens."""
    per_device_train_batch_size: int = 8
    """Pairs (values: responses) per device and forward."""
    per_device_eval_batch_size: int = 16
    """Held-out pairs (values: responses) per device and forward."""
    embedding_noise: float = 0.0
    """Gaussian noise on input embeddings in training, in root mean squares of the embedding table, at least 0."""
    eval_steps: int | None = None
    """Steps between evaluations; null evaluates at the end."""
    save_total_limit: int | None = None
    """Checkpoints kept, at least 1; null keeps all."""
    resume: bool | str = False
    """true continues from the newest whole checkpoint of output_dir, a folder from that one; false starts anew."""
    allow_changes: list[str] = field(default_factory=list)
    """Names of settings that may differ from the checkpoint's on resume, as the error names them."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        require_resume(self.resume)
        head_rate = self.head_learning_rate
        require(head_rate is None or head_rate > 0, "head_learning_rate", head_rate, "null or above 0")
        key = "per_device_eval_batch_size"
        require(self.per_device_eval_batch_size >= 1, key, self.per_device_eval_batch_size, "at least 1")
        for key in ("eval_steps", "save_total_limit"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "null or at least 1")
        require(self.embedding_noise >= 0, "embedding_noise", self.embedding_noise, "at least 0")


@dataclass(frozen=True)
class RewardTraining(TrainerSettings):
    """How a reward model is trained on pairs."""

    use_margin: bool = False
    """Whether the loss asks for the stated margin, or the difference of each objective (times margin_scale)."""
    margin_scale: float = 1.0
    """Reward units per unit of stated margin."""
    centring: float = 0.01
    """Weight of (chosen + rejected)^2, at least 0; holds the scores around 0."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        require(self.centring >= 0, "centring", self.centring, "at least 0")
        require(self.margin_scale > 0, "margin_scale", self.margin_scale, "above 0")

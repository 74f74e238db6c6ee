"""Settings of the commands that check, import and export. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from vgf_llm.errors import require


@dataclass(frozen=True)
class PairSettings:
    """A reward model and pairs that it scores."""

    reward_model: str
    """Folder of a reward model (ours, or a classifier or adapter of one), a name on the hub, a Python function, or a
    YAML file that composes several."""
    reward_outputs: dict[str, float] = field(default_factory=dict)
    """Weights of the model's outputs, by name or number; needed where it has several."""
    dataset: str | None = None
    """Preference pairs: a file, glob or folder, or a hub data set. Null takes 32 built-in pairs."""
    split: str = "train"
    """Split of a hub data set or folder."""
    prompt_column: str = "prompt"
    """Column of prompts."""
    chosen_column: str = "chosen"
    """Column of better responses."""
    rejected_column: str = "rejected"
    """Column of worse responses."""
    limit: int = 100
    """Pairs used, from the first, at least 1."""
    device: str = "auto"
    """Torch device, or "auto": cuda where there is one, else cpu."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(self.limit >= 1, "limit", self.limit, "at least 1")


@dataclass(frozen=True)
class CheckSettings(PairSettings):
    """A reward model, pairs that it scores, and the form of the report."""

    model_name_or_path: str | None = None
    """Base model whose responses it is to score: its template and EOS are compared. Null compares nothing."""
    json: bool = False
    """Whether to write the lines as JSON to standard output, in place of a table."""


@dataclass(frozen=True)
class ImportSettings(PairSettings):
    """A classifier, pairs that its card is measured on, and the folder that it is imported into."""

    output_dir: str = "outputs/imported"
    """Folder for card, tokenizer and pointer; not the source's own."""
    model_name_or_path: str = "default"
    """Base model that is to be moved: fidelity is measured on its shortlists, where both have the same token ids."""
    secant: bool = False
    """Whether to fit a secant head to the model (`vgf-llm secant`); needs prompts and validation_prompts."""
    prompts: str | None = None
    """Prompts that responses are sampled to for the secant head."""
    validation_prompts: str | None = None
    """Other prompts, on which the secant head is measured."""
    max_new_tokens: int = 24
    """Response length for the secant head, in tokens."""
    fidelity_responses: int = 24
    """Responses on which gradient fidelity is measured; 0 skips it."""


@dataclass(frozen=True)
class ExportSettings:
    """A reward model and the folder of the classifier."""

    reward_model: str
    """Folder of a reward model of ours, full or LoRA."""
    output_dir: str
    """Folder for the classifier and its tokenizer; empty or new."""
    pad_token: str | None = None
    """Padding token of the classifier; null takes the tokenizer's. It must not be the token that closes a response."""

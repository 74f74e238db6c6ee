"""Settings of a direction's fit. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reward_models.secant_settings import SecantTraining, SubstitutionSettings
from vgf_llm.errors import ConfigError, require

FOLDER_NAME = "directions"
"""Folder of a reward model's directions, one folder per kind, in the reward model's own."""


@dataclass(frozen=True, kw_only=True)
class DirectionScript(SubstitutionSettings):
    """Reward, prompts and output."""

    kind: Literal["table", "constant", "causal", "secant"]
    """table: a number per token, from calls alone; constant: one direction in embedding space; causal: a head on the
    base's hidden state before the token; secant: a head on a reward model's hidden states, which needs an original."""
    reward: str
    """Reward that is fitted: folder of a reward model or classifier, or a Python function, "module:function"."""
    gold: str | None = None
    """A second reward that fidelity is stated to as well; null: none."""
    guided: str | None = None
    """Responses whose substitutions are fitted too, for example written under an earlier direction: rows with prompt
    and response. Null: samples of the base alone."""
    output_dir: str | None = None
    """Folder for the direction; null: directions/<kind> in the reward model's folder."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        kinds = ("table", "constant", "causal", "secant")
        require(self.kind in kinds, "kind", self.kind, ", ".join(kinds))


@dataclass(frozen=True)
class DirectionTraining(SecantTraining):
    """How a direction is fitted. Heads read all of it; constant and table read what names them."""

    target: Literal["swap", "regrow", "lookahead"] = "swap"
    """Change that is fitted: of the token alone; with the suffix that the base writes after it (dearer, noisier); or of
    a reward model's token-level value (a lookahead, distilled)."""
    contexts: int = 4
    """Calls per token of a table's first stage, at least 1."""
    table_calls: int = 20_000
    """Calls of a table's first stage at most, at least contexts."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        targets = ("swap", "regrow", "lookahead")
        require(self.target in targets, "target", self.target, '"swap", "regrow" or "lookahead"')
        require(self.contexts >= 1, "contexts", self.contexts, "at least 1")
        require(self.table_calls >= self.contexts, "table_calls", self.table_calls, "at least contexts")


def check_direction(script: DirectionScript, training: DirectionTraining) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: Naming the keys.
    """
    if training.target != "swap" and script.kind not in ("causal", "constant"):
        raise ConfigError(
            f"target is {training.target!r}, which kind {script.kind!r} is not fitted to; set target to swap"
        )
    if training.target != "swap" and script.guided is not None:
        raise ConfigError(f"target is {training.target!r}, which is fitted to the base's own samples; drop guided")
    if script.kind == "secant" and (script.gold or script.guided or script.output_dir):
        raise ConfigError(
            "kind 'secant' is fitted to base samples and saved beside its reward model; drop gold, "
            "guided and output_dir"
        )

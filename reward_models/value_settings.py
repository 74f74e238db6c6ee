"""Settings of value training from logged responses. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from reward_models.settings import TrainerSettings, TrainingData
from vgf_llm.errors import require
from vgf_llm.settings import RewardCallSettings


@dataclass(frozen=True)
class ValueScript(TrainingData, RewardCallSettings):
    """Logged responses, limits and output."""

    prompt_column: str = "prompt"
    """Column of prompts, text or messages."""
    response_column: str = "response"
    """Column of responses, text or the assistant's message; where no row has it, rows are preference pairs (chosen,
    rejected) and both responses are taken."""
    reward_column: str = "reward"
    """Column of rewards, a number of any scale, higher is better."""
    reward_function: str | None = None
    """Reward of rows that have none: "module:function", a function of reward_models.functions, or a YAML file
    that composes them (docs/reward_models.md); null refuses them."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        RewardCallSettings.__post_init__(self)


@dataclass(frozen=True)
class ValueTraining(TrainerSettings):
    """How a value is trained on responses and their rewards."""

    td_lambda: float = 0.95
    """Lambda of TD(lambda), in [0, 1]: 1 regresses every prefix on the reward, 0 on the next prefix's target value."""
    expectile: float = 0.5
    """Expectile tau of the regression, in (0, 1): 0.5 is the squared error, more leans to the better outcomes."""
    target_tau: float = 0.02
    """Share of the value that the target network takes over at every step, in (0, 1]."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        require(0 <= self.td_lambda <= 1, "td_lambda", self.td_lambda, "in [0, 1]")
        require(0 < self.expectile < 1, "expectile", self.expectile, "in (0, 1)")
        require(0 < self.target_tau <= 1, "target_tau", self.target_tau, "in (0, 1]")

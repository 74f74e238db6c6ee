"""Settings of ``evaluate``. This module imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from vgf_llm.errors import require, require_sampling_seed
from vgf_llm.evaluation.arms import Arm, budget_arms
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.resume import require_resume_rows
from vgf_llm.settings import BackendSettings, PromptSettings, RewardCallSettings


@dataclass(frozen=True)
class EvaluateSettings(PromptSettings, BackendSettings, RewardCallSettings):
    """What is compared, on which prompts, and where the result goes."""

    prompts: str = "recipes/smollm2_sentiment/data/prompts_test.jsonl"
    output_dir: str = "outputs/evaluate"
    """Folder for rows.jsonl, summary.json and config.json."""
    gold: str = "vader_compound"
    """Held-out scorer: a function of reward_models.functions, "module:function", the folder of a reward model,
    or a YAML file that composes them (docs/reward_models.md)."""
    num_particles: int = 8
    """N of the budgets' arms."""
    draws: int = 3
    """Texts decoded from each moved particle in the budgets' arms, at least 1."""
    best_of: list[int] = field(default_factory=lambda: [8, 16, 32])
    """N of the best-of-N arms."""
    budgets: list[TransportBudget] = field(default_factory=lambda: [TransportBudget(nats=n) for n in (1.0, 2.0, 4.0)])
    """Transport budgets, one arm each."""
    arms: list[Arm] = field(default_factory=list)
    """Full description of the arms; replaces num_particles, best_of and budgets where given."""
    baselines: list[str] = field(default_factory=list)
    """Arms that the others are compared with, prompt by prompt; the first arm when empty."""
    seed: int = 0
    """Seed of the first repetition; repetition i uses seed + i."""
    batch_prompts: int = 6
    """Prompts per batch, at least 1."""
    resume: bool | str = False
    """true continues the rows that output_dir already holds; without it they are an error."""
    record: str | None = None
    """Also write the summary to docs/results/<record>.json and its tables to <record>.md."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        RewardCallSettings.__post_init__(self)
        require_resume_rows(self.resume)
        for key in ("draws", "batch_prompts"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        arms = self.all_arms()
        require_sampling_seed("seed", self.seed, max(arm.num_seeds for arm in arms))
        names = [arm.name for arm in arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "arms", twice[:1], "of unique names")
        for baseline in self.baselines:
            require(baseline in names, "baselines", baseline, f"arms of this run ({', '.join(names)})")

    def all_arms(self) -> list[Arm]:
        """Return the arms of the run."""
        return self.arms or budget_arms(self.num_particles, self.draws, self.best_of, self.budgets)

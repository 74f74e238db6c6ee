"""Settings of ``evaluate``. This module imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from vgf_llm.errors import require_sampling_seed
from vgf_llm.evaluation.arms import Arm, budget_arms
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.resume import require_resume_rows
from vgf_llm.settings import BackendName, EngineSettings


@dataclass(frozen=True)
class EvaluateSettings:
    """What is compared, on which prompts, and where the result goes."""

    prompts: str = "recipes/smollm2_sentiment/data/prompts_test.jsonl"
    """Prompt file (.jsonl, .json, .csv, .parquet), or a data set of the hub."""
    prompt_column: str = "prompt"
    """Column that holds the prompt, text or messages."""
    system_column: str = field(default="system", kw_only=True)
    """Column of a system turn that goes before the prompt, where rows have it."""
    num_prompts: int | None = None
    """Prompts used, from the first; all when unset."""
    output_dir: str = "outputs/evaluate"
    """Folder for rows.jsonl, summary.json and config.json."""
    gold: str = "vader_compound"
    """Held-out scorer: a function of reward_models.functions or "module:function"."""
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
    backend: BackendName = "transformers"
    """What runs the base model: transformers in this process, or a vllm engine."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """The vllm engine."""
    resume: bool | str = False
    """true continues the rows that output_dir already holds; without it they are an error."""
    record: str | None = None
    """Also write the summary to docs/results/<record>.json and its tables to <record>.md."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: Naming the key and the value seen.
        """
        require_resume_rows(self.resume)
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts must be null or at least 1, got {self.num_prompts}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if self.batch_prompts < 1:
            raise ValueError(f"batch_prompts must be at least 1, got {self.batch_prompts}")
        arms = self.all_arms()
        require_sampling_seed("seed", self.seed, max(arm.num_seeds for arm in arms))
        names = [arm.name for arm in arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"arms must have unique names, {twice[0]!r} occurs twice")
        for baseline in self.baselines:
            if baseline not in names:
                raise ValueError(f"baselines: {baseline!r} is no arm of this run; arms: {', '.join(names)}")

    def all_arms(self) -> list[Arm]:
        """Return the arms of the run."""
        return self.arms or budget_arms(self.num_particles, self.draws, self.best_of, self.budgets)

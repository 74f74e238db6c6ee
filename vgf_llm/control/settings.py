"""Options of the control commands; nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Literal

from vgf_llm.errors import require, require_training_seed
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.runs.resume import require_resume

EVALUATIONS_NAME = "evaluations.jsonl"


def training_budget() -> TransportBudget:
    """The authors' budget: one adam step of 0.1 with the rbf kernel, temperature 1."""
    return TransportBudget(steps=1, step="adam", step_size=0.1, kernel="rbf")


@dataclass(frozen=True)
class AgentSettings:
    """The agent; the defaults are those of the authors' published code and scripts."""

    clone: Literal["flow", "gaussian"] = "flow"
    """Reference distribution: flow matching, or a Gaussian with one spread for all states."""
    euler_steps: int = 10
    """Euler steps of the flow clone, at least 1."""
    clone_hidden: list[int] = field(default_factory=lambda: [512, 512, 512, 512])
    """Widths of the clone's hidden layers."""
    critic_hidden: list[int] = field(default_factory=lambda: [512, 512, 512, 512])
    """Widths of the critics' (and the gradient network's) hidden layers; the critics have layer norm."""
    num_particles: int = 10
    """Particles N a state, at least 1."""
    budget: TransportBudget = field(default_factory=training_budget)
    """Training budget: moves the next state's particles before they enter the TD target."""
    critic_loss: Literal["td", "expectile", "sql"] = "td"
    """Loss of the critics on target - Q."""
    expectile: float = 0.9
    """Level of the expectile loss, in (0, 1)."""
    sql_alpha: float = 1.0
    """Alpha of the sql loss, above 0, in units of the value."""
    target_pool: Literal["mean", "max"] = "mean"
    """How a TD target joins the next state's particles."""
    target_q: Literal["min", "mean"] = "min"
    """How critics are joined in the TD target and in the selection of a particle."""
    flow_q: Literal["min", "mean"] = "mean"
    """How critics are joined where the flow climbs them."""
    select: Literal["max", "softmax", "random"] = "max"
    """How one of the moved particles becomes the action."""
    select_temperature: float = 1.0
    """Temperature of the softmax selection, above 0, in units of the value."""
    amortised: bool = False
    """Whether a network f(s, a), regressed on the critics' gradient, moves the particles in its place."""
    discount: float = 0.99
    """Discount gamma, in [0, 1)."""
    average_rate: float = 0.005
    """Rate tau of the averaged critics, in (0, 1]."""
    learning_rate: float = 3.0e-4
    """Adam's learning rate for clone, critics and gradient network, above 0."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        for key in ("euler_steps", "num_particles"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("clone_hidden", "critic_hidden"):
            widths = getattr(self, key)
            require(bool(widths) and min(widths) >= 1, key, widths, "a list of at least one width, each at least 1")
        for key in ("sql_alpha", "select_temperature", "learning_rate"):
            require(0 < getattr(self, key) < float("inf"), key, getattr(self, key), "a finite number above 0")
        require(0 < self.expectile < 1, "expectile", self.expectile, "in (0, 1)")
        require(0 <= self.discount < 1, "discount", self.discount, "in [0, 1)")
        require(0 < self.average_rate <= 1, "average_rate", self.average_rate, "in (0, 1]")
        free = TransportBudget()
        for key in ("rounds", "nats", "max_token_nats"):
            value = getattr(self.budget, key)
            valid = "left out: it limits the decoding of tokens and does nothing here"
            require(value == getattr(free, key), f"budget.{key}", value, valid)
        apart = not self.amortised or self.budget.kernel == "none"
        require(apart, "budget.kernel", self.budget.kernel, "none with amortised, which moves each particle alone")


@dataclass(frozen=True)
class DataSettings:
    """What to learn from."""

    env: str | None = None
    """Single-task data set of OGBench, gymnasium id, or package.module:function; null trains without evaluation."""
    data: str | None = None
    """OGBench .npz, D4RL .hdf5, Minari folder or name; null has OGBench's package fetch the data of env."""
    reward_shift: float = 0.0
    """Added to every reward of the data and of online steps (D4RL antmaze: -1)."""
    normalise_observations: bool = False
    """Whether networks see observations less their mean over the data, in units of their standard deviation."""
    normalise_returns: bool = False
    """Whether rewards are scaled by 1000 / (largest - smallest episode return), as for D4RL's locomotion."""
    score_min: float = 0.0
    """Return that scores 0 where the task has no success of its own (D4RL: the random policy's)."""
    score_max: float | None = None
    """Return that scores 100 (D4RL: the expert's); null reports success rates, or returns as they are."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(isfinite(self.reward_shift), "reward_shift", self.reward_shift, "a finite number")
        require(isfinite(self.score_min), "score_min", self.score_min, "a finite number")
        high = self.score_max
        valid = f"null or a finite number above score_min ({self.score_min})"
        require(high is None or (isfinite(high) and high > self.score_min), "score_max", high, valid)


@dataclass(frozen=True)
class TrainSettings:
    """How long, how often, and where to."""

    output_dir: str = "outputs/control/run"
    """Folder of the run; each seed should have its own."""
    seed: int = 0
    """Seed of initialisation, batches, noise and episodes, at least 0."""
    offline_steps: int = 1_000_000
    """Gradient steps on the data, at least 0."""
    online_steps: int = 0
    """Environment steps after them, each with one gradient step on data and new transitions together."""
    online_warmup: int = 5000
    """Online steps before the first of their gradient steps, at least 0."""
    online_flow_steps: int = 0
    """Flow steps of the actions tried online; 0 is best-of-N."""
    clone_steps: int = 0
    """Gradient steps on the clone alone before all others; required with cached_samples."""
    cached_samples: int = 0
    """Samples of the clone drawn once for every next state, after which the clone stays as it is; 0 draws anew."""
    batch_size: int = 256
    """Transitions a gradient step, at least 1."""
    eval_every_steps: int = 100_000
    """Steps between evaluations, the clone's own counted too; the last step is always evaluated."""
    eval_episodes: int = 50
    """Episodes of each test budget."""
    test_steps: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    """Flow steps to evaluate; 0 is best-of-N."""
    test_step_sizes: list[float] = field(default_factory=lambda: [0.1])
    """Step sizes that each of test_steps above 0 is evaluated with, above 0."""
    log_every_steps: int = 1000
    """Gradient steps between lines of metrics.jsonl, at least 1."""
    save_every_steps: int = 100_000
    """Steps between checkpoints, the clone's own counted too, at least 1."""
    save_total_limit: int | None = 2
    """Checkpoints kept, at least 1; null keeps all."""
    resume: bool | str = False
    """true continues from the newest whole checkpoint of output_dir, where there is one, a folder from that one."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys of the checkpoint's identity that may differ when going on, for example agent.discount."""
    report_to: list[str] = field(default_factory=list)
    """Trackers besides metrics.jsonl: tensorboard, wandb."""
    device: str = "auto"
    """Torch device, or auto: cuda where there is one, else cpu."""
    compile: bool = False
    """Whether networks are compiled (torch.compile); worth it on a GPU."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require_training_seed("seed", self.seed)
        require_resume(self.resume)
        for key in ("offline_steps", "online_steps", "online_warmup", "online_flow_steps", "clone_steps"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0")
        for key in ("batch_size", "eval_every_steps", "eval_episodes", "log_every_steps", "save_every_steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.cached_samples >= 0, "cached_samples", self.cached_samples, "at least 0")
        limit, steps, sizes = self.save_total_limit, self.test_steps, self.test_step_sizes
        require(limit is None or limit >= 1, "save_total_limit", limit, "null or at least 1")
        require(bool(steps) and min(steps) >= 0, "test_steps", steps, "a list of at least one number, none below 0")
        finite = bool(sizes) and all(0 < size < float("inf") for size in sizes)
        require(finite, "test_step_sizes", sizes, "a list of finite numbers above 0")
        cached = self.cached_samples
        valid = "0 without clone_steps: what is cached is drawn from a trained clone"
        require(not cached or self.clone_steps > 0, "cached_samples", cached, valid)
        valid = (
            "0 with online_steps: a cache holds for the data's states only (to continue a run that had one, add "
            "--allow_changes '[cached_samples]')"
        )
        require(not cached or not self.online_steps, "cached_samples", cached, valid)
        require(set(self.report_to) <= {"tensorboard", "wandb"}, "report_to", self.report_to, "tensorboard or wandb")

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return self.clone_steps + self.offline_steps + self.online_steps

    @property
    def folder(self) -> Path:
        """output_dir as a path."""
        return Path(self.output_dir)

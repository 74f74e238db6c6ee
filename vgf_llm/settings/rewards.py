"""Settings of rewards that are called: cache, time limit, retries. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from vgf_llm.errors import require


@dataclass(frozen=True)
class RewardCallSettings:
    """How rewards that are functions or servers are called."""

    reward_cache: str | None = field(default=None, kw_only=True)
    """File that keeps every reward that was paid for, so that no run pays twice; null keeps none. Runs may share it.
    A function must score each response on its own: it is called with those alone that are not in the file."""
    reward_timeout_sec: float | None = field(default=None, kw_only=True)
    """Seconds that one call of a reward may take, above 0; null waits for a function, and 120 s for a server."""
    reward_retries: int = field(default=2, kw_only=True)
    """Further attempts after a call that failed or was late, at least 0; an error in the function's code gets none."""
    reward_concurrency: int = field(default=8, kw_only=True)
    """Calls under way at a time per process, of servers and of functions that score one response each; at least 1."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        limit = self.reward_timeout_sec
        require(limit is None or limit > 0, "reward_timeout_sec", limit, "null or above 0")
        require(self.reward_retries >= 0, "reward_retries", self.reward_retries, "at least 0")
        require(self.reward_concurrency >= 1, "reward_concurrency", self.reward_concurrency, "at least 1")
        require(self.reward_cache != "", "reward_cache", self.reward_cache, "null or the name of a file")


HOW_REWARDS_ARE_CALLED = ("reward_cache", "reward_timeout_sec", "reward_retries", "reward_concurrency")
"""Names of these settings: how rewards are come by, not what they are."""

"""Options of the server. This module imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from math import isfinite
from operator import attrgetter
from typing import Literal

from vgf_llm.errors import require, require_finite
from vgf_llm.settings import EngineSettings, ImplicitPolicySettings

LIMITED = ("budget.steps", "budget.rounds", "budget.nats", "num_particles", "draws")
"""Settings of a request's answer that have a limit of the same name."""


@dataclass(frozen=True)
class LimitSettings:
    """The most that one request may ask for."""

    steps: int = 8
    """Flow steps per round, at least 0."""
    rounds: int = 4
    """Rounds, at least 1."""
    num_particles: int = 32
    """Responses that are sampled and moved, at least 1."""
    draws: int = 8
    """Texts decoded from each moved response, at least 1."""
    nats: float = 16.0
    """KL that decoding may spend on a response, in nats, at least 0."""
    max_tokens: int = 256
    """Tokens of the answer, at least 1."""
    prompt_tokens: int = 2048
    """Tokens of the prompt, at least 1; the model's own limit holds beside it."""
    timeout_sec: float = 120.0
    """Seconds from a request's arrival to its answer, above 0; also what holds where a request names none."""
    body_kib: int = 256
    """Size of a request's body, in KiB, at least 1."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        for one in fields(self):
            value, least = getattr(self, one.name), 0 if one.name in ("steps", "nats") else 1
            if one.name == "timeout_sec":
                require_finite("timeout_sec", value, 0, "above 0 and finite", above=True)
            else:
                require_finite(one.name, value, least, f"at least {least} and finite")


@dataclass(frozen=True)
class ServeSettings(ImplicitPolicySettings):
    """Where to listen, what a request gets by default, the most it may ask for, and how many are served at once."""

    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs a key in VGF_API_KEY."""
    port: int = 8000
    """Port to listen on, 0 to 65535; 0 takes a free one."""
    served_name: str | None = None
    """What requests call the model; model_name_or_path when unset."""
    limits: LimitSettings = field(default_factory=LimitSettings)
    """The most that one request may ask for."""
    max_running: int = 8
    """Requests worked on at once, at least 1; their texts share the engine's batch."""
    max_waiting: int = 64
    """Requests that may wait for a place, at least 0; more are answered with 429."""
    on_engine_death: Literal["restart", "exit"] = "restart"
    """What to do when the engine died: start it again, or end with exit code 1."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """The vllm engine."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        super().__post_init__()
        require(0 <= self.port <= 65535, "port", self.port, "from 0 to 65535")
        require(
            self.decoder != "stream", "decoder", self.decoder, "a decoder that writes in the engine: not stream yet"
        )
        require(self.max_running >= 1, "max_running", self.max_running, "at least 1")
        require(self.max_waiting >= 0, "max_waiting", self.max_waiting, "at least 0")
        for one in fields(self.budget):
            value = getattr(self.budget, one.name)
            is_sent = not isinstance(value, float) or isfinite(value)  # in every answer, and JSON has no infinity
            require(is_sent, f"budget.{one.name}", value, "finite to be served")
        for key in LIMITED:
            name = key.rpartition(".")[2]
            value, limit = attrgetter(key)(self), getattr(self.limits, name)
            if limit != getattr(LimitSettings(), name):  # the limit was set, so it is what is to be mended
                require(value <= limit, f"limits.{name}", limit, f"at least {key}, which is {value}")
            require(value <= limit, key, value, f"at most limits.{name}, which is {limit}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

"""What the server counts, in a registry of its own, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vgf_llm.serving.admission import Admission
from vgf_llm.serving.service import Answer

_BUCKETS_SEC = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("vgf_requests", "Requests answered", ["endpoint", "status"], registry=self.registry)
        self.running = Gauge("vgf_requests_running", "Requests worked on", registry=self.registry)
        self.waiting = Gauge("vgf_requests_waiting", "Requests that wait for a place", registry=self.registry)
        self.seconds = Histogram(
            "vgf_stage_seconds", "Time by stage", ["stage"], buckets=_BUCKETS_SEC, registry=self.registry
        )
        self.tokens = Counter("vgf_tokens", "Tokens of prompts and of answers", ["kind"], registry=self.registry)
        self.nats = Counter("vgf_nats", "KL from the base model spent on answers, in nats", registry=self.registry)
        self.engine_up = Gauge("vgf_engine_up", "Whether an engine runs", registry=self.registry)
        self.restarts = Counter("vgf_engine_restarts", "Engines started after one died", registry=self.registry)

    def watch(self, admission: Admission) -> None:
        """Read how many requests run and wait from their source."""
        self.running.set_function(lambda: admission.running)
        self.waiting.set_function(lambda: admission.waiting)

    def answered(self, answer: Answer) -> None:
        """Count what an answer took."""
        self.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.tokens.labels("completion").inc(answer.completion_tokens)
        self.nats.inc(answer.transport["nats"] or 0)
        for stage, seconds in answer.transport["seconds"].items():
            self.seconds.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)

"""A clock that stops a trainer and saves its adapter on the way, and the account that a finished run gives of itself.

A run trains for a number of minutes of its trainer's own time: the clock starts when training begins, with the seconds
spent before it on the method's account (the pairs of DPO), and stands still while an adapter is saved. Loading models
is on nobody's account. At every mark the adapter as it is goes into ``mark_<i>``; the last mark ends the training.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.training_job import RESULT_NAME, Clock, Job, identity
from vgf_llm.machine.facts import facts
from vgf_llm.runs.files import write_json_atomic
from vgf_llm.settings import ModelSettings, SamplingSettings

CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


class TimeMarks(TrainerCallback):
    """Stops a trainer after its minutes and saves the adapter at evenly spaced marks.

    Args:
        folder: Where ``mark_<i>`` go.
        minutes: Training time, above 0.
        marks: Adapters saved, at least 1.
        spent_sec: Seconds already used when training begins.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        folder: str | Path,
        minutes: float,
        marks: int = 4,
        spent_sec: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder = Path(folder)
        self.due_sec = [minutes * 60 * (i + 1) / marks for i in range(marks)]
        self.spent_sec = spent_sec
        self.clock = clock
        self.saved: list[dict[str, Any]] = []
        self.steps = 0
        self.training_sec = 0.0
        self._started = 0.0
        self._processor_started = 0.0
        self.processor_sec = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started, self._processor_started = self.clock(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Save what is due; stop after the last mark."""
        self.steps = state.global_step
        self.training_sec = self.clock() - self._started
        self.processor_sec = time.process_time() - self._processor_started
        if self.spent_sec + self.training_sec >= self.due_sec[len(self.saved)]:
            before, processor_before = self.clock(), time.process_time()
            self._save(model)
            self._started += self.clock() - before
            self._processor_started += time.process_time() - processor_before
        if len(self.saved) == len(self.due_sec):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Save the marks that a run of a limited number of steps did not live to see."""
        while len(self.saved) < len(self.due_sec):
            self._save(model, at_least_one=True)

    def _save(self, model: Any, at_least_one: bool = False) -> None:
        """Save the adapter for every mark that is due."""
        policy = getattr(model, "policy", model)  # our trainer wraps the policy together with a learned value
        now_sec = self.spent_sec + self.training_sec
        remaining = self.due_sec[len(self.saved) :]
        due = [mark for mark in remaining if now_sec >= mark] or (remaining[:1] if at_least_one else [])
        for _ in due:
            number = len(self.saved) + 1
            policy.save_pretrained(str(self.folder / f"mark_{number}"))
            self.saved.append({"mark": number, "minutes": round(now_sec / 60, 4), "steps": self.steps})


def write_result(
    job: Job, models: ModelSettings, sampling: SamplingSettings, marks: TimeMarks, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write and return what a finished run is known by: its settings, times and memory, and facts of the method."""
    result = {
        "job": identity(job, models, sampling),
        "marks": marks.saved,
        "steps": marks.steps,
        "seconds_a_step": round(marks.training_sec / max(marks.steps, 1), 4),
        "processor_seconds_a_step": round(marks.processor_sec / max(marks.steps, 1), 4),
        "seconds_before_training": round(marks.spent_sec, 2),
        "peak_memory_gib": round(peak_resident_gib(), 4),
        **_gpu(),
        **facts,
    }
    write_json_atomic(Path(job.output_dir) / RESULT_NAME, result)
    return result


def _gpu() -> dict[str, Any]:
    """Return the most memory that tensors took on the GPU, and its name, where there is one."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"peak_gpu_memory_gib": round(peak, 4), **facts("gpu")}


def peak_resident_gib() -> float:
    """Return the most memory that this process ever had resident, in GiB, weights and libraries included.

    Linux's ru_maxrss starts from that of the process that started this one, so it is read from /proc where that exists.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

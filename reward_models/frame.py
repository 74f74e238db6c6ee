"""The frame of a reward or value training: figures on its bar, and every log line in metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward_models.folder import METRICS_NAME
from vgf_llm.io import append_jsonl, read_jsonl, write_text_atomic
from vgf_llm.progress import Bar

_SHOWN = {"loss": "loss", "accuracy": "accuracy", "explained_variance": "explained variance"}


def score_figures(logs: Mapping[str, float]) -> dict[str, float | str]:
    """Return what the bar shows of a log line: loss, accuracy, and the same of an evaluation."""
    found: dict[str, float | str] = {}
    for name, shown in _SHOWN.items():
        for prefix, where in (("", ""), ("eval_", "held-out ")):
            if prefix + name in logs:
                found[where + shown] = f"{float(logs[prefix + name]):.3f}"
    return found


def keeps_lines(trainer: Any) -> Callable[[int, Mapping[str, float], Bar], None] | None:
    """Return what writes log lines into metrics.jsonl of the output folder; None on processes that write nothing."""
    if not trainer.is_world_process_zero():
        return None
    path = Path(trainer.args.output_dir) / METRICS_NAME
    begun = False

    def keep(step: int, logs: Mapping[str, float], bar: Bar) -> None:
        nonlocal begun
        if not {"loss", "eval_loss"} & set(logs):
            return
        if not begun:
            begun = True
            _forget_from(path, step)
        append_jsonl(path, [{"step": step, **logs}])

    return keep


def _forget_from(path: Path, step: int) -> None:
    """Drop the lines of an earlier run, or of this one before it was stopped."""
    if path.is_file():
        kept = [row for row in read_jsonl(path) if row.get("step", 0) < step]
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

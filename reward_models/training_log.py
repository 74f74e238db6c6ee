"""The frame of a reward or value training: figures on its bar, and every log line in metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward_models.folder import METRICS_NAME
from vgf_llm.console.progress import Bar, stage
from vgf_llm.machine.speed import expected_sec, training_flops
from vgf_llm.runs.files import append_jsonl, read_jsonl, write_text_atomic

_SAMPLED_ROWS = 256
_SHOWN = {"loss": "loss", "accuracy": "accuracy", "explained_variance": "explained variance"}


def score_figures(logs: Mapping[str, float]) -> dict[str, float | str]:
    """Return what the bar shows of a log line: loss, accuracy, and the same of an evaluation."""
    found: dict[str, float | str] = {}
    for name, shown in _SHOWN.items():
        for prefix, where in (("", ""), ("eval_", "held-out ")):
            if prefix + name in logs:
                found[where + shown] = f"{float(logs[prefix + name]):.3f}"
    return found


def announce(trainer: Any) -> None:
    """Print the title of a training that is about to begin, with the time that its steps are expected to take."""
    args, rows = trainer.args, trainer.train_dataset
    step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(rows) / step_rows)
    sample = rows[:_SAMPLED_ROWS]
    tokens = sum(_tokens(row) for row in sample) / len(sample)
    own_rows = steps * step_rows / args.world_size
    dtype = "bfloat16" if args.bf16 else "float32"
    seconds = expected_sec(training_flops(trainer.model, own_rows * tokens), dtype, args.device.type)
    stage(f"training: {steps} steps of {step_rows} rows", seconds)


def _tokens(row: Any) -> int:
    """Return the tokens that a row makes the model read: of a pair both texts, each with the prompt."""
    if hasattr(row, "chosen"):
        return 2 * len(row.prompt) + len(row.chosen) + len(row.rejected)
    return len(row.prompt) + len(row.response)


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

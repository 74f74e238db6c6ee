"""Files that a run writes while it trains: metrics.jsonl, completions of each logged step; and its warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vgf_llm.console.screen import say
from vgf_llm.errors import OutputError
from vgf_llm.runs.files import append_jsonl, read_jsonl, write_text_atomic
from vgf_llm.training.metrics import nothing_learns
from vgf_llm.training.rollout import Rollout, completions

METRICS_NAME = "metrics.jsonl"
EARLIER_NAME = "metrics.earlier.jsonl"
COMPLETIONS_FOLDER = "completions"


class RunLog:
    """The files of a run.

    Args:
        output_dir: The run's folder.
        tokenizer: Turns responses into text.
        writes: Whether this process writes; the others keep silent.
    """

    def __init__(self, output_dir: str | Path, tokenizer: Any, writes: bool = True) -> None:
        self.folder = Path(output_dir)
        self.tokenizer = tokenizer
        self.writes = writes
        self._rows: list[dict[str, Any]] = []
        self._step = 0

    def start(self, step: int) -> None:
        """Drop what an earlier run, or this one before it was stopped, wrote after the step that it continues from.

        A run that starts anew keeps the earlier one's lines as metrics.earlier.jsonl.

        Raises:
            OutputError: A file cannot be written.
        """
        path = self.folder / METRICS_NAME
        if not self.writes or not path.is_file():
            return
        if step == 0:
            self._set_aside(path)
        else:
            kept = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
            write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        for file in self.folder.glob(f"{COMPLETIONS_FOLDER}/step_*.parquet"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()

    def _set_aside(self, path: Path) -> None:
        """Keep a log under another name."""
        try:
            path.replace(path.with_name(EARLIER_NAME))
        except OSError as error:
            raise OutputError(f"'{path}' cannot be renamed ({error.strerror or error})") from error

    def metrics(self, step: int, epoch: float | None, metrics: dict[str, float]) -> None:
        """Append a line, write the step's completions, and warn where nothing can be learned."""
        if not self.writes:
            return
        append_jsonl(self.folder / METRICS_NAME, [{"step": step, "epoch": epoch} | metrics])
        self._write_completions()
        for reason in nothing_learns(metrics):
            say(f"warning: step {step}: {reason}")

    def completions(self, rollout: Rollout, step: int) -> None:
        """Keep the responses of a rollout until the step's line is written."""
        if self.writes:
            self._rows += completions(rollout, self.tokenizer, step)
            self._step = step

    def _write_completions(self) -> None:
        if not self._rows:
            return
        import pyarrow
        import pyarrow.parquet

        folder = self.folder / COMPLETIONS_FOLDER
        path = folder / f"step_{self._step:06d}.parquet"
        try:
            folder.mkdir(exist_ok=True)
            temporary = path.with_suffix(".tmp")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self._rows), temporary)
            temporary.replace(path)
        except OSError as error:
            raise OutputError(f"'{path}' cannot be written ({error.strerror or error})") from error
        self._rows = []

"""The screen of a transformers Trainer: a bar in place of its own bars and printed dictionaries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from vgf_llm.console.progress import Bar

Figures = Callable[[Mapping[str, float]], dict[str, float | str]]
"""Picks what the bar shows from a log line of the Trainer."""


class ShowsTraining(TrainerCallback):
    """Draws a Trainer's steps, and its evaluations inside them.

    Args:
        title: Of the bar.
        figures: What it shows of a log line.
        logged: Called with the step, the log line and the bar at every log line; may be None.
        bars: Closes the bar.
    """

    def __init__(
        self,
        title: str,
        figures: Figures,
        logged: Callable[[int, Mapping[str, float], Bar], None] | None,
        bars: contextlib.ExitStack,
    ) -> None:
        self.title, self.figures, self.logged, self._bars = title, figures, logged, bars
        self._bar: Bar | None = None
        self._evaluation: contextlib.ExitStack | None = None
        self._evaluation_bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._bar = self._bars.enter_context(Bar(self.title, state.max_steps, "steps"))
        self._bar.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
        if self._bar is not None:
            self._bar.move_to(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the figures."""
        if self._bar is None or not logs:
            return
        self._bar.move_to(state.global_step, **self.figures(logs))
        if self.logged is not None:
            self.logged(state.global_step, logs, self._bar)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a batch of an evaluation."""
        if self._evaluation is None:
            rows = getattr(kwargs.get("eval_dataloader"), "dataset", None)
            total = len(rows) if isinstance(rows, Sized) else None
            self._evaluation = contextlib.ExitStack()
            scoring = Bar("scoring held-out rows", total, "rows", aside=True)
            self._evaluation_bar = self._evaluation.enter_context(scoring)
        bar = self._evaluation_bar
        if bar is not None:
            done = bar.done + args.eval_batch_size * args.world_size
            bar.move_to(done if bar.total is None else min(done, bar.total))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the evaluation's bar away."""
        self.end_evaluation()

    def end_evaluation(self) -> None:
        """Take the evaluation's bar away."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = self._evaluation_bar = None


@contextlib.contextmanager
def shown(
    trainer: Trainer,
    title: str,
    figures: Figures,
    logged: Callable[[int, Mapping[str, float], Bar], None] | None = None,
) -> Iterator[None]:
    """Show what a Trainer does for as long as the context is open, and nothing of its own printing.

    Args:
        trainer: About to train.
        title: Of the bar.
        figures: What the bar shows of a log line.
        logged: Called with the step, the log line and the bar at every log line.
    """
    hide_own_output(trainer)
    with contextlib.ExitStack() as bars:
        callback = ShowsTraining(title, figures, logged, bars)
        trainer.add_callback(callback)
        try:
            yield
        finally:
            callback.end_evaluation()
            trainer.remove_callback(callback)


def hide_own_output(trainer: Trainer) -> None:
    """Remove the callbacks that print dictionaries and draw tqdm bars."""
    handler: CallbackHandler = trainer.callback_handler
    for kind in (PrinterCallback, ProgressCallback):
        handler.remove_callback(kind)

r"""Prove on this machine that a run can be resumed: continue from a checkpoint twice, and compare the results.

    vgf-llm verify-resume --checkpoint outputs/<run>/checkpoint-50 --steps 2
    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml \
        -m vgf_llm.verify_resume --checkpoint outputs/<run>/checkpoint-50

The checkpoint is verified against its manifest first and not changed. Each continuation writes into a temporary folder
beside it; what a killed call left there is cleared first, and both are removed at the end. Exit code 0: bit for bit the
same; 1: they differ, and the first differences are printed (as on a GPU with kernels that are not deterministic). The
last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries
from vgf_llm.console.screen import emit, say
from vgf_llm.errors import ConfigError, OutputError, require
from vgf_llm.runs.manifest import verify
from vgf_llm.settings import SamplingSettings
from vgf_llm.settings.parse import parse
from vgf_llm.train import CONFIG_NAME
from vgf_llm.training.settings import OptimSettings, PolicySettings, TrainScript, VGFSettings

_SHOWN = 10


@dataclass(frozen=True)
class VerifySettings:
    """Which checkpoint, and how far."""

    checkpoint: str
    """Folder of a checkpoint, in the output folder of its run."""
    steps: int = 2
    """Optimiser steps of each continuation, at least 1."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        require(self.steps >= 1, "steps", self.steps, "at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 where the continuations agree, 1 where they differ."""
    (settings,) = parse(
        VerifySettings, argv=argv, prog="vgf-llm verify-resume", description="Resume a checkpoint twice and compare."
    )
    with library_output(None):
        differences = run(settings)
    for difference in differences[:_SHOWN]:
        say(difference)
    emit(json.dumps({"steps": settings.steps, "differences": len(differences)}))
    return 1 if differences else 0


def run(settings: VerifySettings) -> list[str]:
    """Continue twice and return what differs; empty on processes other than the first.

    Raises:
        ConfigError: The run's vgf_config.json is missing.
        CheckpointError: The checkpoint is not whole.
    """
    checkpoint = Path(settings.checkpoint)
    config = checkpoint.parent / CONFIG_NAME
    if not checkpoint.is_dir():
        raise ConfigError(
            f"checkpoint: '{checkpoint}' is not a folder; name a checkpoint in the output folder of its run"
        )
    if not config.is_file():
        raise ConfigError(f"checkpoint: '{config}' is missing; name a checkpoint in the output folder of its run")
    first = verify(checkpoint).step
    load_libraries("vgf_llm.training.trainer")
    from accelerate import PartialState

    from vgf_llm.runs.compare import compare_checkpoints

    folders = [checkpoint.parent / f".verify-resume-{number}" for number in (1, 2)]
    try:
        one, other = [_go_on(config, checkpoint, folder, first + settings.steps) for folder in folders]
        state = PartialState()
        differences = compare_checkpoints(one, other) if state.is_main_process else []
        state.wait_for_everyone()  # the first process still reads them
        return differences
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Make a folder empty; an earlier call may have left something there.

    Raises:
        OutputError: Something there cannot be removed.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be emptied ({error.strerror or error}); remove it") from error


def _settings(config: Path) -> tuple[Any, ...]:
    """Read the settings that a run has written, also those of a version that called `resume` otherwise."""
    kinds = (TrainScript, PolicySettings, VGFSettings, OptimSettings, SamplingSettings)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        written = json.loads(config.read_text(encoding="utf-8"))
        written.pop("resume_from_checkpoint", None)
        json.dump(written, file)
        file.flush()
        return parse(*kinds, argv=["--config", file.name])


def _go_on(config: Path, checkpoint: Path, folder: Path, until: int) -> Path:
    """Train on to a step; returns the checkpoint written there."""
    from transformers import TrainerCallback

    from vgf_llm.console.trainer_screen import shown
    from vgf_llm.runs.going_on import is_finished
    from vgf_llm.runs.trainer_internals import steps_wanted
    from vgf_llm.train import build_trainer
    from vgf_llm.training.observing import bar_figures
    from vgf_llm.training.resume import checkpoint_to_resume

    class StopAt(TrainerCallback):
        """Saves and stops."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= until:
                control.should_save = control.should_training_stop = True

    script, policy, method, optim, sampling = _settings(config)
    script = dataclasses.replace(script, output_dir=str(folder))
    optim = dataclasses.replace(
        optim, resume=str(checkpoint), report_to="none", save_total_limit=None
    )  # every checkpoint stays until it is compared
    trainer = build_trainer(script, policy, method, optim, sampling, [StopAt()])
    if is_finished(checkpoint, steps_wanted(trainer)):
        raise ConfigError(f"checkpoint: '{checkpoint}' is of the run's last step; verify an earlier one")
    if trainer.is_world_process_zero():
        _empty(folder)
    trainer.accelerator.wait_for_everyone()
    with shown(trainer, f"training to step {until}", bar_figures):
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.checkpoints, optim))
    trainer.accelerator.wait_for_everyone()
    step = trainer.state.global_step
    if step < until:
        raise ConfigError(f"steps: the run ends at step {step}; verify an earlier checkpoint, or fewer steps")
    return folder / f"checkpoint-{step}"


if __name__ == "__main__":
    sys.exit(run_main(main))

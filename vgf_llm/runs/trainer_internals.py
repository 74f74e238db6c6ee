"""The private attributes of transformers' Trainer that are read or set here, each with the reason.

They hold for the version that pyproject.toml pins. Private methods that are overridden stand in the trainers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Trainer


@dataclass(frozen=True)
class LossSums:
    """What the Trainer has added up of its loss.

    Attributes:
        loss: Since the last log line, this process's.
        logged_loss: Of all log lines before.
        logged_step: The step of the last log line.
    """

    loss: float
    logged_loss: float
    logged_step: int


def loss_sums(trainer: Trainer) -> LossSums:
    """Return the sums of the next log line; the Trainer saves none of them with a checkpoint."""
    return LossSums(trainer._tr_loss.item(), trainer._total_loss_scalar, trainer._globalstep_last_logged)


def set_loss_sums(trainer: Trainer, sums: LossSums) -> None:
    """Give the sums of a checkpoint back, after the Trainer has set its own to 0 at the beginning of training."""
    trainer._tr_loss.fill_(sums.loss)
    trainer._total_loss_scalar = sums.logged_loss
    trainer._globalstep_last_logged = sums.logged_step


def rows_per_forward(trainer: Trainer) -> int:
    """Return the rows that a process gets in a forward; ``args`` does not know what the Trainer has changed it to."""
    rows: int = trainer._train_batch_size
    return rows


def steps_wanted(trainer: Trainer) -> int:
    """Return the optimiser steps that a trainer's settings ask for, as the Trainer counts them from its batches.

    The loader that is made for it is forgotten again, and no random number is taken from the run.
    """
    args, loaders = trainer.args, trainer.accelerator._dataloaders
    if args.max_steps > 0:
        return int(args.max_steps)
    kept = list(loaders)
    with torch.random.fork_rng(devices=[]):
        steps: int = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    loaders[:] = kept
    return steps

"""Training of a reward model with an output per objective: Bradley-Terry over what pairs state on each.

A step is the mean over all stated (pair, objective) of its batches on all devices, however unevenly they are spread.
With one objective that every pair states for its chosen response, it is `RewardTrainer`'s step bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from reward_models.loading import reward_model
from reward_models.losses import count_agreements, objectives_loss
from reward_models.settings import RewardTraining
from reward_models.trainer import ScoreTrainer


class ObjectiveTrainer(ScoreTrainer):
    """Trainer over `PairCollator` batches of pairs with differences; its targets are the differences [B, K]."""

    target_name = "difference"

    def __init__(self, *args: Any, settings: RewardTraining, **kwargs: Any) -> None:
        """Take the Trainer's arguments and the loss settings."""
        super().__init__(*args, settings=settings, **kwargs)
        self.names: list[str] = reward_model(self.model).config.objectives
        self.compute_metrics = functools.partial(objective_accuracy, self.names)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Score 2B rows and compare the halves on each objective; outputs are the scores [B, 2, K]."""
        difference_BK, settings = inputs["difference"], self.settings
        rewards = model(**{name: tensor for name, tensor in inputs.items() if name != "difference"})
        chosen_BK, rejected_BK = rewards.reshape(2 * len(difference_BK), -1).chunk(2)
        scale = settings.margin_scale if settings.use_margin else 0.0
        loss, metrics = objectives_loss(chosen_BK, rejected_BK, difference_BK, scale, settings.centring)
        if num_items_in_batch is not None:  # the Trainer takes the mean of its batches and devices
            batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * ((difference_BK != 0).sum() * batches / num_items_in_batch)
        if model.training:
            agree_K, stated_K = count_agreements(chosen_BK, rejected_BK, difference_BK)
            for name, agree, stated in zip(self.names, agree_K.float(), stated_K.float(), strict=True):
                metrics |= {f"agree/{name}": agree, f"stated/{name}": stated}
            self.record(metrics)
        return (loss, torch.stack([chosen_BK, rejected_BK], dim=1)) if return_outputs else loss

    def means(self) -> dict[str, float]:
        """Return the mean metrics, with the accuracy on each objective over the pairs that state it."""
        found = super().means()
        for name in self.names:
            del found[f"agree/{name}"], found[f"stated/{name}"]
            if stated := float(self._sums[f"stated/{name}"]):
                found[f"accuracy/{name}"] = round(float(self._sums[f"agree/{name}"]) / stated, 4)
        return found

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Count the stated (pair, objective) of an optimiser step over all devices."""
        if not batch_samples:
            return None
        return self.over_devices(sum(int((batch["difference"] != 0).sum()) for batch in batch_samples), device)


def objective_accuracy(names: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of stated (pair, objective) that are scored as stated: of all, and of each objective."""
    scores_B2K, difference_BK = (torch.as_tensor(array) for array in (prediction.predictions, prediction.label_ids))
    agree_K, stated_K = count_agreements(scores_B2K[:, 0], scores_B2K[:, 1], difference_BK)
    figures = {"accuracy": float(agree_K.sum() / stated_K.sum())}
    for name, agree, stated in zip(names, agree_K.tolist(), stated_K.tolist(), strict=True):
        figures |= {f"accuracy/{name}": agree / stated} if stated else {}
    return figures

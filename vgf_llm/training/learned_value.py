"""The value that is learned along with a policy: its target, what it learns from, and the direction it gives the flow.

The direction is the value's input gradient, or that of a secant head trained along with it (the amortised gradient
network of Value Gradient Flow, arXiv 2604.14265, in its discrete form): a flow step is then a forward pass.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from reward_models.loading import reward_model
from reward_models.modelling import RewardModel
from reward_models.secant import SecantHead, save_secant_head, secant_gradient
from reward_models.secant_online import SecantRows, secant_rows
from reward_models.value_losses import secant_loss, td_lambda_targets, value_loss
from reward_models.value_model import EmaTarget
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.responses import Responses
from vgf_llm.training.batch import Counts, TrainBatch, ValueBatch, policy_rows
from vgf_llm.training.rollout import Rollout
from vgf_llm.training.settings import LearnedValueSettings

_HEADS = {"head", "skip_head"}


class LearnedValue:
    """A token-level value with its slow target, and a secant head where the settings ask for one.

    Args:
        model: A `RewardModel`, or the PeftModel around one.
        settings: Returns, rates, and where directions come from.
        seed: Of the secant head.
    """

    def __init__(self, model: nn.Module, settings: LearnedValueSettings, seed: int = 0) -> None:
        self.model, self.settings = model, settings
        self.secant: SecantHead | None = None
        if settings.gradient == "secant":
            width = self.reward_model.embedding_table_VD.shape[1]
            base = "skip" if self.reward_model.skip_head is not None else "none"
            self.secant = SecantHead(width, base=base, seed=seed).to(self.reward_model.device)

    def start(self) -> None:
        """Start the target as the value is now: once what trains is settled and on its device."""
        self.target = EmaTarget(self.model)

    @property
    def reward_model(self) -> RewardModel:
        """The value as what scores responses."""
        return reward_model(self.model)

    @property
    def trained(self) -> list[nn.Module]:
        """The modules whose gradients are clipped each by itself."""
        return [self.model] if self.secant is None else [self.model, self.secant]

    def flow(self) -> tuple[RewardModel, GradientSource]:
        """Return what the flow climbs, and where its direction comes from."""
        return self.reward_model, exact_gradient if self.secant is None else secant_gradient(self.secant)

    def value_batch(self, rollout: Rollout) -> ValueBatch:
        """Return the pool as the value takes it, with TD(lambda) targets."""
        pool, rewards_BM = rollout.pool, rollout.all_rewards_BM
        rows = policy_rows(pool, torch.ones_like(rewards_BM, dtype=torch.bool))
        inputs, mask_RT = rows.value_inputs, rows.mask_RT
        values_RS = self.target.call(self.model, **inputs, token_level=True)
        values_BMT1 = values_RS[:, -mask_RT.shape[1] - 1 :].view(*rewards_BM.shape, -1)
        values_BM = values_BMT1.gather(-1, pool.lengths_BN.unsqueeze(-1)).squeeze(-1)
        transported_BM = values_BM[:, rollout.original_scores["reward"].shape[1] :]
        prompt_targets_R = transported_BM.mean(1, keepdim=True).expand_as(rewards_BM).flatten()
        targets_RT1 = td_lambda_targets(
            values_BMT1.flatten(0, 1), rewards_BM.flatten(), mask_RT, self.settings.td_lambda, prompt_targets_R
        )
        mask_RT1 = torch.nn.functional.pad(mask_RT, (1, 0), value=True)
        return ValueBatch(inputs, targets_RT1, mask_RT1)

    def secant_batch(
        self, head: SecantHead, responses: Responses, distribution: Shortlist, seeds_BN: Tensor
    ) -> SecantRows:
        """Return exact changes that the secant head learns from.

        Args:
            head: The secant head.
            responses: B x N originals.
            distribution: Their tokens' shortlists, [..., T, K].
            seeds_BN: Of the substitutions drawn.
        """
        return secant_rows(
            self.reward_model, responses, distribution, seeds_BN, self.settings.secant_substitutions, head.base
        )

    def loss(
        self, values_RS: Tensor, directions_RSD: Tensor | None, batch: TrainBatch, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the value's loss, with the secant head's where there is one, and their metrics by full name.

        Args:
            values_RS: Token-level values of the batch's value inputs, with a graph.
            directions_RSD: The secant head's answer to the batch's features, with a graph.
            batch: Holds what :meth:`value_batch` and :meth:`secant_batch` gave.
            counts: What the losses are divided by.

        Raises:
            ValueError: The batch holds nothing for a value.
        """
        if batch.value is None:
            raise ValueError("a learned value needs targets; the batch holds none")
        value, secant = batch.value, batch.secant
        values_RT1 = values_RS[:, -value.mask_RT1.shape[1] :]
        loss, metrics = value_loss(values_RT1, value.targets_RT1, value.mask_RT1, self.settings.expectile, counts.value)
        if directions_RSD is not None and secant is not None:
            rest = (secant.steps_RSD, secant.targets_RS, secant.known_RS, secant.mask_RS)
            part, more = secant_loss(directions_RSD, *rest, counts.secant)
            loss, metrics = loss + part, metrics | more
        return loss, {f"value/{name}": value for name, value in metrics.items()}

    def follow(self) -> None:
        """Let the target follow the value by one step."""
        self.target.update(self.model, self.settings.target_tau)

    def save_secant(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write the secant head, where there is one, into the saved value's folder, which then states its direction.

        Args:
            folder: Of the saved value.
            tensors: The head's parameters, whole, by name.
        """
        if self.secant is None:
            return
        head = SecantHead(self.secant.width, self.secant.hidden, self.secant.base)
        head.load_state_dict(tensors, strict=False)  # all but the unit, which stays 1
        save_secant_head(head, folder, substitutions=self.settings.secant_substitutions)

    def give_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the parameters of body, heads and secant head out of an optimiser's groups into groups of their own."""
        settings = self.settings
        rates: dict[float, list[nn.Parameter]] = {}
        own = {id(p): (name, p) for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in own:
                    is_head = bool(_HEADS & set(own[id(parameter)][0].split(".")))
                    rate = settings.head_learning_rate if is_head else settings.learning_rate
                    rates.setdefault(rate, []).append(parameter)
        if self.secant is not None:
            rates.setdefault(settings.secant_learning_rate, []).extend(self.secant.parameters())
        taken = {id(parameter) for parameters in rates.values() for parameter in parameters}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
        for rate, parameters in rates.items():
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})

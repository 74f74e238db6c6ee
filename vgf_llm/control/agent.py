"""The agent: a clone of the behaviour, averaged twin critics, and a flow that stands between them and the action.

One update, for a batch (s, a, r, m, s') and N samples of the clone at s':

    x_i^0 ~ clone(s'),   x_i^L = flow(x_i^0; grad_a agg Q(s', .), training budget), clipped to [-1, 1] at each step
    y = r + gamma m pool_i agg Qbar(s', x_i^L)       critics: loss(y - Q_c(s, a)), then Qbar <- (1 - tau) Qbar + tau Q
    clone: flow matching (or likelihood) on (s, a)   gradient network, if amortised: |f(s, a) - grad_a mean_c Q|^2

At test time the same sampling and flow, under another budget, end in the selection of one particle. The flow climbs
the trained critics, the target and nothing else uses the averaged ones. Randomness is handed in as tensors, so that an
update is a function of its arguments.

Departures from the authors' published code are listed in docs/control.md; here: the averaged critics move after the
critics' own step and towards the new parameters (theirs: towards those before it); the amortised variant clips no
gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vgf_llm.control import losses, targets
from vgf_llm.control.networks import Critics, FlowClone, GaussianClone, GradientNetwork, Perceptron
from vgf_llm.control.settings import AgentSettings
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.projections import clip_to_box
from vgf_llm.flow.trajectory import ValueGradient, autograd_value, transport

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Transitions of one update."""

    observations_BO: Tensor
    actions_BA: Tensor
    rewards_B: Tensor
    masks_B: Tensor
    """1 where rewards can follow, 0 where the task has ended."""
    next_observations_BO: Tensor


@dataclass(frozen=True)
class Noise:
    """The random numbers of one update."""

    particles_BNA: Tensor
    """Standard normal: starts of the clone's samples at the next states."""
    clone_BA: Tensor
    """Standard normal: starts of the flow-matching paths."""
    times_B1: Tensor
    """Uniform in [0, 1): their times."""


class ControlAgent(nn.Module):
    """Networks and their optimisers.

    Args:
        settings: Sizes, losses and the training budget.
        observation_size: O.
        action_size: A.
    """

    def __init__(self, settings: AgentSettings, observation_size: int, action_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.action_size = action_size
        sizes = (observation_size, action_size)
        self.clone: FlowClone | GaussianClone = (
            FlowClone(*sizes, settings.clone_hidden, settings.euler_steps)
            if settings.clone == "flow"
            else GaussianClone(*sizes, settings.clone_hidden)
        )
        self.critics = Critics(*sizes, settings.critic_hidden)
        self.averaged = copy.deepcopy(self.critics).requires_grad_(False)
        self.gradient = GradientNetwork(*sizes, settings.critic_hidden) if settings.amortised else None
        self.optimisers: dict[str, torch.optim.Adam] = {}

    def prepare(self, device: str, compiled: bool = False) -> ControlAgent:
        """Move to a device and make the optimisers; called once, before the first update."""
        self.to(device)
        trained = {"clone": self.clone, "critics": self.critics, "gradient": self.gradient}
        self.optimisers = {
            name: torch.optim.Adam(network.parameters(), lr=self.settings.learning_rate, fused=True)
            for name, network in trained.items()
            if network is not None
        }
        if compiled:
            for network in (self.clone, self.critics, self.averaged, self.gradient):
                if network is not None:
                    network.body.compile()
        return self

    @torch.no_grad()
    def normalise_observations(self, mean_O: Tensor, std_O: Tensor) -> None:
        """Have every network see observations less their mean, in units of their spread."""
        for network in self.modules():
            if isinstance(network, Perceptron):
                network.observation_mean_O.copy_(mean_O)
                network.observation_std_O.copy_(std_O)

    # Training ------------------------------------------------------------------------------------------------------

    def update_clone(self, batch: Batch, noise: Noise) -> Metrics:
        """One gradient step of the clone on the data's actions."""
        if isinstance(self.clone, FlowClone):
            points_BA = losses.interpolate(noise.clone_BA, batch.actions_BA, noise.times_B1)
            velocity_BNA = self.clone.velocity(
                batch.observations_BO, points_BA.unsqueeze(1), noise.times_B1.unsqueeze(1)
            )
            loss, metrics = losses.flow_matching(velocity_BNA.squeeze(1), noise.clone_BA, batch.actions_BA)
        else:
            mean_BA = self.clone.mean(batch.observations_BO)
            loss, metrics = losses.gaussian_nll(mean_BA, self.clone.log_std_A, batch.actions_BA)
        self._step("clone", loss)
        return metrics

    def update_critics(self, batch: Batch, samples_BNA: Tensor) -> Metrics:
        """One gradient step of the critics, and of the gradient network where there is one.

        Args:
            batch: Transitions.
            samples_BNA: Samples of the clone at the next states, before transport.

        Returns:
            Losses, values, and how far and how wide the particles are before and after transport.
        """
        target_B, metrics = self.target(batch, samples_BNA)
        q_CB = self.critics(batch.observations_BO, batch.actions_BA.unsqueeze(1)).squeeze(2)
        loss, critic_metrics = self._critic_loss(q_CB, target_B)
        self._step("critics", loss)
        targets.average_into(
            list(self.averaged.parameters()), list(self.critics.parameters()), self.settings.average_rate
        )
        if self.gradient is not None:
            metrics |= self._update_gradient(batch)
        return metrics | critic_metrics

    def target(self, batch: Batch, samples_BNA: Tensor) -> tuple[Tensor, Metrics]:
        """Return the TD target [B] over transported particles of the next state, and the particles' metrics."""
        settings = self.settings
        moved_BNA = self.move(batch.next_observations_BO, samples_BNA, settings.budget)
        with torch.no_grad():
            next_CBN = self.averaged(batch.next_observations_BO, moved_BNA)
            next_BN = targets.aggregate(next_CBN, settings.target_q)
            target_B = targets.td_target(
                batch.rewards_B, batch.masks_B, next_BN, settings.discount, settings.target_pool
            )
            metrics = {
                "target_mean": target_B.mean(),
                "moved_distance": (moved_BNA - samples_BNA).norm(dim=2).mean(),
                "clone_spread": samples_BNA.std(1, correction=0).mean(),
                "moved_spread": moved_BNA.std(1, correction=0).mean(),
            }
        return target_B, metrics

    def _critic_loss(self, q_CB: Tensor, target_B: Tensor) -> tuple[Tensor, Metrics]:
        if self.settings.critic_loss == "expectile":
            return losses.expectile(q_CB, target_B, self.settings.expectile)
        if self.settings.critic_loss == "sql":
            return losses.sql(q_CB, target_B, self.settings.sql_alpha)
        return losses.td(q_CB, target_B)

    def _update_gradient(self, batch: Batch) -> Metrics:
        actions_BNA = batch.actions_BA.unsqueeze(1)
        _, gradient_BNA = self._critic_gradient(batch.observations_BO, "mean")(actions_BNA)
        predicted_BNA = self.gradient(batch.observations_BO, actions_BNA)  # type: ignore[misc]
        loss, metrics = losses.gradient_matching(predicted_BNA.squeeze(1), gradient_BNA.squeeze(1))
        self._step("gradient", loss)
        return metrics

    def _step(self, name: str, loss: Tensor) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    # Particles -----------------------------------------------------------------------------------------------------

    def propose(self, observations_BO: Tensor, noise_BNA: Tensor) -> Tensor:
        """Sample the clone: particles [B, N, A] in [-1, 1] from standard normal noise."""
        return self.clone.sample(observations_BO, noise_BNA)

    def move(self, observations_BO: Tensor, particles_BNA: Tensor, budget: TransportBudget) -> Tensor:
        """Transport particles under a budget and clip them to [-1, 1] after every step; a budget of 0 returns them."""
        if budget.is_none:
            return particles_BNA
        gradient = (
            self._critic_gradient(observations_BO, self.settings.flow_q)
            if self.gradient is None
            else self._network_gradient(observations_BO)
        )
        return transport(particles_BNA, gradient, budget, project=clip_to_box(-1, 1)).final

    @torch.no_grad()
    def act(
        self,
        observations_BO: Tensor,
        noise_BNA: Tensor,
        uniform_B: Tensor,
        budget: TransportBudget,
        select: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Choose an action a state: sample, transport, select.

        Args:
            observations_BO: States.
            noise_BNA: Standard normal starts; N may differ from training.
            uniform_B: Uniform numbers for a selection that draws.
            budget: Test budget.
            select: "max", "softmax" or "random"; None takes the settings'.

        Returns:
            Actions [B, A] in [-1, 1], and how far the selected particles were moved [B].
        """
        samples_BNA = self.propose(observations_BO, noise_BNA)
        moved_BNA = self.move(observations_BO, samples_BNA, budget)
        q_BN = targets.aggregate(self.critics(observations_BO, moved_BNA), self.settings.target_q)
        chosen_B = targets.select(q_BN, select or self.settings.select, uniform_B, self.settings.select_temperature)
        rows_B = torch.arange(len(chosen_B), device=chosen_B.device)
        distance_B = (moved_BNA[rows_B, chosen_B] - samples_BNA[rows_B, chosen_B]).norm(dim=1)
        return moved_BNA[rows_B, chosen_B], distance_B

    def _critic_gradient(self, observations_BO: Tensor, join: str) -> ValueGradient:
        return autograd_value(lambda x_BNA: targets.aggregate(self.critics(observations_BO, x_BNA), join))

    def _network_gradient(self, observations_BO: Tensor) -> ValueGradient:
        """f(s, a) in the gradient's place; the values are not looked at and cost a pass, so they are 0."""
        network: Any = self.gradient
        return lambda x_BNA: (x_BNA.new_zeros(x_BNA.shape[:2]), network(observations_BO, x_BNA))

"""Networks of the control half: clone, critics, gradient network. Torch only.

All are perceptrons of layers [linear, ReLU, layer norm (critics)]; the authors have the norm before the ReLU. Three
things are done for speed and change no number: the critics are one batched product a layer; the first layer is split
into a part of the observation and a part of the rest, so that the observation's is computed once for all N particles;
and a norm's scale and shift are multiplied into the next layer's weights instead of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Perceptron(nn.Module):
    """C independent perceptrons on an observation and further inputs, evaluated together.

    The observation is taken less ``observation_mean_O``, in units of ``observation_std_O``: 0 and 1 until they are set.

    Args:
        observation_size: O.
        rest_size: Width of the further inputs (action, time), 0 for none.
        hidden: Widths of the hidden layers, at least one.
        outputs: Width of the result.
        copies: C >= 1.
        layer_norm: Normalise every hidden layer's output, with its own scale and shift.
    """

    observation_mean_O: Tensor
    observation_std_O: Tensor

    def __init__(
        self,
        observation_size: int,
        rest_size: int,
        hidden: Sequence[int],
        outputs: int,
        copies: int = 1,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.observation_size = observation_size
        self.register_buffer("observation_mean_O", torch.zeros(observation_size))
        self.register_buffer("observation_std_O", torch.ones(observation_size))
        sizes = [observation_size + rest_size, *hidden, outputs]
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.weights = nn.ParameterList(nn.Parameter(_uniform(copies, i, o)) for i, o in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(copies, 1, o)) for _, o in pairs)
        norms = hidden if layer_norm else ()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(copies, 1, h)) for h in norms)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(copies, 1, h)) for h in norms)

    def forward(self, observations_BO: Tensor, *rest: Tensor) -> Tensor:
        """Evaluate at one observation and N further inputs a state.

        Args:
            observations_BO: Observations.
            rest: Tensors [B, N, ...], joined along their last dimension; none at all means N = 1.

        Returns:
            Results [C, B, N, outputs].
        """
        B, N = len(observations_BO), rest[0].shape[1] if rest else 1
        weight, copies = self.weights[0], self.weights[0].shape[0]
        observations_BO = (observations_BO - self.observation_mean_O) / self.observation_std_O
        seen_CBH = torch.baddbmm(
            self.biases[0], observations_BO.expand(copies, -1, -1), weight[:, : self.observation_size]
        )
        hidden = seen_CBH.unsqueeze(2)
        if rest:
            rest_RX = torch.cat(rest, -1).reshape(B * N, -1)
            added = torch.matmul(rest_RX.expand(copies, -1, -1), weight[:, self.observation_size :])
            hidden = hidden + added.view(copies, B, N, -1)
        hidden = hidden.reshape(copies, B * N, -1)
        for index in range(1, len(self.weights)):
            weight, bias = self.weights[index], self.biases[index]
            hidden = F.relu(hidden, inplace=True)
            if len(self.scales):
                hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
                bias = torch.baddbmm(bias, self.shifts[index - 1], weight)
                weight = self.scales[index - 1].transpose(1, 2) * weight
            hidden = torch.baddbmm(bias, hidden, weight)
        return hidden.view(copies, B, N, -1)


class Critics(nn.Module):
    """C critics Q_c(s, a) with layer norm.

    Args:
        observation_size: O.
        action_size: A.
        hidden: Widths of the hidden layers.
        copies: C >= 1.
    """

    def __init__(self, observation_size: int, action_size: int, hidden: Sequence[int], copies: int = 2) -> None:
        super().__init__()
        self.body = Perceptron(observation_size, action_size, hidden, 1, copies, layer_norm=True)

    def forward(self, observations_BO: Tensor, actions_BNA: Tensor) -> Tensor:
        """Return values [C, B, N]."""
        values: Tensor = self.body(observations_BO, actions_BNA)
        return values.squeeze(3)


class GradientNetwork(nn.Module):
    """The amortised variant's f(s, a), which stands in for the critic's gradient.

    Args:
        observation_size: O.
        action_size: A.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, observation_size: int, action_size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = Perceptron(observation_size, action_size, hidden, action_size)

    def forward(self, observations_BO: Tensor, actions_BNA: Tensor) -> Tensor:
        """Return directions [B, N, A]."""
        found_CBNA: Tensor = self.body(observations_BO, actions_BNA)
        return found_CBNA[0]


class FlowClone(nn.Module):
    """A clone of the behaviour by flow matching: noise moves along a learned velocity from time 0 to 1.

    Args:
        observation_size: O.
        action_size: A.
        hidden: Widths of the hidden layers.
        euler_steps: S >= 1, steps of the integration.
    """

    def __init__(self, observation_size: int, action_size: int, hidden: Sequence[int], euler_steps: int) -> None:
        super().__init__()
        self.action_size, self.euler_steps = action_size, euler_steps
        self.body = Perceptron(observation_size, action_size + 1, hidden, action_size)

    def velocity(self, observations_BO: Tensor, points_BNA: Tensor, times_BN1: Tensor) -> Tensor:
        """Return v(s, x, t) [B, N, A]."""
        found_CBNA: Tensor = self.body(observations_BO, points_BNA, times_BN1)
        return found_CBNA[0]

    @torch.no_grad()
    def sample(self, observations_BO: Tensor, noise_BNA: Tensor) -> Tensor:
        """Integrate by Euler's rule: x <- x + v(s, x, l / S) / S for l = 0 .. S-1, then clip to [-1, 1].

        Args:
            observations_BO: States.
            noise_BNA: Standard normal starts.

        Returns:
            actions_BNA.
        """
        points_BNA = noise_BNA
        for step in range(self.euler_steps):
            times_BN1 = points_BNA.new_full((*points_BNA.shape[:2], 1), step / self.euler_steps)
            points_BNA = points_BNA + self.velocity(observations_BO, points_BNA, times_BN1) / self.euler_steps
        return points_BNA.clamp(-1, 1)


class GaussianClone(nn.Module):
    """A clone of the behaviour with one mean a state and one spread for all.

    Args:
        observation_size: O.
        action_size: A.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, observation_size: int, action_size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.action_size = action_size
        self.body = Perceptron(observation_size, 0, hidden, action_size)
        self.raw_log_std_A = nn.Parameter(torch.zeros(action_size))

    @property
    def log_std_A(self) -> Tensor:
        """Logarithm of the spread, kept in [-5, 2]."""
        return self.raw_log_std_A.clamp(-5, 2)

    def mean(self, observations_BO: Tensor) -> Tensor:
        """Return mu(s) [B, A]."""
        found_CBNA: Tensor = self.body(observations_BO)
        return found_CBNA[0, :, 0]

    @torch.no_grad()
    def sample(self, observations_BO: Tensor, noise_BNA: Tensor) -> Tensor:
        """Return mu(s) + sigma * noise, clipped to [-1, 1]; shape [B, N, A]."""
        return (self.mean(observations_BO).unsqueeze(1) + self.log_std_A.exp() * noise_BNA).clamp(-1, 1)


def _uniform(copies: int, inputs: int, outputs: int) -> Tensor:
    """Glorot's uniform distribution."""
    bound = math.sqrt(6 / (inputs + outputs))
    return torch.empty(copies, inputs, outputs).uniform_(-bound, bound)

"""Gaussian noise on a reward model's input embeddings while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reward_models.loading import reward_model


class EmbeddingNoise:
    """Adds noise in training mode until it is removed; its random numbers continue where a checkpoint left them.

    Args:
        model: A reward model, or a LoRA around one.
        scale: Standard deviation per coordinate, in root mean squares of the embedding table, at least 0.
        seed: Of the noise.
    """

    def __init__(self, model: Any, scale: float, seed: int = 0) -> None:
        embedding: Any = reward_model(model).get_input_embeddings()
        self._seed = seed
        self._std = scale * float(embedding.weight.detach().float().square().mean().sqrt())
        self._generators: dict[str, torch.Generator] = {}
        self._hook = embedding.register_forward_hook(self._add)

    def remove(self) -> None:
        """End it."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the random numbers by device, uint8."""
        return {device: generator.get_state() for device, generator in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state from `state_dict`."""
        for device, tensor in state.items():
            self._generators[device] = torch.Generator(device)
            self._generators[device].set_state(tensor)

    def _add(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        device = str(output.device)
        if device not in self._generators:
            self._generators[device] = torch.Generator(output.device).manual_seed(self._seed)
        shape, generator = output.shape, self._generators[device]
        return output + self._std * torch.randn(shape, generator=generator, device=output.device, dtype=output.dtype)


def add_embedding_noise(model: Any, scale: float, seed: int = 0) -> EmbeddingNoise:
    """Add Gaussian noise to the input embeddings while the model trains; `remove()` on the result ends it.

    Args:
        model: a reward model.
        scale: standard deviation per coordinate, in root mean squares of the embedding table.
        seed: of the noise.
    """
    return EmbeddingNoise(model, scale, seed)

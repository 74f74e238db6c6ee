"""A run's checkpoint: networks, averaged critics, adam's moments and online transitions as safetensors.

Nothing else has to be kept: every random number of a run comes from its seed and the number of the step
(`step_generator`), so a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgf_llm.control.agent import ControlAgent
from vgf_llm.control.data import Buffer
from vgf_llm.runs.checkpoint import publish, rotate, saving, staging_folder

AGENT_NAME = "agent.safetensors"
OPTIMISER_NAME = "optimisers.safetensors"
ONLINE_NAME = "online.safetensors"


def step_generator(seed: int, step: int, device: str) -> torch.Generator:
    """Return the source of a step's random numbers, a function of seed and step alone."""
    return torch.Generator(device).manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63)


def save(
    folder: Path, step: int, agent: ControlAgent, buffer: Buffer, identity: dict[str, Any], limit: int | None
) -> Path:
    """Publish a checkpoint and delete the oldest beyond the limit.

    Returns:
        Its folder.

    Raises:
        OutputError: The disk refuses; earlier checkpoints are untouched.
    """
    staging = staging_folder(folder, step)
    with saving(staging):
        save_file({k: v.contiguous() for k, v in agent.state_dict().items()}, staging / AGENT_NAME)
        save_file(_moments(agent), staging / OPTIMISER_NAME)
        if buffer.size > buffer.offline:
            save_file(buffer.online(), staging / ONLINE_NAME)
    published = publish(staging, folder, step, identity)
    rotate(folder, limit)
    return published


def load_agent(folder: Path, agent: ControlAgent) -> None:
    """Put a checkpoint's networks into an agent of the same sizes."""
    agent.load_state_dict(load_file(folder / AGENT_NAME))


def restore(folder: Path, agent: ControlAgent, buffer: Buffer) -> None:
    """Put everything back that `save` wrote."""
    load_agent(folder, agent)
    moments = load_file(folder / OPTIMISER_NAME)
    for name, optimiser in agent.optimisers.items():
        for index, parameter in enumerate(optimiser.param_groups[0]["params"]):
            keys = {key: f"{name}.{index}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if keys["step"] in moments:
                optimiser.state[parameter] = {
                    key: moments[full].to(parameter.device).clone() for key, full in keys.items()
                }
    if (folder / ONLINE_NAME).is_file():
        buffer.restore(load_file(folder / ONLINE_NAME))


def _moments(agent: ControlAgent) -> dict[str, Tensor]:
    return {
        f"{name}.{index}.{key}": value.contiguous()
        for name, optimiser in agent.optimisers.items()
        for index, parameter in enumerate(optimiser.param_groups[0]["params"])
        for key, value in optimiser.state.get(parameter, {}).items()
    }

"""Value gradient flow: particles climb a value for a limited transport budget.

Shapes: B groups (prompts), N particles a group, E any event shape (T x D for text), L flow steps. The N particles of a
group interact; groups do not. torch only, and imported on first use: `TransportBudget` alone costs no torch import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgf_llm.flow.budget import TransportBudget
    from vgf_llm.flow.distances import (
        displacement_in_token_units,
        mmd2,
        mmd2_bound,
        nearest_token_distances,
        wasserstein2,
    )
    from vgf_llm.flow.kernels import median_bandwidth, rbf_kernel, stein_direction
    from vgf_llm.flow.projections import clip_to_ball, clip_to_box
    from vgf_llm.flow.trajectory import Trajectory, ValueGradient, autograd_value, transport

_HOME = {
    "TransportBudget": "budget",
    "displacement_in_token_units": "distances",
    "mmd2": "distances",
    "mmd2_bound": "distances",
    "nearest_token_distances": "distances",
    "wasserstein2": "distances",
    "median_bandwidth": "kernels",
    "rbf_kernel": "kernels",
    "stein_direction": "kernels",
    "clip_to_ball": "projections",
    "clip_to_box": "projections",
    "Trajectory": "trajectory",
    "ValueGradient": "trajectory",
    "autograd_value": "trajectory",
    "transport": "trajectory",
}

__all__ = [
    "TransportBudget",
    "Trajectory",
    "ValueGradient",
    "autograd_value",
    "clip_to_ball",
    "clip_to_box",
    "displacement_in_token_units",
    "median_bandwidth",
    "mmd2",
    "mmd2_bound",
    "nearest_token_distances",
    "rbf_kernel",
    "stein_direction",
    "transport",
    "wasserstein2",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

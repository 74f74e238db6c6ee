"""Reward models: what a response is worth, as a differentiable function of its token embeddings.

`modelling` (the model), `loading`, `ensemble`, `functions` (Python rewards), `losses`, `fidelity` (does the input
gradient predict a token change), `secant` (a fitted direction in its place), `directions` (bonuses that need no
original), `lookahead` (the value itself as one), `card` (what is known about a trained model), `value_losses` and
`value_model` (a value of every prefix, learned from rewards), `classification` (models of others), `sources` (where
they lie), `outputs` (several as one), `checking`, `exporting`, `calling` and `composed` (rewards that are called);
`train`, `train_value`, `train_secant`, `train_direction`, `check`, `import_reward` and `export_reward` (the entry
points). Names load on first use, so that `losses` imports torch only and `--help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "RewardModel": "modelling",
    "RewardModelConfig": "modelling",
    "RewardEnsemble": "ensemble",
    "RewardCard": "card",
    "EmaTarget": "value_model",
    "bradley_terry": "losses",
    "build_value_model": "value_model",
    "gradient_fidelity": "fidelity",
    "load_function": "functions",
    "load_reward_model": "loading",
    "save_reward_model": "loading",
    "save_value_model": "value_model",
    "td_lambda_targets": "value_losses",
    "value_loss": "value_losses",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)

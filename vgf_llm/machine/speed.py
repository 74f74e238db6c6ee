"""Expected times before any work is done: floating-point operations over the measured speed of one product.

A linear layer takes two operations per weight and token forward, and twice that backward. What a training reaches of
the speed of a bare product is taken as a constant share. So an expected time is right within a factor of two; as soon
as steps are timed, the bar's own time left is better.
"""

from __future__ import annotations

import functools
import time
from typing import Any

_SHARE = 0.4  # of the product's speed that a whole step reaches
_MEASURED_SEC = 0.2


@functools.cache
def flops_per_sec(dtype: str = "float32", device: str = "cpu") -> float:
    """Measure the operations per second of a product of matrices of a small model's size.

    Args:
        dtype: A torch dtype by name.
        device: Torch device.
    """
    import torch

    rows, inner, columns = (512, 576, 1536) if device == "cpu" else (4096, 4096, 4096)
    left = torch.ones(rows, inner, dtype=getattr(torch, dtype), device=device)
    right = torch.ones(inner, columns, dtype=getattr(torch, dtype), device=device)
    float((left @ right)[0, 0])  # reading a number waits for a GPU
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _MEASURED_SEC:
        begun = time.perf_counter()
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - begun)  # the first ones wake the threads, and a neighbour slows any
    return 2 * rows * inner * columns / best


def expected_sec(flops: float, dtype: str = "float32", device: str = "cpu") -> float:
    """Return the expected seconds of work of so many operations."""
    return flops / (_SHARE * flops_per_sec(dtype, device))


def training_flops(model: Any, tokens: float) -> float:
    """Return the operations of forward and backward passes of a model over tokens, embeddings left out.

    Args:
        model: A torch module; of frozen weights the gradient with respect to the weights is left out.
        tokens: Of all steps, padding included.
    """
    body = [parameter for name, parameter in model.named_parameters() if "embed" not in name]
    frozen = sum(parameter.numel() for parameter in body if not parameter.requires_grad)
    trained = sum(parameter.numel() for parameter in body if parameter.requires_grad)
    return float((4 * frozen + 6 * trained) * tokens)

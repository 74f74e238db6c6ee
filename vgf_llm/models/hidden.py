"""Hidden states that logits come from: what the output layer of a causal language model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def hidden_shown(model: PreTrainedModel, see: Callable[[Tensor], None] | None) -> Iterator[None]:
    """Show a function what the output layer reads in each forward, [R, T, D], for the duration.

    Args:
        model: A causal language model.
        see: Is shown the hidden states; None: nothing is watched.
    """
    if see is None:
        yield
        return

    def show(_: Any, inputs: tuple[Tensor, ...]) -> None:
        see(inputs[0])

    output: Any = model.get_output_embeddings()
    handle = output.register_forward_pre_hook(show)
    try:
        yield
    finally:
        handle.remove()

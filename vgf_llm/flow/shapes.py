"""Shape checks at the entry of losses and targets, where tensors of other shapes would broadcast without a word.

A tensor's name ends in its dimensions: ``logps_RT`` has two, ``weights_R`` has the first of them, ``loss`` has none.
One letter stands for one size within a call; a number belongs to its letter (``RT1`` is R by T1).
"""

import re
from functools import cache

from torch import Tensor

_DIMENSION = re.compile(r"[A-Z][a-z0-9]*")


def check_shapes(**named: Tensor | float | None) -> None:
    """Refuse tensors whose shapes do not fit their names, or one another.

    Args:
        named: Tensors by name, in the order in which their letters get their sizes. None and numbers are passed over.

    Raises:
        ValueError: Naming the first tensor that does not fit, the shape that is wanted and the one seen.
    """
    sizes: dict[str, int] = {}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            continue
        letters = dimensions(name)
        if len(letters) != tensor.dim() or any(
            sizes.setdefault(letter, size) != size for letter, size in zip(letters, tensor.shape, strict=True)
        ):
            wanted = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
            raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_same_shape(**named: Tensor) -> None:
    """Refuse tensors that are not all of the first one's shape, whatever that is.

    Raises:
        ValueError: Naming the first that differs, its shape and the first one's.
    """
    (first, wanted), *others = named.items()
    for name, tensor in others:
        if tensor.shape != wanted.shape:
            raise ValueError(f"{name} must have the shape of {first}, {list(wanted.shape)}, got {list(tensor.shape)}")


@cache
def dimensions(name: str) -> tuple[str, ...]:
    """Return the dimensions that a name ends in: ``logps_RT1`` gives R and T1, ``num_items`` none."""
    ending = name.rpartition("_")[2]
    found = tuple(_DIMENSION.findall(ending))
    return found if "".join(found) == ending else ()

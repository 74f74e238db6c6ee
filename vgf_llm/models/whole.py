"""Loads models whole, whatever transformers was told about ZeRO-3.

accelerate tells transformers of ZeRO-3 whatever ``zero3_init_flag`` says. From then on every model is split as it is
made: a body that is cut from it takes empty placeholders for weights, without an error, and a model that one process
reads alone waits for the others forever. Models are therefore made whole here, and split when they are prepared.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def loaded_whole() -> Iterator[None]:
    """Let transformers make models whole for as long as the context lasts; also a decorator."""
    deepspeed: Any = sys.modules.get("transformers.integrations.deepspeed")  # who tells transformers has imported it
    if deepspeed is None:
        yield
        return
    told = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = told

"""Which device a name means."""

from __future__ import annotations

from vgf_llm.errors import ConfigError


def resolve_device(device: str) -> str:
    """Return ``device``, with "auto" replaced by cuda where torch sees one, else cpu.

    Raises:
        ConfigError: If torch knows no such device, or sees no such GPU.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown to torch; use auto, cpu, cuda or cuda:<index>") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: torch sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device

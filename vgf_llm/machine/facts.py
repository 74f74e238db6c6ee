"""Facts of the machine that figures were measured on: processor, cores, threads, GPU, load, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def hardware() -> dict[str, Any]:
    """Return the facts that stand with every record: cpu, cores, threads, gpu (None without one), python, torch."""
    return facts("cpu", "cores", "threads", "gpu", "python", "torch")


def device_facts(device: str, on_cpu: Sequence[str], on_gpu: Sequence[str] = ()) -> dict[str, Any]:
    """Return the model of the device that a benchmark ran on, as ``device``, and chosen facts.

    Args:
        device: Torch device.
        on_cpu: Facts that go with a processor, as in `facts`.
        on_gpu: Facts that go with a GPU.
    """
    if device.startswith("cuda"):
        return {"device": _gpu(), **facts(*on_gpu)}
    return {"device": f"cpu: {_cpu_model()}", **facts(*on_cpu)}


def facts(*names: str) -> dict[str, Any]:
    """Return facts by name.

    Args:
        names: Of ``cpu`` and ``processor`` (as Python names it, or "" for the latter), ``system``, ``cores``,
            ``threads`` (torch's), ``gpu`` (None without one), ``python``, ``torch``, ``load_average`` (of the last
            minute), ``omp_wait_policy``.
    """
    return {name: _FACTS[name]() for name in names}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cpu_model() -> str:
    """Return the processor's model as Linux names it, elsewhere its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


_FACTS: dict[str, Callable[[], Any]] = {
    "cpu": lambda: platform.processor() or platform.machine(),
    "processor": platform.processor,
    "system": platform.system,
    "cores": os.cpu_count,
    "threads": _threads,
    "gpu": _gpu,
    "python": platform.python_version,
    "torch": _torch_version,
    "load_average": lambda: round(os.getloadavg()[0], 2),
    "omp_wait_policy": lambda: os.environ.get("OMP_WAIT_POLICY", "default"),
}

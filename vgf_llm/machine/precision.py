"""Chooses the precision of models and of training by what the device has arithmetic units for.

``auto`` is bfloat16 where the CPU or GPU multiplies it in hardware, and float32 elsewhere: without such units torch
falls back to a naive kernel, one product measured at 8 to 73 times the time of float32. Weights that an optimiser
changes stay in float32 whatever the device, because a step of 1e-5 is lost in bfloat16, whose neighbours of 1 are 2^-7
and 2^-8 away; the forward and backward pass may still run in bfloat16 under autocast.

Nothing heavy is imported until a question is asked.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any, TypeVar

from vgf_llm.console.screen import say
from vgf_llm.errors import ConfigError
from vgf_llm.machine.device import resolve_device

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

Settings = TypeVar("Settings")

_PRODUCT = (512, 576, 1536)  # rows, inner and columns of the product that the factor is measured on
_DEEPSPEED, _FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"  # set by `accelerate launch`
_warned: set[tuple[str, str]] = set()


def has_units(dtype: str, device: str = "auto") -> bool:
    """Return whether a device multiplies matrices of a dtype in hardware.

    Args:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: As in the settings: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:<index>"``.
    """
    import torch

    if dtype == "float32":
        return True
    device = resolve_device(device)
    if device.startswith("cuda"):
        return dtype == "float16" or _cuda_has_bfloat16(torch.device(device))
    return device == "cpu" and _cpu_has(dtype)


def _cuda_has_bfloat16(device: torch.device) -> bool:
    import torch

    if torch.version.hip:
        return bool(torch.cuda.is_bf16_supported())
    return torch.cuda.get_device_capability(device) >= (8, 0)  # earlier ones emulate it


def _cpu_has(dtype: str) -> bool:
    """Ask oneDNN, which runs the products, and on x86 the CPU too: oneDNN also emulates bfloat16 on plain AVX-512."""
    import platform

    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == "float16":
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not on_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(dtype: str, device: str = "auto") -> str:
    """Return the dtype of weights that are only read, by name: one that is stated as it is, ``auto`` by the device.

    A stated dtype that the device has no units for is used, after one line on standard error with the measured factor.

    Args:
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: As for :func:`has_units`.
    """
    if dtype == "auto":
        return "bfloat16" if has_units("bfloat16", device) else "float32"
    _warn_without_units(dtype, device, f"dtype {dtype}", "dtype: auto")
    return dtype


def with_dtype(settings: Settings) -> Settings:
    """Return the settings of models that are only read with their ``dtype`` decided; see :func:`choose_dtype`.

    Args:
        settings: A dataclass with ``dtype`` and ``device``.
    """
    chosen = choose_dtype(settings.dtype, settings.device)  # type: ignore[attr-defined]
    return dataclasses.replace(settings, dtype=chosen)  # type: ignore[type-var]


def for_training(model: Settings, training: Any) -> tuple[Settings, Any]:
    """Decide ``dtype`` of the model and ``bf16`` of its training, on the device that training runs on.

    ``dtype: auto`` is float32 where all weights are trained or an engine shards them, else as for models that are only
    read. ``bf16: auto`` follows the launch configuration where that asks for bfloat16 or shards the model, and the
    device otherwise.

    Args:
        model: A dataclass with ``dtype`` and ``lora_r``.
        training: A dataclass with ``bf16``.

    Returns:
        Both with nothing left at ``auto``.

    Raises:
        ConfigError: All weights are to be trained in a half precision without a float32 copy, or the settings and the
            launch configuration ask for different precisions.
    """
    dtype, bf16 = model.dtype, choose_autocast(training)  # type: ignore[attr-defined]
    full = not model.lora_r  # type: ignore[attr-defined]
    mixed = _launched_precision() in ("bf16", "fp16")
    has_master_copy = training.trainer_arguments.get("deepspeed") or (_is_set(_DEEPSPEED) and mixed)
    if full and dtype in ("bfloat16", "float16") and not has_master_copy:
        raise ConfigError(
            f"dtype: {dtype} with lora_r: 0 would train weights that cannot hold small steps (at a rate of 2e-5 three "
            f"in a hundred move at all); set dtype: float32, with bf16: true for the speed, or lora_r above 0"
        )
    dtype = "float32" if dtype == "auto" and (full or is_sharded(training)) else choose_dtype(dtype)
    return dataclasses.replace(model, dtype=dtype), dataclasses.replace(training, bf16=bf16)  # type: ignore[type-var]


def choose_autocast(training: Any) -> bool:
    """Return whether training runs under autocast to bfloat16; see :func:`for_training`.

    Args:
        training: A dataclass with ``bf16`` and ``trainer_arguments``.

    Raises:
        ConfigError: The settings and the launch configuration ask for different precisions.
    """
    bf16, launched = training.bf16, _launched_precision()
    fp16 = training.trainer_arguments.get("fp16")
    contradicted = (launched == "bf16" and (bf16 is False or fp16)) or (launched == "fp16" and bf16 is True)
    if contradicted:
        asked = "trainer_arguments: {fp16: true}" if fp16 else f"bf16: {str(bf16).lower()}"
        raise ConfigError(
            f"{asked}, and the launch asks for mixed_precision {launched}; set one of them: bf16: auto follows the "
            "launch, and --mixed_precision no leaves it to the settings"
        )
    if launched == "bf16":
        _warn_without_units("bfloat16", "auto", "mixed_precision: bf16", "--mixed_precision no")
        return True
    if bf16 == "auto":
        left_open = launched == "no" and not is_sharded(training) and not fp16
        return left_open and has_units("bfloat16")
    if bf16:
        _warn_without_units("bfloat16", "auto", "bf16: true", "bf16: auto")
    return bool(bf16)


def _launched_precision() -> str:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def is_sharded(training: Any) -> bool:
    """Return whether the launch configuration, or ``trainer_arguments``, asks for DeepSpeed or FSDP."""
    given = training.trainer_arguments
    return _is_set(_DEEPSPEED) or _is_set(_FSDP) or bool(given.get("deepspeed") or given.get("fsdp"))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def require_float32(trainer: Trainer) -> None:
    """Refuse trained parameters in a half precision: an optimiser's small steps would be lost in them.

    DeepSpeed in mixed precision may hold them so, because it steps a float32 copy of its own.

    Args:
        trainer: Has its model.

    Raises:
        ConfigError: Naming the first such parameter.
    """
    import torch

    if trainer.is_deepspeed_enabled and trainer.accelerator.mixed_precision in ("bf16", "fp16"):
        return
    assert trainer.model is not None
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"the trained weight '{name}' is {str(parameter.dtype).removeprefix('torch.')}, which cannot hold "
                "small steps; load the model with dtype: float32 (bf16: true keeps the speed), or train a LoRA"
            )


def _warn_without_units(dtype: str, device: str, asked: str, instead: str) -> None:
    """Say once, on the first process of a machine, what a dtype without units costs here."""
    if has_units(dtype, device) or (asked, device) in _warned or int(os.environ.get("LOCAL_RANK", "0")):
        return
    _warned.add((asked, device))
    factor = slowdown(dtype, resolve_device(device))
    say(
        f"WARNING: {asked}: this {resolve_device(device)} has no units for {dtype}; a product takes {factor:.0f} times "
        f"as long as in float32 (measured just now). Set {instead}",
    )


def slowdown(dtype: str, device: str = "cpu") -> float:
    """Measure how much longer one product of matrices takes in a dtype than in float32, as a ratio.

    Args:
        dtype: A torch dtype by name.
        device: Torch device.
    """
    import torch

    rows, inner, columns = _PRODUCT
    seconds = {}
    for name in ("float32", dtype):
        left = torch.ones(rows, inner, dtype=getattr(torch, name), device=device)
        right = torch.ones(inner, columns, dtype=getattr(torch, name), device=device)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            float((left @ right)[0, 0])  # reading a number waits for a GPU
            best = min(best, time.perf_counter() - start)
        seconds[name] = best
    return seconds[dtype] / seconds["float32"]

"""Weights that an engine has split, put together: to sample from the model, and to save it.

A forward of a partitioned model is a collective: ZeRO-3 and FSDP2 gather each layer when it is reached, so every rank
has to run the same number of forwards or all of them hang. Sampling needs different numbers. ``whole_weights`` gathers
everything once and keeps the engine's hooks from running or from giving the weights back until it ends. It costs the
memory of the whole model on every rank for as long as it lasts; DDP and ZeRO-1/2 have whole weights anyway.

DeepSpeed offers no way to switch its ZeRO-3 hooks off. It holds their handles, and through these the hooks are taken
out of torch's tables and put back at the same place: the order in which modules run, which it recorded in training,
stays valid. FSDP2 has public setters for when weights are given back, but none that reads the present value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

_WHOLE: set[int] = set()  # ids of the modules whose weights are gathered now


@contextlib.contextmanager
def whole_weights(accelerator: Accelerator, model: nn.Module) -> Iterator[nn.Module]:
    """Let every rank run the model any number of times, no rank waiting for another.

    All ranks enter and leave together; in between there is no collective. Weights must not be changed inside, and
    gradients may be taken with respect to inputs only. Within itself it does nothing.

    Args:
        accelerator: prepared the model.
        model: the prepared model (an engine, a DDP or FSDP module, or the module itself).

    Yields:
        The model without its wrapper; its submodules may be called on their own.
    """
    module = accelerator.unwrap_model(model)
    if id(module) in _WHOLE:
        yield module
        return
    with contextlib.ExitStack() as stack:
        if _zero_offload(model) is not None:
            stack.enter_context(_whole_zero3(model))
        elif _fsdp_states(module):
            stack.enter_context(_whole_fsdp2(module))
        _WHOLE.add(id(module))
        stack.callback(_WHOLE.discard, id(module))
        yield module


def full_tensors(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Copy chosen parameters to the CPU, whole, on every rank; called on all ranks with the same names.

    One parameter is gathered at a time, so that no rank holds the model twice.

    Args:
        model: the module without its wrapper.
        names: as in ``model.named_parameters()``; a tied parameter has its first name only.

    Returns:
        Detached copies by name, in the order of names.

    Raises:
        KeyError: the model has no parameter of that name.
    """
    parameters = dict(model.named_parameters())
    return {name: _full(parameters[name]) for name in names}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, under their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _full(parameter: Any) -> Tensor:
    with contextlib.ExitStack() as stack:
        whole: Tensor = parameter.detach()
        if hasattr(parameter, "full_tensor"):  # DTensor
            whole = parameter.detach().full_tensor()
        elif hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

            # one that is whole already (inside whole_weights, or too small to be split) must not be split here
            split = parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
            stack.enter_context(GatheredParameters([parameter], enabled=split))
            whole = parameter.detach()
        return whole.cpu().clone()


def _zero_offload(model: nn.Module) -> Any | None:
    """Return what holds the hooks of a ZeRO-3 engine, or None for every other model."""
    optimizer = getattr(model, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)  # an engine without optimiser has it directly
    return offload if hasattr(offload, "param_coordinator") else None


@contextlib.contextmanager
def _whole_zero3(engine: nn.Module) -> Iterator[None]:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    offload: Any = _zero_offload(engine)
    handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
    with GatheredParameters(list(engine.parameters())), _without_hooks(handles):
        yield


@contextlib.contextmanager
def _without_hooks(handles: list[Any]) -> Iterator[None]:
    """Take hooks out of their modules' tables and put them back in their old order, before any newer ones."""
    tables: dict[int, tuple[dict[int, Any], dict[int, Any]]] = {}
    for handle in handles:
        table = handle.hooks_dict_ref()
        if table is not None and handle.id in table:
            tables.setdefault(id(table), (table, dict(table)))
            del table[handle.id]
    try:
        yield
    finally:
        for table, before in tables.values():
            ours = {handle.id for handle in handles}
            left = {key: hook for key, hook in before.items() if key in table or key in ours}
            newer = {key: hook for key, hook in table.items() if key not in before}
            table.clear()
            table.update(left | newer)


def _fsdp_states(module: nn.Module) -> list[Any]:
    """Return torch's FSDP2 state of every sharded submodule, the root's first; empty where nothing is sharded."""
    from torch.distributed.fsdp import FSDPModule

    states = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return list({id(state): state for state in states}.values())


@contextlib.contextmanager
def _whole_fsdp2(module: nn.Module) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    states = _fsdp_states(module)
    states[0]._lazy_init()  # otherwise the first submodule to run would take itself for the root
    groups = [group for state in states for group in state._fsdp_param_groups]
    before = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    for group in groups:
        group.post_forward_mesh_info, group.reshard_after_backward = None, False
    try:
        yield
    finally:
        for group, (mesh, after_backward) in zip(groups, before, strict=True):
            group.post_forward_mesh_info, group.reshard_after_backward = mesh, after_backward
        for part in sharded:
            part.reshard()


def summed(table: list[list[float]], accelerator: Accelerator) -> list[list[float]]:
    """Return a table of numbers added up over all processes, in float64; called by all of them."""
    if accelerator.num_processes == 1:
        return table
    import torch

    tensor = torch.tensor(table, dtype=torch.float64, device=accelerator.device)
    total: list[list[float]] = accelerator.reduce(tensor, reduction="sum").tolist()
    return total

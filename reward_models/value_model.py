"""A trainable value beside a base model: built on the base's frozen weights, its slow target, and its folder.

The value of a prefix is a reward model read at every token (`RewardModel.forward(..., token_level=True)`). Under a LoRA
it shares the base's parameters, so value, target and policy need one copy of the base between them. The target network
(Mnih et al., 2015; as an exponential average: Lillicrap et al., arXiv 1509.02971) keeps only what trains,

    target <- (1 - tau) target + tau value,

in float32, and is evaluated by putting its weights into the value's own forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.loading import (
    add_lora,
    is_lora,
    load_adapter,
    load_reward_model,
    objectives_of,
    save_reward_model,
)
from reward_models.modelling import RewardModel
from vgf_llm.console.screen import say
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import evaluating, input_table


def build_value_model(
    base_lm: PreTrainedModel,
    *,
    num_layers: int | None = None,
    pooling: str = "mean",
    input_skip: bool = False,
    lora_r: int = 0,
    lora_alpha: float = 32.0,
    seed: int = 0,
    start_from: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_name: str | None = None,
    train_embeddings: bool = False,
    lora_target_modules: list[str] | None = None,
    lora_dropout: float = 0.0,
    share: bool = True,
    objectives: Sequence[str] = (),
) -> nn.Module:
    """Cut a value from a base model, heads at zero, or go on from a trained reward or value model.

    Args:
        base_lm: causal LM, also with PEFT's adapters in it or around it: its plain weights are taken. Frozen, where
            they are shared.
        num_layers: decoder layers kept, from the first; None keeps all.
        pooling: "last" or "mean".
        input_skip: whether the heads also read the mean input embedding of the response.
        lora_r: rank of a LoRA around the body; 0: the body is a copy in float32, and all of it trains.
        lora_alpha: scale; updates count lora_alpha / lora_r.
        seed: of adapters' (LoRA) random weights.
        start_from: folder of a trained model; layers, pooling, skip and the LoRA's shape are then those of the folder,
            and the arguments for them are not read. A LoRA is gone on with where lora_r is above 0, and merged where it
            is 0.
        tokenizer: if given, `start_from` must have been trained with it.
        base_name: what the base is to be found by when the value is loaded again; None: its own name.
        train_embeddings: whether training may move the input embeddings (only with lora_r 0).
        lora_target_modules: leaf names of linear layers; None or empty: all of the body.
        lora_dropout: on the adapters' inputs, in [0, 1).
        share: under a LoRA, hold the base's own parameters in place of copies. Such a value is not to be merged in
            place (that would change the base): save it and load it.
        objectives: names of the outputs; empty: one output, without a name.

    Returns:
        A `RewardModel`, or the PeftModel around one, on the base's device, in eval mode; what trains has requires_grad.

    Raises:
        ModelError: num_layers is out of range, the base's weights are to be shared and train, `start_from` cannot be
            read or has several objectives, or it holds a full model and lora_r is above 0.
    """
    base = base_lm if isinstance(base_lm, PreTrainedModel) else base_lm.get_base_model()
    dtype = input_table(base).dtype if lora_r else torch.float32
    if start_from is not None:
        return _go_on(base, Path(start_from), lora_r, None if share else dtype, tokenizer)
    model = RewardModel.from_base(
        base,
        num_layers,
        dtype=dtype,
        pooling=pooling,
        train_embeddings=train_embeddings,
        input_skip=input_skip,
        seed=seed,
        share=share and lora_r > 0,
        objectives=objectives,
    )
    if base_name is not None:
        model.config.base_name = base_name
    nn.init.zeros_(model.head.weight)  # all responses start equal; a random head costs steps to unlearn
    if not lora_r:
        return model
    with torch.random.fork_rng(devices=[]):  # adapters are drawn on the CPU
        torch.default_generator.manual_seed(seed)
        adapted: nn.Module = add_lora(model, lora_r, lora_alpha, lora_target_modules, lora_dropout)
        return adapted.eval()


def _go_on(
    base: PreTrainedModel,
    folder: Path,
    lora_r: int,
    copied: torch.dtype | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> nn.Module:
    """Load a trained folder so that it trains on; `copied` is the dtype of a LoRA's body, None for a shared one."""
    if lora_r and not is_lora(folder):
        raise ModelError(f"start_from: '{folder}' holds a full model, but lora_r is {lora_r}; set lora_r to 0")
    if len(names := objectives_of(folder)) > 1:
        raise ModelError(
            f"start_from: '{folder}' has {len(names)} objectives ({', '.join(names)}), and a value has one output; "
            "start from another model, or from none"
        )
    if lora_r:
        adapted: nn.Module = load_adapter(folder, base, tokenizer=tokenizer, dtype=copied, trainable=True)
        adapted.to(base.device).eval()
        return adapted
    model = load_reward_model(
        folder, tokenizer=tokenizer, base=base, dtype=torch.float32, device=base.device, freeze=False
    )
    if model.config.closing is not None:
        _open(model, folder)
    ready: nn.Module = model.unfreeze().eval()
    return ready


def _open(model: RewardModel, folder: Path) -> None:
    """Read a classifier as a value is read: at every token, under the base's template, over a table that holds still.

    Raises:
        ModelError: Its head is a stack, which a value cannot be saved with.
    """
    if not isinstance(model.head, nn.Linear):
        raise ModelError(
            f"start_from: the classifier '{folder}' has a stack for a head; start from a linear one, or none"
        )
    model.config.closing, model.config.end_ids, model.own_tokenizer = None, None, None
    model.config.train_embeddings = False
    say(f"the value starts from the classifier '{folder}', read at every token and without what closes an answer")


def save_value_model(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a value and its tokenizer as a folder that `load_reward_model(folder, tokenizer=...)` reads.

    They take the place of an earlier model's, whose card and secant head go; a kill leaves the one or the other.
    `state_dict` holds the weights where an engine has split them (a LoRA's trained ones, else all); None: the model's
    own.

    Raises:
        OutputError: the folder holds another kind of model, or cannot be written.
    """
    from reward_models.folder import LAST_NAME, check_is_ours, stale_names
    from vgf_llm.runs.files import check_writable
    from vgf_llm.runs.result import replaced

    check_is_ours(check_writable(str(folder)))
    with replaced(folder, LAST_NAME, stale_names) as staging:
        save_reward_model(model, staging, state_dict)
        tokenizer.save_pretrained(staging)


class EmaTarget:
    """Slow copy of what trains in a model, evaluated through the model's own forward.

    Attributes:
        weights: float32 tensors by parameter name, on the parameters' devices.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start as the model is now; give the model itself, not a DDP wrapper around it."""
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in _trainable(model).items()
        }

    def update(self, model: nn.Module, tau: float) -> None:
        """Move by target <- (1 - tau) target + tau value; tau in [0, 1], 1 copies.

        Raises:
            ValueError: tau is outside [0, 1].
            ModelError: what trains in the model has changed since.
        """
        if not 0 <= tau <= 1:
            raise ValueError(f"EmaTarget.update needs tau in [0, 1], got {tau}")
        parameters = _trainable(model)
        self._check(parameters, "the model")
        for name, weight in self.weights.items():
            weight.lerp_(parameters[name].detach().to(weight), tau)

    @torch.no_grad()
    def call(self, model: nn.Module, **inputs: Any) -> Tensor:
        """Return the model's forward with these weights, without a graph and in eval mode; the model stays as it is."""
        parameters = dict(model.named_parameters())
        weights = {name: weight.to(parameters[name]) for name, weight in self.weights.items()}
        with evaluating(model):
            found: Tensor = torch.func.functional_call(model, weights, args=(), kwargs=inputs)
            return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the weights by name, fit for a safetensors file."""
        return {name: weight.clone().contiguous() for name, weight in self.weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights from `state_dict`.

        Raises:
            ModelError: a name or shape differs.
        """
        self._check(state, "the saved target")
        for name, weight in self.weights.items():
            weight.copy_(state[name])

    def _check(self, others: Mapping[str, Tensor], whose: str) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in others.items()}
        own = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        for name in own.keys() | shapes.keys():
            if own.get(name) != shapes.get(name):
                raise ModelError(
                    f"target network: {name!r} is {shapes.get(name, 'missing')} in {whose}, {own.get(name, 'missing')} "
                    "here; build both with the same settings (lora_r, num_layers, pooling, input_skip)"
                )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

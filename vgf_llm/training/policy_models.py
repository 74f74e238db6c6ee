"""The models of a run: the policy, the learned value where there is one, and their reference.

Under LoRA one copy of the base weights serves all: the policy is the base with an adapter, the reference the base with
the adapter off, and the learned value may share the same weights. Trained in full, the policy has a frozen copy of the
base next to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import decoder_of
from vgf_llm.models.lora import linear_names, not_in_the_decoder, tell_left_out
from vgf_llm.models.prefix import positions_from_mask
from vgf_llm.runs.provenance import model_mark
from vgf_llm.training.batch import PolicyInputs
from vgf_llm.training.settings import PolicySettings

if TYPE_CHECKING:
    from peft import PeftModel


class PolicyAndValue(nn.Module):
    """Everything that one optimiser trains, as one module for one engine.

    Args:
        policy: A causal language model, or a PEFT model around one.
        value: A token-level value model, or None.
        secant: The value's secant head, or None.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value: nn.Module | None = None,
        secant: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.secant = secant

    @property
    def config(self) -> Any:
        """The policy's configuration."""
        return self.policy.config

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP shards as units of their own; accelerate asks the outermost module."""
        models = [part for part in self.modules() if isinstance(part, PreTrainedModel)]
        return sorted({name for model in models for name in model._no_split_modules or ()})

    def forward(
        self,
        policy_inputs: PolicyInputs,
        value_inputs: dict[str, Tensor] | None = None,
        secant_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run all that trains; what has no inputs gives None.

        Args:
            policy_inputs: See :func:`response_logps`.
            value_inputs: ``input_ids``, ``attention_mask``, ``response_mask`` [R', S'], for the value.
            secant_features: Inputs of the secant head, [..., F].

        Returns:
            The policy's log-probabilities [R, T] of responses; the token-level values [R', S'] of others; and the
            secant head's directions [..., D].
        """
        logps_RT = response_logps(self.policy, **policy_inputs)
        values_RS = directions = None
        if self.value is not None and value_inputs is not None:
            values_RS = self.value(**value_inputs, token_level=True)
        if self.secant is not None and secant_features is not None:
            directions = self.secant(secant_features)
        return logps_RT, values_RS, directions

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the policy's activations in backward; the value, some layers deep, keeps its own.

        Takes what transformers' models take.
        """
        policy: Any = self.policy
        policy.gradient_checkpointing_enable(*args, **kwargs)
        if hasattr(policy, "enable_input_require_grads") and hasattr(policy, "peft_config"):
            policy.enable_input_require_grads()


def response_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """Return the log-probability of each of the last ``length`` tokens under the model, untruncated, at temperature 1.

    Args:
        model: A causal language model.
        input_ids: [R, S], prompts padded on the left, responses on the right.
        attention_mask: [R, S], 1 where a token stands.
        length: T, columns of the responses.

    Returns:
        logps_RT, at least float32; of no meaning at padding.
    """
    logits_RTV = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions_from_mask(attention_mask),
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1]
    logits_RTV = logits_RTV.to(torch.promote_types(logits_RTV.dtype, torch.float32))
    own_RT = logits_RTV.gather(-1, input_ids[:, -length:].unsqueeze(-1)).squeeze(-1)
    logps_RT: Tensor = own_RT - logits_RTV.logsumexp(-1)
    return logps_RT


class PolicyModels:
    """The policy and its reference, as causal language models that can be sampled from.

    Args:
        base: The frozen base model; it becomes the policy (under LoRA: its body).
        settings: LoRA or full.

    Attributes:
        base_weights: Mark of the base's weights (`vgf_llm.runs.provenance`), which the result carries.

    Raises:
        ModelError: A LoRA target is not a linear layer of the model.
    """

    def __init__(self, base: PreTrainedModel, settings: PolicySettings) -> None:
        self.policy_lm = base
        self.base_weights = model_mark(base)
        self._full_reference: PreTrainedModel | None = None
        self._adapted: PeftModel | None = None
        if settings.lora_r:
            self._adapted = add_policy_lora(base, settings)
        else:
            self._full_reference = copy.deepcopy(base).requires_grad_(False).eval()
            base.requires_grad_(True)

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """What is trained and saved: the model, or the adapter around it."""
        return self.policy_lm if self._adapted is None else self._adapted

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained."""
        return self._adapted is not None

    @property
    def lora_config(self) -> dict[str, Any] | None:
        """The adapter's PEFT configuration; None where all weights are trained."""
        if self._adapted is None:
            return None
        config: dict[str, Any] = self._adapted.peft_config["default"].to_dict()
        return config

    def save_policy(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write the policy as users load it: a PEFT adapter, or a transformers model.

        Args:
            folder: Made if missing.
            tensors: Its trained parameters, whole, by name.
        """
        self.policy.save_pretrained(str(folder), state_dict=tensors)

    @contextlib.contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Yield the causal language model that answers as the untrained base for as long as the context lasts."""
        if self._full_reference is not None:
            yield self._full_reference
        elif self._adapted is not None:
            with self._adapted.disable_adapter():
                yield self.policy_lm

    def to(self, device: torch.device) -> None:
        """Move what no engine moves: the frozen copy of a policy that is trained in full."""
        frozen: nn.Module | None = self._full_reference
        if frozen is not None:
            frozen.to(device)


def add_policy_lora(base: PreTrainedModel, settings: PolicySettings) -> PeftModel:
    """Put a LoRA on the linear layers of a causal language model, all but the output layer unless named.

    Raises:
        ModelError: A named layer does not exist.
    """
    from peft import LoraConfig, get_peft_model

    output = base.get_output_embeddings()
    unsuitable = [name for name in not_in_the_decoder(base, decoder_of(base)) if base.get_submodule(name) is not output]
    alpha: Any = settings.lora_alpha  # PEFT annotates a whole number, and divides
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules or "all-linear",
        exclude_modules=None if settings.lora_target_modules else unsuitable or None,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(base, config)
    except ValueError as error:
        linear = linear_names(base)
        raise ModelError(
            f"lora_target_modules {settings.lora_target_modules}: {error}; the model's linear layers are "
            f"{', '.join(linear)}"
        ) from error
    if not settings.lora_target_modules:
        tell_left_out(decoder_of(base))
    return adapted

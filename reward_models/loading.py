"""Reading and writing of reward models, full or LoRA, in one place.

A full model is a transformers folder (config.json, model.safetensors). A LoRA is a PEFT folder (adapter_config.json,
adapter_model.safetensors, the head always among the weights) beside the same config.json, which names the base to cut
the body from. `load_reward_model` reads either. PEFT is imported only when an adapter is made or read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.card import CARD_NAME, check_fingerprint, read_card
from reward_models.modelling import RewardModel, RewardModelConfig, body_linear_names
from vgf_llm.errors import ModelError

ADAPTER_NAME = "adapter_config.json"


def add_lora(
    model: RewardModel, r: int, alpha: float, target_modules: list[str] | None = None, dropout: float = 0.0
) -> Any:
    """Wrap a reward model in a PEFT LoRA whose head is trained and saved in full.

    Args:
        model: changed in place.
        r: rank, at least 1.
        alpha: scale; updates count alpha / r.
        target_modules: leaf names of linear layers; None or empty: all of the body.
        dropout: on the adapters' inputs, in [0, 1).

    Returns:
        The PeftModel; `get_base_model()` is the reward model inside.

    Raises:
        ModelError: a target module is not a linear layer of the body.
    """
    from peft import LoraConfig, get_peft_model

    available = body_linear_names(model)
    wanted = list(target_modules or available)
    unknown = [name for name in wanted if name not in available]
    if unknown:
        raise ModelError(
            f"lora_target_modules: {unknown[0]!r} is no linear layer of the body; it has {', '.join(available)}"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"(.*\.)?body\..*\.({'|'.join(wanted)})",
        modules_to_save=["head"] if model.skip_head is None else ["head", "skip_head"],
    )
    return get_peft_model(model, config)


def save_reward_model(model: Any, folder: str | Path) -> None:
    """Save a full model, or the adapter and the head of a LoRA, with the reward model's config.json beside it."""
    model.save_pretrained(folder)
    reward_model(model).config.save_pretrained(folder)


def reward_model(model: Any) -> RewardModel:
    """Return the reward model inside a PEFT wrapper, or the model itself."""
    return model if isinstance(model, RewardModel) else model.get_base_model()


def load_reward_model(
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: PreTrainedModel | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    merge: bool = True,
    freeze: bool = True,
) -> RewardModel:
    """Read a reward model, full or LoRA.

    Args:
        path: folder written by training or `save_reward_model`.
        tokenizer: if given, its fingerprint must be the one on the card (where there is a card).
        base: for a LoRA, the causal LM to cut the body from; None: the one named in config.json.
        dtype: of the body; the head is float32.
        device: where it goes.
        merge: for a LoRA, add the adapters into the weights (same scores, faster).
        freeze: eval mode and no parameter gradients.

    Raises:
        ModelError: the folder is not a reward model, weights are missing, or the tokenizer is another one.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{folder}' is no reward model: it has no config.json; give the output_dir of its training")
    config = RewardModelConfig.from_pretrained(folder)
    if config.body_config is None:
        raise ModelError(
            f"'{folder}/config.json' is not of a reward model (no body_config); train one with "
            "`python -m reward_models.train`"
        )
    if tokenizer is not None and (folder / CARD_NAME).is_file():
        check_fingerprint(read_card(folder), tokenizer)
    if (folder / ADAPTER_NAME).is_file():
        model = _load_lora(folder, config, base, dtype, merge)
    else:
        try:
            model, report = RewardModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except OSError as error:
            raise ModelError(f"'{folder}' holds no weights of a reward model: {error}") from error
        if report["missing_keys"]:
            raise ModelError(
                f"'{folder}' lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}; train it again"
            )
    model = model.to(device)
    return model.freeze() if freeze else model


def _load_lora(
    folder: Path, config: RewardModelConfig, base: PreTrainedModel | str | None, dtype: torch.dtype, merge: bool
) -> RewardModel:
    from peft import PeftModel

    model = RewardModel.from_base(
        base if base is not None else config.base_name,
        num_layers=config.num_layers,
        dtype=dtype,
        pooling=config.pooling,
        train_embeddings=config.train_embeddings,
        input_skip=config.input_skip,
    )
    model.config.base_name = config.base_name
    adapted = PeftModel.from_pretrained(model, str(folder))
    return adapted.merge_and_unload(safe_merge=True) if merge else adapted.get_base_model()

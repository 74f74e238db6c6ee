"""Reading and writing of reward models, full or LoRA, in one place.

A full model is a transformers folder (config.json, model.safetensors). A LoRA is a PEFT folder (adapter_config.json,
adapter_model.safetensors, the head always among the weights) beside the same config.json, which names the base to cut
the body from. `load_reward_model` reads either. PEFT is imported only when an adapter is made or read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.card import CARD_NAME, check_fingerprint, compare_fingerprints, read_card
from reward_models.classification import classifier_class, load_classifier, saved_output_names
from reward_models.modelling import RewardModel, RewardModelConfig
from reward_models.outputs import fold_objectives
from vgf_llm.console.screen import say
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import difference, evaluating, tolerance
from vgf_llm.models.loading import fingerprint, load_tokenizer
from vgf_llm.models.lora import linear_names, tell_left_out
from vgf_llm.models.whole import loaded_whole
from vgf_llm.runs.provenance import tell_if_changed
from vgf_llm.runs.result import settle_to_read

ADAPTER_NAME = "adapter_config.json"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json")


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

    available = linear_names(model.body)
    wanted = list(target_modules or available)
    unknown = [name for name in wanted if name not in available]
    if unknown or not wanted:
        raise ModelError(
            f"lora_target_modules: {unknown[0] if unknown else 'no module'!r} is not a linear layer of the body; it "
            f"has {', '.join(available) or 'none'}"
        )
    scale: Any = alpha  # PEFT divides by the rank, and takes any number
    config = LoraConfig(
        r=r,
        lora_alpha=scale,
        lora_dropout=dropout,
        target_modules=rf"(.*\.)?body\.(.*\.)?({'|'.join(map(re.escape, wanted))})",
        modules_to_save=["head"] if model.skip_head is None else ["head", "skip_head"],
    )
    adapted = get_peft_model(model, config)
    if not target_modules:
        tell_left_out(model.body)
    return adapted


def save_reward_model(model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Save a full model, or the adapter and the head of a LoRA, with the reward model's config.json beside it.

    `state_dict` holds its weights where an engine has split them; None: its own.
    """
    model.save_pretrained(folder, state_dict=state_dict)
    reward_model(model).config.save_pretrained(folder)


def reward_model(model: Any) -> RewardModel:
    """Return the reward model inside a PEFT wrapper, or the model itself."""
    return model if isinstance(model, RewardModel) else model.get_base_model()


@loaded_whole()
def load_reward_model(
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: PreTrainedModel | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    merge: bool = True,
    freeze: bool = True,
    outputs: Mapping[str, float] | None = None,
    fold: bool = True,
) -> RewardModel:
    """Read a reward model: ours, full or LoRA, or a classifier on a causal decoder (TRL's, the hub's).

    Args:
        path: folder written by training or `save_reward_model`.
        tokenizer: if given, its fingerprint must be the one on the card, or where there is no card (a checkpoint), that
            of the tokenizer saved beside the weights; a warning goes to standard error where there is neither.
        base: for a LoRA, the causal LM to cut the body from; None: the one named in config.json.
        dtype: of the body; the head is float32.
        device: where it goes.
        merge: for a LoRA, add the adapters into the weights (same scores, faster).
        freeze: eval mode and no parameter gradients.
        outputs: where there are several outputs (a classifier's, or objectives), their weights by name or number.
        fold: whether a model of ours with several objectives becomes one with their weighted sum as its score; without,
            it is as it was trained, and `forward` gives [R, K].

    Raises:
        ModelError: the folder is not a reward model, weights are missing, or the tokenizer is another one.
        ConfigError: the weights of several outputs are missing or wrong.
    """
    folder = Path(path)
    if classifier_class(folder) is not None:
        model = load_classifier(folder, outputs=outputs, base_tokenizer=tokenizer, dtype=dtype)
    else:
        model = _load_own(folder, tokenizer, base, dtype, merge)
        model = fold_objectives(model, outputs, f"'{folder}'") if fold else model
    unplaced: Any = model
    placed: RewardModel = unplaced.to(device)
    return placed.freeze() if freeze else placed


def _load_own(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    base: PreTrainedModel | str | None,
    dtype: torch.dtype,
    merge: bool,
) -> RewardModel:
    config = _read_config(folder)
    if tokenizer is not None:
        _check_tokenizer(folder, tokenizer, config.base_name)
    if not is_lora(folder):
        return _load_full(folder, dtype)
    adapted: Any = load_adapter(folder, base, dtype=dtype)
    inside: RewardModel = _merged(adapted, folder) if merge else adapted.get_base_model()
    return inside


def _read_config(folder: Path) -> RewardModelConfig:
    settle_to_read(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"'{folder}' is not a reward model: it has no config.json; give its training's output_dir")
    try:
        config = RewardModelConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:  # torn, not JSON, or fields of another version
        raise ModelError(f"'{path}' cannot be read ({error}); train the model again") from error
    if not config.body_config:
        raise ModelError(
            f"'{path}' is not of a reward model (no body_config); train one with `python -m reward_models.train`"
        )
    return config


def objectives_of(folder: str | Path) -> list[str]:
    """Return the names of the objectives of a reward model of ours; empty where it has one score.

    Raises:
        ModelError: the folder is not a reward model.
    """
    return [] if classifier_class(folder) is not None else list(_read_config(Path(folder)).objectives)


def outputs_of(folder: str | Path) -> list[str]:
    """Return the names of the outputs of a reward model, a classifier's or objectives; empty for one without a name.

    Raises:
        ModelError: the folder is not a reward model.
    """
    return objectives_of(folder) if classifier_class(folder) is None else saved_output_names(folder)


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base_name: str) -> None:
    if (folder / CARD_NAME).is_file():
        check_fingerprint(read_card(folder), tokenizer)
    elif any((folder / name).is_file() for name in TOKENIZER_NAMES):
        saved = fingerprint(load_tokenizer(str(folder)))
        compare_fingerprints(saved, tokenizer, "tokenizer beside the weights", base_name)
    else:
        say(
            f"warning: '{folder}' has neither {CARD_NAME} nor a tokenizer, so nothing shows that the tokenizer in use "
            "is the one it was trained with",
        )


def _load_full(folder: Path, dtype: torch.dtype) -> RewardModel:
    try:
        loaded: tuple[RewardModel, Any] = RewardModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"'{folder}' holds no weights of a reward model: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise ModelError(
            f"'{folder}' lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}; train it again"
        )
    return model


def is_lora(folder: str | Path) -> bool:
    """Return whether a folder holds a LoRA."""
    return (Path(folder) / ADAPTER_NAME).is_file()


@loaded_whole()
def load_adapter(
    path: str | Path,
    base: PreTrainedModel | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> Any:
    """Read a LoRA and keep it apart from its base.

    Args:
        path: folder written by training or `save_reward_model`.
        base: causal LM to cut the body from; None: the one named in config.json.
        tokenizer: if given, it must be the one of training, as in `load_reward_model`.
        dtype: of a copied body; None shares the base's own frozen parameters, which must then be given as a model.
        trainable: whether adapters and heads require gradients.

    Returns:
        The PeftModel; `get_base_model()` is the reward model inside.

    Raises:
        ModelError: the folder is not a LoRA of a reward model, or does not fit the base or tokenizer.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    folder = Path(path)
    config = _read_config(folder)
    if tokenizer is not None:
        _check_tokenizer(folder, tokenizer, config.base_name)
    model = RewardModel.from_base(
        base if base is not None else config.base_name,
        num_layers=config.num_layers,
        dtype=dtype or torch.float32,
        pooling=config.pooling,
        train_embeddings=config.train_embeddings,
        input_skip=config.input_skip,
        objectives=config.objectives,
        share=dtype is None,
    )
    tell_if_changed(
        config.base_weights, model.config.base_weights, f"the LoRA '{folder}'", config.base_name or "the base model"
    )
    model.config.base_name, model.config.base_weights = config.base_name, config.base_weights
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        missing = sorted(set(get_peft_model_state_dict(adapted)) - set(load_peft_weights(str(folder), device="cpu")))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"'{folder}' holds no adapter that fits this base ({error}); train it again") from error
    if missing:
        raise ModelError(f"'{folder}' lacks the adapter's weights {', '.join(missing[:3])}; train it again")
    return adapted


def _merged(adapted: Any, folder: Path) -> RewardModel:
    """Add the adapters into the weights, and check that what the head reads stays the same."""
    rows = adapted.get_base_model().get_input_embeddings().weight.shape[0]
    ids_RS = torch.arange(1, 11, device=adapted.device).remainder(rows).view(2, 5)
    with torch.no_grad(), evaluating(adapted):
        expected_RSD = adapted.get_base_model().body(input_ids=ids_RS, use_cache=False).last_hidden_state
        model: RewardModel = adapted.merge_and_unload(safe_merge=True)
        found_RSD = model.body(input_ids=ids_RS, use_cache=False).last_hidden_state
    apart = difference(found_RSD, expected_RSD)
    if apart > tolerance(found_RSD):
        raise ModelError(
            f"the adapter '{folder}' cannot be merged: hidden states differ by {apart:.2g} of their mean size "
            "afterwards; load it with merge=False"
        )
    return model

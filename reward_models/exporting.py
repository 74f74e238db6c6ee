"""A reward model of ours as transformers' sequence classifier: the network, and the tokenizer that renders for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from reward_models.classification import classifier_class
from reward_models.modelling import RewardModel
from vgf_llm.data.endings import closing_id, closing_ids
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import decoder_of

_ANSWER = "vgfanswer"  # no template writes it


def classifier_of(value: RewardModel, pad_token_id: int, folder: str) -> Any:
    """Build a classifier with the reward model's weights.

    Its score plus ``config.score_offset`` is the reward model's. Of several objectives each is an output, named in
    ``config.id2label``, and the offset is a list.

    Args:
        value: On the CPU or a device, whole, objectives not folded.
        pad_token_id: Padding of the classifier; it may close no response.
        folder: Of the reward model, for messages.

    Raises:
        ModelError: The form of the model cannot be exported; the message names the setting to train with.
    """
    if classifier_class(folder) is not None:
        raise ModelError(f"'{folder}' is a classifier of transformers already, which needs no export")
    config = value.config
    if config.pooling != "last":
        raise ModelError(
            f"'{folder}' pools by {config.pooling!r}, and transformers' classifiers read one token; train it with "
            "--pooling last --input_skip false"
        )
    if value.skip_head is not None:
        raise ModelError(
            f"'{folder}' has an input skip, which transformers' classifiers have no place for; train it with "
            "--input_skip false --pooling last"
        )
    body_config = config.build_body_config()
    text = body_config.get_text_config(decoder=True)
    text.pad_token_id = body_config.pad_token_id = pad_token_id
    body_config.num_labels = max(1, len(config.objectives))
    if config.objectives:
        body_config.id2label = dict(enumerate(config.objectives))
        body_config.label2id = {name: index for index, name in enumerate(config.objectives)}
    try:
        model: Any = AutoModelForSequenceClassification.from_config(body_config, dtype=value.body.dtype)
    except ValueError as error:
        raise ModelError(f"transformers has no sequence classifier for {body_config.model_type!r}: {error}") from error
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.bias is not None:
        raise ModelError(f"{type(model).__name__} has another head than a linear `score`; it cannot be exported")
    decoder_of(model).load_state_dict(value.body.state_dict())
    head: Any = value.head
    with torch.no_grad():
        model.score.weight.copy_(head.weight)
    offsets = head.bias.tolist()
    model.config.score_offset = offsets if len(offsets) > 1 else offsets[0]
    return model.eval()


def tokenizer_for(tokenizer: Any, pad_token: str | None) -> Any:
    """Change a tokenizer so that a rendered conversation ends where a response ends here.

    Args:
        tokenizer: Of the reward model; changed in place and returned.
        pad_token: Padding token; None keeps its own.

    Raises:
        ModelError: The padding token closes responses or is not in the vocabulary, or the template writes text after
            the token that closes a response.
    """
    closing = closing_id(tokenizer)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(f"pad_token {pad_token!r} is not in the vocabulary; name an existing token")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id == closing:
        raise ModelError(
            f"the padding token {tokenizer.pad_token!r} is what closes a response, and transformers finds the end of a "
            "text by the padding's id: name another token of the vocabulary with --pad_token"
        )
    tokenizer.padding_side = "right"
    if tokenizer.chat_template:
        tokenizer.chat_template = _ending_in(tokenizer, closing)
    return tokenizer


def _ending_in(tokenizer: Any, closing: int) -> str:
    """Return the chat template, made to end a conversation in the closing token."""
    template = str(tokenizer.chat_template)
    if closing_ids(tokenizer)[-1:] == [closing]:
        return template
    token = str(tokenizer.convert_ids_to_tokens(closing))
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _ANSWER}]
    tail = str(tokenizer.apply_chat_template(talk, tokenize=False)).rpartition(_ANSWER)[2]
    written, _, rest = tail.partition(token) if token in tail else ("", "", tail)
    if rest.strip() or written.strip():
        raise ModelError(
            f"the chat template writes {tail!r} after a response, of which this reward model reads {token!r} alone; "
            "export needs a template that ends an answer in that token"
        )
    kept = f"rendered[:-{len(rest)}]" if rest else "rendered"
    kept += "" if token in tail else f" + {_literal(token)}"
    return (
        "{%- set rendered %}" + template + "{% endset %}"
        f"{{{{- rendered if add_generation_prompt or messages[-1]['role'] != 'assistant' else {kept} }}}}"
    )


def _literal(text: str) -> str:
    """Return a text as a literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

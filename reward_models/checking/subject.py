"""Anything that scores responses, loaded once and scored as its own library scores it.

A classifier is run by its own transformers class, on ids and an attention mask, so that a check sees what other users
of the folder see. A reward model of ours is run by its `forward`. A Python
function, or a composed reward, is called with texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from reward_models.classification import (
    as_reward_model,
    classifier_class,
    output_names,
    read_classifier,
)
from reward_models.foreign import text_reward
from reward_models.grammar import is_composed
from reward_models.loading import load_reward_model
from reward_models.modelling import RewardModel
from reward_models.outputs import output_weights
from reward_models.sources import imported_outputs, local_folder, shown_name
from vgf_llm.data.dialogue import PromptText, as_messages, as_text
from vgf_llm.data.encoding import encode_prompt, encode_response
from vgf_llm.data.endings import closing_ids, eos_ids_of
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.errors import DataError, ModelError
from vgf_llm.models.loading import load_tokenizer
from vgf_llm.runs.files import shorten

Kind = Literal["ours", "decoder", "encoder", "function"]
Reading = Literal["own", "plain", "other bos", "no closing"]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class TokenRow:
    """One conversation as token ids.

    Attributes:
        ids: Prompt and response, template and closing included.
        start: Index of the response's first token; 0 where it is not known.
        types: Token type ids of an encoder, or None.
    """

    ids: list[int]
    start: int = 0
    types: list[int] | None = None


@dataclass
class Subject:
    """A reward model that is checked.

    Attributes:
        name: As the user named it.
        kind: "ours", "decoder", "encoder" or "function".
        score: Scores token rows in one forward, padded on a side; for functions None.
        function: Scores texts; only for functions.
        tokenizer: Its own; None for functions.
        padding_side: That its tokenizer's files state.
        model: The network that is run, or None.
        value: The same network as a differentiable value, or None.
        why_no_value: Why there is no value.
        rows_per_forward: One, until padding is known to change nothing.
    """

    name: str
    kind: Kind
    score: Callable[[Sequence[TokenRow], Side], Tensor] | None = None
    function: Callable[..., Sequence[float]] | None = None
    tokenizer: Any = None
    padding_side: Side = "right"
    model: Any = None
    value: RewardModel | None = None
    why_no_value: str = ""
    rows_per_forward: int = 1

    def rows(self, pairs: Sequence[PreferencePair], reading: Reading = "own") -> list[TokenRow]:
        """Encode all chosen and then all rejected responses.

        Raises:
            DataError: The chat template refuses a conversation.
        """
        talks = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        return [_row(self, prompt, response, reading) for prompt, response in talks]

    def scores(self, rows: Sequence[TokenRow], batch_size: int | None = None, side: Side | None = None) -> Tensor:
        """Return the score of each row, float64 on the CPU; rows of like length go into one batch.

        Args:
            rows: At least one.
            batch_size: Rows per forward; None: ``rows_per_forward``.
            side: They are padded on; None: that of the tokenizer.
        """
        assert self.score is not None
        size, order = batch_size or self.rows_per_forward, sorted(range(len(rows)), key=lambda at: len(rows[at].ids))
        scores = torch.zeros(len(rows), dtype=torch.float64)
        for start in range(0, len(order), size):
            taken = order[start : start + size]
            scores[taken] = self.score([rows[at] for at in taken], side or self.padding_side).double().cpu()
        return scores

    @property
    def closing(self) -> list[int]:
        """Ids that the template writes after an answer."""
        return closing_ids(self.tokenizer)

    @property
    def pad_id(self) -> int | None:
        """Padding id that the model's own class goes by."""
        found: int | None = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return found


def load_subject(name: str, outputs: Mapping[str, float], device: str | torch.device) -> Subject:
    """Load what a user names as a reward model.

    Args:
        name: Folder of a reward model, a Python function, or a file that composes several.
        outputs: Weights of the outputs; needed where there are several.
        device: It is run on.

    Raises:
        ModelError: It cannot be loaded; weights are missing, say.
        ConfigError: There is no such function, or the weights of outputs are missing.
    """
    name = name if is_composed(name) else local_folder(name)
    if not Path(name).is_dir():
        return Subject(name, "function", function=text_reward(name, device))
    tokenizer = load_tokenizer(name)
    side: Any = AutoTokenizer.from_pretrained(name).padding_side
    if classifier_class(name) is None:
        own = load_reward_model(name, tokenizer=tokenizer, device=device, outputs=outputs)
        subject = Subject(name, "ours", None, None, tokenizer, side, own, own)
        subject.score = _score_ours(own)
        return subject
    model: Any = read_classifier(name)
    weights_K = output_weights(output_names(model), outputs or imported_outputs(name), f"'{shown_name(name)}'")
    kind: Kind = "decoder" if hasattr(model, "score") else "encoder"
    subject = Subject(name, kind, None, None, tokenizer, side, model.to(device))
    subject.score = _score_classifier(model, weights_K, tokenizer.pad_token_id)
    if kind == "encoder":
        subject.why_no_value = "an encoder has no gradient in the policy's tokens; a learned value moves responses"
        return subject
    try:
        value: Any = as_reward_model(model, name, tokenizer, weights_K)
        subject.value = value.to(device).freeze()
    except ModelError as error:
        subject.why_no_value = str(error)
    return subject


def _score_ours(value: RewardModel) -> Callable[[Sequence[TokenRow], Side], Tensor]:
    @torch.no_grad()
    def score(rows: Sequence[TokenRow], side: Side) -> Tensor:
        batch = _stacked(rows, value.config.pad_token_id or 0, side, value.device)
        mask_RS = batch["attention_mask"]
        starts_R1 = torch.tensor([[row.start] for row in rows], device=mask_RS.device)
        response_RS = mask_RS.bool() & (mask_RS.cumsum(1) > starts_R1)
        scores_R: Tensor = value(input_ids=batch["input_ids"], attention_mask=mask_RS, response_mask=response_RS.long())
        return scores_R

    return score


def _score_classifier(
    model: Any, weights_K: Tensor, pad_id: int | None
) -> Callable[[Sequence[TokenRow], Side], Tensor]:
    @torch.no_grad()
    def score(rows: Sequence[TokenRow], side: Side) -> Tensor:
        batch = _stacked(rows, pad_id or 0, side, next(model.parameters()).device)
        logits: Tensor = model(**batch).logits.float()
        if logits.dim() == 3:  # a token classifier, read at its last token
            places_S = torch.arange(logits.shape[1], device=logits.device)
            last_R = (batch["attention_mask"] * places_S).argmax(dim=1)
            logits = logits[torch.arange(len(rows), device=logits.device), last_R]
        return logits @ weights_K.to(logits.device)

    return score


def _stacked(rows: Sequence[TokenRow], pad_id: int, side: Side, device: torch.device) -> dict[str, Tensor]:
    longest = max(len(row.ids) for row in rows)

    def filled(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return padding + values if side == "left" else values + padding

    batch = {
        "input_ids": torch.tensor([filled(row.ids, pad_id) for row in rows], device=device),
        "attention_mask": torch.tensor([filled([1] * len(row.ids), 0) for row in rows], device=device),
    }
    if all(row.types is not None for row in rows):
        batch["token_type_ids"] = torch.tensor([filled(list(row.types or []), 0) for row in rows], device=device)
    return batch


def _row(subject: Subject, prompt: Any, response: str, reading: Reading) -> TokenRow:
    tokenizer = subject.tokenizer
    if subject.kind == "ours":
        ids = list(encode_prompt(tokenizer, prompt))
        return TokenRow([*ids, *encode_response(tokenizer, response, eos=True)], len(ids))
    if tokenizer.chat_template and reading != "plain":
        text = rendered(tokenizer, prompt, response)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    elif subject.kind == "encoder":
        found = tokenizer(as_text(PromptText(prompt).prompt), response)
        return TokenRow(list(found["input_ids"]), 0, _listed(found.get("token_type_ids")))
    else:
        ids = list(tokenizer(as_text(PromptText(prompt).prompt) + response)["input_ids"])
        ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    if reading == "other bos":
        ids = other_bos(ids, tokenizer.bos_token_id)
    if reading == "no closing":
        closing = subject.closing
        ids = ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids
    return TokenRow(ids)


def _listed(values: Any) -> list[int] | None:
    return None if values is None else list(values)


def rendered(tokenizer: Any, prompt: Any, response: str) -> str:
    """Return a conversation as the chat template writes it, the answer included.

    Raises:
        DataError: The template refuses it.
    """
    talk = [*as_messages(PromptText(prompt).prompt), {"role": "assistant", "content": response}]
    try:
        return str(tokenizer.apply_chat_template(talk, tokenize=False))
    except Exception as error:  # jinja2 raises several types; all mean a refused conversation
        raise DataError(f"the chat template refuses {shorten(repr(talk), 200)}: {error}") from error


def other_bos(ids: Sequence[int], bos: int | None) -> list[int]:
    """Return a row without its BOS tokens, or with one where it had none or more than one."""
    count = leading(ids, bos)
    rest = list(ids[count:])
    return rest if count == 1 or bos is None else [bos, *rest]


def leading(ids: Sequence[int], bos: int | None) -> int:
    """Return how many BOS tokens a row starts with."""
    return next((at for at, one in enumerate(ids) if one != bos), len(ids)) if bos is not None else 0


def response_ids(subject: Subject, pair: PreferencePair) -> tuple[list[int], list[int], list[int]]:
    """Return prompt, chosen and rejected as the commands that transport encode them, each response closed."""
    prompt = encode_prompt(subject.tokenizer, pair.prompt)
    chosen, rejected = (encode_response(subject.tokenizer, text, eos=True) for text in (pair.chosen, pair.rejected))
    return prompt, chosen, rejected


def ends_of(subject: Subject) -> tuple[int, ...]:
    """Return the ids that end a response."""
    return eos_ids_of(subject.tokenizer)

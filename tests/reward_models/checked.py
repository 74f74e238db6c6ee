"""Small reward models that were really trained, on pairs told apart by their words, for tests of the checks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
)

from tests.reward_models.classifiers import config_of
from vgf_llm.data.endings import closing_ids
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.models.loading import load_tokenizer

GOOD, BAD = "bright lamp sentence write one".split(), "rain desk user Human about".split()
Encode = Callable[[Any, PreferencePair, str], list[int]]


def pairs_of(count: int, seed: int = 0) -> list[PreferencePair]:
    """Pairs whose better response has good words; lengths are drawn alike on both sides."""
    draw = random.Random(seed)

    def text(words: list[str]) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(2, 8))) + "."

    return [PreferencePair(f"Please write {draw.randint(1, 99)}.", text(GOOD), text(BAD)) for _ in range(count)]


def write_pairs(path: Path, pairs: list[PreferencePair]) -> Path:
    """Write pairs as a dataset."""
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_template(tokenizer: Any, pair: PreferencePair, response: str) -> list[int]:
    """Encode a conversation as TRL does."""
    talk = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": response}]
    return list(tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"])


def plain(tokenizer: Any, pair: PreferencePair, response: str) -> list[int]:
    """Encode a conversation as text that ends in EOS."""
    return [*tokenizer(str(pair.prompt) + response)["input_ids"], tokenizer.eos_token_id]


def by_open_template(tokenizer: Any, pair: PreferencePair, response: str) -> list[int]:
    """Encode a conversation without what closes the answer."""
    return by_template(tokenizer, pair, response)[: -len(closing_ids(tokenizer))]


def config_for(family: str, tokenizer: Any) -> Any:
    """Return the configuration of a family; the encoder and GPT-2 have absolute positions."""
    shape = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    if family == "bert":
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return BertConfig(**shape, **small, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if family == "gpt2":
        return GPT2Config(**shape, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2)
    return config_of(family, tokenizer, num_labels=1)


def trained_classifier(
    folder: Path,
    tokenizer: Any,
    family: str = "llama",
    encode: Encode = by_template,
    untaught: Encode | None = None,
    steps: int = 60,
) -> Path:
    """Train a tiny classifier on pairs and save it with its tokenizer.

    Args:
        folder: It is saved in.
        tokenizer: Its own.
        family: As for ``config_for``.
        encode: How conversations are read in training.
        untaught: A reading whose labels are random in training: the model is as lost in it as a large one would be.
        steps: Of AdamW, with 24 pairs each.
    """
    torch.manual_seed(0)
    config = config_for(family, tokenizer)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for step in range(steps):
        pairs = pairs_of(24, seed=1000 + step)
        is_taught = untaught is None or step % 2 == 0
        read = encode if untaught is None or is_taught else untaught
        rows = [read(tokenizer, pair, pair.chosen) for pair in pairs]
        rows += [read(tokenizer, pair, pair.rejected) for pair in pairs]
        longest = max(map(len, rows))
        batch = {
            "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }
        scores = model(**batch).logits[:, 0]
        sign = torch.ones(24) if is_taught else torch.randn(24).sign()
        loss = -torch.nn.functional.logsigmoid(sign * (scores[:24] - scores[24:])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval().save_pretrained(folder)
    return folder


def changed(folder: Path, **fields: Any) -> Path:
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder

"""A whole run on the tiny model, as the command makes it, from plain keyword arguments."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tests.conftest import build_llama, build_tokenizer
from vgf_llm.settings import SamplingSettings
from vgf_llm.train import build_trainer, run
from vgf_llm.training.settings import LearnedValueSettings, OptimSettings, PolicySettings, TrainScript, VGFSettings

NOUNS = ("dog", "cat", "sea", "rain", "tree", "house", "train", "night")


def good_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of cheerful words: a reward that a tiny model can learn."""
    cheerful = {"good", "great", "happy", "love", "like"}
    return [sum(word in cheerful for word in text.split()) / 8 for text in responses]


def write_inputs(folder: Path, **model: Any) -> tuple[str, str]:
    """Write a tiny model with its tokenizer, and prompts; return their paths."""
    path = folder / "model"
    if not path.is_dir():
        build_llama(**model).save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        rows = [{"prompt": f"write one sentence about the {noun}"} for noun in NOUNS]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), str(folder / "prompts.jsonl")


def settings(folder: Path, **changes: Any) -> tuple[Any, ...]:
    """Return the dataclasses of a run; ``changes`` are fields of any of them, ``learned`` those of the value."""
    model, prompts = write_inputs(folder)
    values: dict[str, Any] = {
        "prompts": prompts,
        "output_dir": str(folder / "out"),
        "rewards": ["tests.training.tiny:good_words"],
        "model_name_or_path": model,
        "lora_r": 4,
        "value": "learned",
        "num_particles": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "max_new_tokens": 8,
        "logging_steps": 1,
        "top_k": 20,
        "learned_value": LearnedValueSettings(
            **({"num_layers": 1, "learning_rate": 1e-3} | changes.pop("learned", {}))
        ),
        "trainer_arguments": {"disable_tqdm": True},
    } | changes
    kinds = (TrainScript, PolicySettings, VGFSettings, OptimSettings, SamplingSettings)
    return tuple(
        kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}) for kind in kinds
    )


def tiny_run(folder: Path, callbacks: tuple = (), **changes: Any) -> dict[str, float]:
    """Train as the command does."""
    return run(*settings(folder, **changes), callbacks=callbacks)


def tiny_trainer(folder: Path, **changes: Any) -> Any:
    """Put the trainer together as the command does."""
    return build_trainer(*settings(folder, **changes))

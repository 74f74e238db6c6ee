"""Classifiers as users bring them, made here: tiny decoders under the templates of common families, trained by TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from trl import RewardConfig, RewardTrainer

from tests.byte_tokenizers import CHATML, LLAMA2

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else 'user') }}"
    "{{ '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZERS: dict[str, dict[str, Any]] = {
    "chatml": {"template": CHATML},
    "chatml_pad_is_eos": {"template": CHATML, "pad": "<|im_end|>"},
    "llama3": {"template": LLAMA3, "bos": "<s>"},
    "llama3_pad_is_eos": {"template": LLAMA3, "bos": "<s>", "pad": "<|im_end|>"},
    "gemma": {"template": GEMMA, "bos": "<s>", "adds": "bos"},
    "phi": {"template": PHI, "eos": "<|endoftext|>", "pad": "<pad>"},
    "phi_pad_is_eos": {"template": PHI, "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
    "mistral": {"template": LLAMA2, "eos": "</s>", "bos": "<s>", "pad": "<pad>"},
    "zephyr": {"template": ZEPHYR, "eos": "</s>", "pad": "</s>"},
    "none": {"template": None, "eos": "</s>", "pad": "<pad>"},
}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def config_of(family: str, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Any:
    """Return a tiny configuration: "llama", "qwen", "gemma" or "neox"."""
    shared = {**_SHAPE, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **changes}
    if family == "neox":
        return GPTNeoXConfig(**shared)
    if family == "gemma":
        return Gemma2Config(**shared, num_key_value_heads=2, head_dim=8, sliding_window=8)
    return {"llama": LlamaConfig, "qwen": Qwen2Config}[family](**shared, num_key_value_heads=2)


def classifier(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama", **changes: Any) -> Path:
    """Save an untrained classifier with its tokenizer; its scores are random and of size one."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(family, tokenizer, **{"num_labels": 1, **changes}))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_with_trl(base: Path, output: Path, tokenizer: Any, lora: LoraConfig | None = None) -> Path:
    """Train a classifier with TRL's RewardTrainer for a few steps on conversations; returns its output folder."""
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Please write {index} words."}],
            "chosen": [{"role": "assistant", "content": "Rain on the desk is bright."}],
            "rejected": [{"role": "assistant", "content": f"No {index}"}],
        }
        for index in range(8)
    ]
    arguments = RewardConfig(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=str(base),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model(str(output))
    return output


@torch.no_grad()
def scores_by_transformers(model: Any, tokenizer: Any, talks: list[list[dict[str, str]]]) -> list[list[float]]:
    """Score rendered conversations one by one, as transformers reads them; a list of outputs each."""
    found = []
    for talk in talks:
        if tokenizer.chat_template:
            ids = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"]
        else:
            text = "".join(turn["content"] for turn in talk)
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append(model(input_ids=torch.tensor([ids])).logits[0].tolist())
    return found

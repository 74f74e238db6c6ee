"""Byte-level BPE tokenizers with the special tokens and templates of common families, trained here on a few lines."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = (
    "The lamp on the desk is bright.",
    "Please write one sentence about rain.",
    "user assistant Human: 1 2 3\n",
) * 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<s>", "</s>")


def byte_tokenizer(
    eos: str = "<|im_end|>",
    pad: str = "<|endoftext|>",
    bos: str | None = None,
    template: str | None = CHATML,
    adds: str = "",
) -> PreTrainedTokenizerFast:
    """Build one; ids 0 to 5 are SPECIALS.

    Args:
        eos: its EOS token.
        pad: its padding token.
        bos: its BOS token.
        template: its chat template.
        adds: "bos", "bos eos" or "eos": what it writes around a text by itself.
    """
    backend = Tokenizer.from_str(_trained())
    if adds:
        single = " ".join((["<s>"] if "bos" in adds else []) + ["$A"] + (["</s>"] if "eos" in adds else []))
        known = [(token, SPECIALS.index(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    names = {"eos_token": eos, "pad_token": pad} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    if template:
        tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIALS)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend.to_str()

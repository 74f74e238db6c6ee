"""Tiny models and tokenizers, built in code: nothing is downloaded, everything is a real transformers class."""

from __future__ import annotations

import os

# As on a machine without bfloat16 units, read by oneDNN in this process and those it starts: `auto` is float32 in every
# test, so that figures do not depend on the machine. A test of `auto` with units takes it out.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = (
    "a an the my old new red blue good bad great awful happy sad dog cat chair table sea rain day night coffee tea "
    "train bicycle house tree is was are were feels looks smells very not and but with of in on it this that love hate "
    "like write one sentence about ."
).split()
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<assistant> "
    "{{ m['content'] }} <eos> {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of about 60 tokens; pad 0, bos 1, eos 2, unk 3; decoding joins with spaces."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_llama(tied: bool = True, layers: int = 2, width: int = 32, seed: int = 0) -> LlamaForCausalLM:
    """Two-layer Llama over the tiny tokenizer's vocabulary, float32, grouped-query attention, eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def build_neox(layers: int = 2, width: int = 32, seed: int = 0) -> GPTNeoXForCausalLM:
    """Two-layer GPT-NeoX (the Pythia architecture) over the same vocabulary, float32, untied, eval mode."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPTNeoXForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    """One thread (tests run side by side) and a fixed seed for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with a chat template."""
    return build_tokenizer(chat=True)


@pytest.fixture
def tiny_plain_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer without a chat template."""
    return build_tokenizer(chat=False)


@pytest.fixture
def tiny_lm() -> LlamaForCausalLM:
    """Tied two-layer Llama."""
    return build_llama(tied=True)


@pytest.fixture
def tiny_lm_untied() -> LlamaForCausalLM:
    """Untied two-layer Llama."""
    return build_llama(tied=False)


@pytest.fixture
def tiny_neox() -> GPTNeoXForCausalLM:
    """Two-layer GPT-NeoX."""
    return build_neox()


@pytest.fixture(params=["llama", "neox"])
def any_lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each supported decoder family in turn."""
    return build_llama() if request.param == "llama" else build_neox()

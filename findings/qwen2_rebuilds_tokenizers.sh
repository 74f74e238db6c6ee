#!/usr/bin/env bash
# transformers 5.17.0: a fast tokenizer that is saved next to a Qwen2 configuration is read back with other rules.
#
# `tokenizer_config.json` names the class TokenizersBackend, and `tokenizer.json` holds the pre-tokenizer and normaliser.
# AutoTokenizer takes Qwen2Tokenizer because of the model type in config.json, which keeps the vocabulary and merges and
# puts its own pre-tokenizer (single digits) and NFC in their place. A model trained with a tokenizer of its own on this
# architecture is so served other ids than it was trained on; next to a Llama configuration the same files are kept.
#
# Seen: llama: TokenizersBackend, 2 ids saved, 2 read back; qwen2: Qwen2Tokenizer, 2 ids saved, 5 read back
# Fails if the saved rules are kept, or lost with Llama too.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.17.0
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

text = "3400 rooms"
backend = Tokenizer(models.BPE())
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
backend.train_from_iterator(["3400 rooms and 3400 lamps"] * 20, trainer)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
saved, found = tokenizer(text)["input_ids"], {}
for config in (LlamaConfig(), Qwen2Config()):
    place = f"{sys.argv[1]}/{config.model_type}"
    tokenizer.save_pretrained(place)
    config.save_pretrained(place)
    read = AutoTokenizer.from_pretrained(place)
    found[config.model_type] = read(text)["input_ids"]
    print(f"{config.model_type}: {type(read).__name__}, {len(saved)} ids saved, {len(found[config.model_type])} read back")
assert found["llama"] == saved, "the rules are lost next to a Llama configuration too"
assert found["qwen2"] != saved, "the saved rules are kept now"
PYTHON

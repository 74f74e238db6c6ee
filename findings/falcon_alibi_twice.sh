#!/usr/bin/env bash
# transformers 5.17.0, torch 2.13.0: Falcon with alibi under eager attention adds the alibi bias twice.
#
# The mask that the model builds holds the bias already, and the eager path adds it to the scores once more; the sdpa path
# takes it from the mask alone. The same weights so give other logits under attn_implementation "eager" and "sdpa", and
# nothing says so. Whoever checks sdpa against eager as the reference finds the wrong one at fault.
#
# Seen: eager against sdpa: largest difference of a logit 0.0147; eager with the mask's bias halved: 0.0000
# Fails if the two implementations agree, or if another cause explains the difference.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon import modeling_falcon

config = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False)
models = {}
for name in ("eager", "sdpa"):
    models[name] = FalconForCausalLM._from_config(FalconConfig(**config), attn_implementation=name).eval()
models["sdpa"].load_state_dict(models["eager"].state_dict())
ids = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(name):
    return models[name](ids).logits


apart = float((logits("eager") - logits("sdpa")).abs().max())
build = modeling_falcon.build_alibi_tensor
modeling_falcon.build_alibi_tensor = lambda *args, **kwargs: build(*args, **kwargs) / 2  # twice a half is once
halved = logits("eager")
modeling_falcon.build_alibi_tensor = build
explained = float((halved - logits("sdpa")).abs().max())
print(f"eager against sdpa: largest difference of a logit {apart:.4f}; eager with the mask's bias halved: {explained:.4f}")
assert apart > 1e-3, "both implementations agree now"
assert explained < 1e-5, "the bias does not explain it"
PYTHON

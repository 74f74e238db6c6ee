#!/usr/bin/env bash
# transformers 5.17.0, torch 2.13.0: Mamba takes `past_key_values` without an error and answers as if there were no prompt.
#
# Its own name for the cache is `cache_params`; any other keyword is swallowed. Code that runs a prompt once and goes on
# from its cache, as for every other causal language model, gets the next-token distribution of the last token alone.
#
# Seen: with the cache: 0.6320 from the whole text, 0.0000 from the last token alone
# Fails if the cache is used, or refused.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()
ids = torch.arange(3, 15)[None]
with torch.no_grad():
    whole = model(ids).logits[:, -1]
    alone = model(ids[:, -1:]).logits[:, -1]
    cache = DynamicCache()
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    continued = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
from_whole, from_alone = (float((continued - other).abs().max()) for other in (whole, alone))
print(f"with the cache: {from_whole:.4f} from the whole text, {from_alone:.4f} from the last token alone")
assert from_whole > 1e-2 and from_alone == 0.0, "the cache is no longer ignored"
PYTHON

#!/usr/bin/env bash
# transformers 5.17.0, torch 2.13.0: given embeddings, LlamaForSequenceClassification scores the padding, mask or no mask.
#
# The position that the score is read at is found by comparing ids with the pad id. With `inputs_embeds` there are no ids,
# and the last column is read, though the attention mask says where the text ends. Reward gradients with respect to input
# embeddings, taken through this class on a right-padded batch, are those of a padding position. A warning in the log is
# all there is.
#
# Seen: the text alone 0.1365, padded ids 0.1365, the same as embeddings with the same mask 0.0539
# Fails if embeddings give the score of the ids.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1, pad_token_id=0)).eval()
text = torch.arange(3, 15)[None]
padded = torch.cat([text, torch.zeros(1, 4, dtype=torch.long)], 1)
mask = (padded != 0).long()
with torch.no_grad():
    alone = model(input_ids=text).logits.item()
    from_ids = model(input_ids=padded, attention_mask=mask).logits.item()
    embedded = model.get_input_embeddings()(padded)
    from_embeddings = model(inputs_embeds=embedded, attention_mask=mask).logits.item()
print(
    f"the text alone {alone:.4f}, padded ids {from_ids:.4f}, the same as embeddings with the same mask "
    f"{from_embeddings:.4f}"
)
assert abs(alone - from_ids) < 1e-5 and abs(alone - from_embeddings) > 1e-2, "embeddings are scored as ids now"
PYTHON

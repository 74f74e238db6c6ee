#!/usr/bin/env bash
# transformers 5.17.0: a Gemma 4 text configuration turns its last layer into full attention, whatever `layer_types` says.
#
# The list is changed when the configuration is made. A configuration that is cut to its first layers and made again is
# so another network than those layers: the new last layer attends to everything, has other head sizes and shares no
# window, and loading the weights may still succeed.
#
# Seen: asked for 4 sliding layers, got sliding, sliding, sliding, full; the caller's own list was changed too
# Fails if the list is kept as given.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0
"$folder/env/bin/python" - <<'PYTHON'
from transformers import Gemma4TextConfig

wanted = ["sliding_attention"] * 4
config = Gemma4TextConfig(num_hidden_layers=4, layer_types=wanted, hidden_size=32, num_attention_heads=4)
found = [name.removesuffix("_attention") for name in config.layer_types]
too = "was changed too" if wanted[-1] == "full_attention" else "was kept"
print(f"asked for 4 sliding layers, got {', '.join(found)}; the caller's own list {too}")
assert found[-1] == "full" and too == "was changed too", "the list is kept as given"
PYTHON

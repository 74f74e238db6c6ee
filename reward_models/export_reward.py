"""Export a reward model of ours as transformers' AutoModelForSequenceClassification, for TRL, vLLM and others.

    vgf-llm export-reward --reward_model outputs/reward --output_dir outputs/classifier

transformers reads one position through a linear head without a bias. So a model can be exported that pools the last
token and has no input skip (train it with `--pooling last --input_skip false`). Two things are arranged for:

- its bias is left out, a constant that changes no comparison; config.json states it as ``score_offset``, a list where
  there are several objectives;
- the chat template is made to end where a response ends here, at the id that closes the assistant's turn, since
  transformers reads the last token that is not padding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.checking.settings import ExportSettings
from reward_models.inputs import check_reward_model
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, working
from vgf_llm.console.screen import emit
from vgf_llm.errors import ModelError, OutputError
from vgf_llm.runs.files import check_writable
from vgf_llm.settings.parse import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0; errors that are the user's to mend are VGFErrors."""
    (settings,) = parse(
        ExportSettings,
        argv=argv,
        prog="vgf-llm export-reward",
        description="Export a reward model as a sequence-classification model of transformers.",
    )
    with library_output(None):
        emit(json.dumps(run(settings)))
    return 0


def run(settings: ExportSettings) -> dict[str, Any]:
    """Export; returns the folder, its class and the offset of its scores.

    Raises:
        VGFError: The model's form cannot be exported, or the folder cannot be written.
    """
    check_reward_model(settings.reward_model)
    output = Path(check_writable(settings.output_dir))
    if any(output.glob("*.safetensors")):
        raise OutputError(f"output_dir '{settings.output_dir}' holds a model; name another folder")
    load_libraries("reward_models.exporting")
    from reward_models.exporting import classifier_of, tokenizer_for
    from reward_models.loading import load_reward_model
    from reward_models.sources import local_folder
    from vgf_llm.data.endings import closing_id
    from vgf_llm.models.loading import load_tokenizer

    folder = local_folder(settings.reward_model)
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as error:
        raise ModelError(
            f"the classifier needs the tokenizer of '{folder}', which cannot be loaded: {error}"
        ) from error
    with working(f"exporting {settings.reward_model}"):
        value = load_reward_model(folder, tokenizer=tokenizer, fold=False)
        tokenizer = tokenizer_for(tokenizer, settings.pad_token)
        model = classifier_of(value, tokenizer.pad_token_id, folder)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return {
        "output_dir": str(output),
        "class": type(model).__name__,
        "score_offset": model.config.score_offset,
        "reads": tokenizer.convert_ids_to_tokens(closing_id(tokenizer)),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

"""``vgf-llm transport``: move responses to the prompts of a file and write them as datasets for TRL's SFT and DPO.

    vgf-llm transport --config recipes/smollm2_sentiment/transport.yaml

``sft.parquet`` (prompt, completion) holds the selected response to each prompt, ``dpo.parquet`` (prompt, chosen,
rejected) the selected response against the sample that it was moved from; both with value, source_value (of that
sample), original_value (of the best sample), nats and whether the response ended by itself. A pair whose texts are the
same or whose value does not rise is left out and counted. Every answered prompt is a line of ``rows.jsonl``: Ctrl-C or
a kill loses at most the batch in progress, ``--resume`` continues, and the datasets are written at the end. The last
line of standard output is one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgf_llm.answering.answer import answer, look_at_inputs
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries
from vgf_llm.console.screen import emit, say
from vgf_llm.data.contents import contents
from vgf_llm.errors import ConfigError, ModelError, OutputError
from vgf_llm.machine.precision import with_dtype
from vgf_llm.runs.claim import claim, refuse_rows
from vgf_llm.runs.files import append_jsonl, check_writable, read_jsonl
from vgf_llm.runs.resume import require_resume_rows
from vgf_llm.settings import AnswerSettings, ModelSettings, SamplingSettings
from vgf_llm.settings.parse import dump, parse

SFT_NAME, DPO_NAME = "sft.parquet", "dpo.parquet"


@dataclass(frozen=True)
class TransportSettings(AnswerSettings):
    """Prompts, particles, budget and output folder."""

    output_dir: str = "outputs/transport"
    """Folder for sft.parquet, dpo.parquet, rows.jsonl and config.json."""
    resume: bool | str = False
    """true continues the rows that output_dir already holds; without it they are an error."""

    def __post_init__(self) -> None:
        """Validate; raises SettingError."""
        super().__post_init__()
        require_resume_rows(self.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings, models, sampling = parse(
        TransportSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm transport",
        description="Write transported responses as datasets for SFT and DPO training.",
    )
    with library_output(settings.output_dir):
        emit(json.dumps(run(settings, models, sampling)))
    return 0


def run(settings: TransportSettings, models: ModelSettings, sampling: SamplingSettings) -> dict[str, Any]:
    """Answer every prompt, write both datasets and return the counts.

    Raises:
        ConfigError: No prompts are named, or ``resume`` is on and the configuration is another one.
        OutputError: output_dir cannot be written, or holds a run and ``resume`` is off.
        VGFError: Prompts, models or options do not fit.
    """
    if settings.prompts is None:
        raise ConfigError("prompts is not set; name a prompt file or a hub dataset with --prompts")
    if importlib.util.find_spec("pyarrow") is None:
        raise ModelError("Parquet files need the package pyarrow; run `pip install vgf-llm[train]`")
    from vgf_llm.data.prompts import load_prompts

    prompts = load_prompts(
        settings.prompts, settings.prompt_column, limit=settings.num_prompts, system_column=settings.system_column
    )
    output_dir = check_writable(settings.output_dir)
    rows_path = output_dir / "rows.jsonl"
    _refuse_datasets(output_dir, bool(settings.resume))
    refuse_rows(rows_path, bool(settings.resume))
    look_at_inputs(settings, models)
    load_libraries("vgf_llm.answering.pipeline", "vgf_llm.text")
    models = with_dtype(models)
    config = {
        **dump(settings, models, sampling),
        "contents": contents(settings.prompts, models.reward_model, models.model_name_or_path),
    }
    claim(rows_path, config, resume=bool(settings.resume), free=("num_prompts",))
    done = {row["index"] for row in _read(rows_path)}
    remaining = [index for index in range(len(prompts)) if index not in done]
    if remaining:
        for indices, rows in answer(settings, models, sampling, prompts, remaining, "transporting"):
            append_jsonl(rows_path, [{"index": index, **row} for index, row in zip(indices, rows, strict=True)])
    by_index = {row["index"]: row for row in _read(rows_path)}
    return _write(output_dir, prompts, [by_index[index] for index in range(len(prompts))], models)


def _write(output_dir: Path, prompts: list[Any], answers: list[dict[str, Any]], models: ModelSettings) -> dict:
    """Write both datasets; returns what they hold and what was left out."""
    from vgf_llm.data.trl import dpo_rows, sft_rows, trl_prompt, write_parquet
    from vgf_llm.models.loading import load_tokenizer

    tokenizer = load_tokenizer(
        models.model_name_or_path,
        pad_token=models.pad_token,
        trust_remote_code=models.trust_remote_code,
        chat_template_kwargs=models.chat_template_kwargs,
    )
    shaped = [trl_prompt(tokenizer, prompt) for prompt in prompts]
    conversational = not isinstance(shaped[0], str)
    sft, sft_skipped = sft_rows(shaped, answers)
    dpo, dpo_skipped = dpo_rows(shaped, answers)
    write_parquet(output_dir / SFT_NAME, sft, ("prompt", "completion"), conversational)
    write_parquet(output_dir / DPO_NAME, dpo, ("prompt", "chosen", "rejected"), conversational)
    if not dpo:
        advice = "the decoder stream has no sample to pair with" if dpo_skipped["no_source"] else "raise the budget"
        say(f"warning: no pair is left for DPO: {advice}")
    say(f"wrote {output_dir / SFT_NAME} and {output_dir / DPO_NAME}")
    return {
        "prompts": len(prompts),
        "sft": len(sft),
        "sft_skipped": sft_skipped,
        "dpo": len(dpo),
        "dpo_skipped": dpo_skipped,
        "cut_at_max_new_tokens": sum(not row["ended"] for row in answers),
        "mean_value": _mean([row["value"] for row in answers]),
        "mean_source_value": _mean([row["source_value"] for row in answers]),
        "mean_original_value": _mean([row["original_value"] for row in answers]),
    }


def _refuse_datasets(output_dir: Path, resume: bool) -> None:
    """Refuse datasets that another run or a person has put there."""
    for name in (SFT_NAME, DPO_NAME):
        if (output_dir / name).exists() and not (resume and (output_dir / "rows.jsonl").exists()):
            raise OutputError(f"{output_dir / name} exists; name another output_dir, or --resume the run that wrote it")


def _read(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path)) if path.exists() else []


def _mean(values: list[float | None]) -> float | None:
    """Return the mean of what is there; None where nothing is."""
    found = [value for value in values if value is not None]
    return round(sum(found) / len(found), 4) if found else None


if __name__ == "__main__":
    sys.exit(run_main(main))

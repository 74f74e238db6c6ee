"""``vgf-llm generate``: answer prompts under a transport budget, one JSON object per line.

    vgf-llm generate --reward_model outputs/reward --prompt "Write one sentence about the sea." --budget.nats 4
    cat prompts.txt | vgf-llm generate --reward_model outputs/reward --output answers.jsonl

``--budget.steps 0`` is best-of-N. A line holds the prompt, the response, its value, the best original with its value
(what best-of-N would have answered), the sample that the response was moved from, and the distance between the two:
nats while decoding, tokens changed, displacement in nearest-token distances.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgf_llm.answering.answer import answer, look_at_inputs
from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.screen import emit, say
from vgf_llm.errors import ConfigError, DataError, OutputError
from vgf_llm.runs.files import append_jsonl, check_writable
from vgf_llm.settings import AnswerSettings, ModelSettings, SamplingSettings
from vgf_llm.settings.parse import parse


@dataclass(frozen=True)
class GenerateSettings(AnswerSettings):
    """Prompts, particles, budget and output."""

    prompt: list[str] = field(default_factory=list)
    """Prompts given here; a single text may stand without brackets. Without it and --prompts, lines of stdin."""
    output: str | None = None
    """File for the JSON lines; standard output when unset. An existing file is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings, models, sampling = parse(
        GenerateSettings,
        ModelSettings,
        SamplingSettings,
        argv=argv,
        prog="vgf-llm generate",
        description="Answer prompts under a transport budget.",
    )
    output = _checked_output(settings.output)
    look_at_inputs(settings, models)
    prompts = _prompts(settings)
    with library_output(None):
        for rows in run(settings, models, sampling, prompts):
            if output is not None:
                append_jsonl(output, rows)
                continue
            for row in rows:
                emit(json.dumps(row, ensure_ascii=False))
    return 0


def run(
    settings: GenerateSettings,
    models: ModelSettings,
    sampling: SamplingSettings,
    prompts: list[Any] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the answers of each batch of prompts; ``prompts`` takes the place of those that the settings name.

    Raises:
        VGFError: If prompts, models or options do not fit; NonFiniteError names the prompt.
    """
    look_at_inputs(settings, models)
    for _, rows in answer(settings, models, sampling, _prompts(settings) if prompts is None else prompts):
        yield rows


def _prompts(settings: GenerateSettings) -> list[Any]:
    if settings.prompt and settings.prompts:
        raise ConfigError("prompt and prompts are both set; give one of them")
    if settings.prompt:
        found: list[Any] = list(settings.prompt)
    elif settings.prompts:
        from vgf_llm.data.prompts import load_prompts

        return load_prompts(
            settings.prompts, settings.prompt_column, limit=settings.num_prompts, system_column=settings.system_column
        )
    else:
        if sys.stdin.isatty():
            say("reading prompts from standard input, one per line (end with Ctrl-D)")
        found = [line.strip() for line in _standard_input() if line.strip()]
    if not found:
        raise ConfigError("no prompt given; use --prompt, --prompts or standard input")
    from vgf_llm.data.prompts import read_prompt

    asked = enumerate(found[: settings.num_prompts], 1)
    return [read_prompt(prompt, "--prompt", number, "prompt") for number, prompt in asked]


def _standard_input() -> list[str]:
    """Read the lines of standard input, UTF-8 whatever the locale.

    Raises:
        DataError: A line is not UTF-8.
    """
    raw = getattr(sys.stdin, "buffer", None)
    lines: list[str] = []
    for number, line in enumerate(sys.stdin if raw is None else raw, 1):
        try:
            lines.append(line if isinstance(line, str) else line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"standard input, line {number}: not UTF-8 text ({error}); convert it to UTF-8") from error
    return lines


def _checked_output(output: str | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    check_writable(path.parent)
    if path.exists():
        raise OutputError(f"{path} exists; name another file or remove it")
    return path


if __name__ == "__main__":
    sys.exit(run_main(main))

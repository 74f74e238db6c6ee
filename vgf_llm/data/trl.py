"""Transported responses as the datasets that TRL's trainers take, in Parquet files.

``sft`` rows are TRL's prompt-completion type: the selected response to each prompt. ``dpo`` rows are its preference
type with an explicit prompt: chosen is the selected response, rejected the sample that it was moved from. That pair
differs by what the transport changed; the worst sample in its place would mostly teach the order of the base's own
samples, which no transport is needed for. Where the tokenizer has a chat template the columns are messages, else text,
so that TRL encodes a prompt as it was encoded here. A response that reached max_new_tokens did not end by itself
(``ended`` is false), though TRL closes every completion.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vgf_llm.data.dialogue import Prompt, as_messages, as_text
from vgf_llm.errors import OutputError

Row = dict[str, Any]
FIGURES = ("value", "source_value", "original_value", "nats")


def trl_prompt(tokenizer: Any, prompt: Prompt) -> Prompt:
    """Return a prompt as TRL wants it: messages where the tokenizer has a chat template, else text."""
    return as_messages(prompt) if getattr(tokenizer, "chat_template", None) else as_text(prompt)


def sft_rows(prompts: Sequence[Prompt], answers: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Pair each prompt with its selected response.

    Args:
        prompts: As :func:`trl_prompt` returns them.
        answers: One row of :func:`vgf_llm.answering.answer.answer` a prompt.

    Returns:
        Rows with prompt, completion and figures, and how many were skipped by reason.
    """
    rows, skipped = [], {"empty": 0}
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer["response"].strip():
            skipped["empty"] += 1
            continue
        rows.append({"prompt": prompt, "completion": _turn(prompt, answer["response"]), **_figures(answer)})
    return rows, skipped


def dpo_rows(prompts: Sequence[Prompt], answers: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Pair each selected response with the sample that it was moved from; arguments as for :func:`sft_rows`.

    Returns:
        Rows with prompt, chosen, rejected and figures, and how many were skipped: either text empty, both the same (a
        sample was selected, or nothing changed), the value not higher, or no sample (written in one pass).
    """
    rows, skipped = [], {"empty": 0, "same": 0, "value_not_higher": 0, "no_source": 0}
    for prompt, answer in zip(prompts, answers, strict=True):
        chosen, rejected = answer["response"], answer["source"]
        if rejected is None:
            skipped["no_source"] += 1
        elif chosen.strip() == rejected.strip():
            skipped["same"] += 1
        elif not chosen.strip() or not rejected.strip():
            skipped["empty"] += 1
        elif not answer["value"] > answer["source_value"]:
            skipped["value_not_higher"] += 1
        else:
            pair = {"chosen": _turn(prompt, chosen), "rejected": _turn(prompt, rejected)}
            rows.append({"prompt": prompt, **pair, **_figures(answer)})
    return rows, skipped


def write_parquet(path: Path, rows: list[Row], texts: Sequence[str], conversational: bool) -> None:
    """Write rows to a Parquet file, so that a reader sees the old file or the new, never a half.

    Args:
        path: File to write; its folder must exist.
        rows: From :func:`sft_rows` or :func:`dpo_rows`; there may be none.
        texts: Columns that hold text or messages.
        conversational: Whether they hold messages.

    Raises:
        OutputError: The file cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    text = pyarrow.list_(message) if conversational else pyarrow.string()
    figures = [(name, pyarrow.float64()) for name in FIGURES]
    schema = pyarrow.schema([*((name, text) for name in texts), *figures, ("ended", pyarrow.bool_())])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"'{path}' cannot be written ({error.strerror or error})") from error


def _turn(prompt: Prompt, response: str) -> Prompt:
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def _figures(answer: Row) -> Row:
    return {
        "value": answer["value"],
        "source_value": answer["source_value"],
        "original_value": answer["original_value"],
        "nats": answer["distance"]["nats"],
        "ended": answer["ended"],
    }

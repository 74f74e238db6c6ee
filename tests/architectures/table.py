"""The table of architectures in docs/models.md, from a run of the checks: ``python -m tests.architectures.table``.

Standard output says what was found; the page is rewritten between its two markers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.architectures.checks import CHECKS, Case
from tests.architectures.zoo import ZOO, Architecture
from vgf_llm.errors import ModelError
from vgf_llm.models.loading import load_causal_lm

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by python -m tests.architectures.table -->", "<!-- end of the table -->"


def run(architecture: Architecture) -> tuple[dict[str, str], str]:
    """Build, save and load one tiny model and run every check on it.

    Returns:
        What failed by check, and the attention in use; or what the refusal says, where it is refused at load.
    """
    with tempfile.TemporaryDirectory() as folder:
        architecture.build().save_pretrained(folder)
        case = Case(architecture, Path(folder))
        try:
            load_causal_lm(folder)
        except ModelError as error:
            return {}, str(error).partition("is not supported: ")[2].partition("; name")[0]
        failed = {}
        for name, check in CHECKS.items():
            try:
                check(case)
            except (AssertionError, Exception) as error:  # noqa: BLE001 - reported by the caller, by name
                failed[name] = f"{type(error).__name__}: {error}"
        return failed, case.base.config.get_text_config(decoder=True)._attn_implementation


def row(name: str, architecture: Architecture, failed: dict[str, str], found: str) -> str:
    """Return one line of the table of supported architectures, or of that of refused ones."""
    if architecture.refused:
        return f"| {name} | {found} |"
    shown = {"grouped_sdpa": "sdpa, grouped"}.get(found, found)
    marks = " | ".join("**no**" if check in failed else "ok" for check in CHECKS)
    return f"| {name} | {marks} | {shown} | {architecture.note} |"


def head(refused: bool) -> list[str]:
    """Return the two header lines of a table."""
    columns = ["architecture", "refused because"] if refused else ["architecture", *CHECKS, "attention", "note"]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]


def listed() -> list[str]:
    """Return the rows that the page has between its markers, headers left out."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    headers = {*head(True), *head(False)}
    return [line for line in text.splitlines() if line.startswith("|") and line not in headers]


def main() -> int:
    """Run all, rewrite the page and return 1 if a check failed."""
    rows: dict[bool, list[str]] = {False: [], True: []}
    broken = 0
    for name, architecture in ZOO.items():
        failed, found = run(architecture)
        rows[bool(architecture.refused)].append(row(name, architecture, failed, found))
        broken += bool(failed)
        print(name, *(failed.items() or ["ok"]), flush=True)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = [BEGIN, "", *head(False), *rows[False], "", "Refused at load:", "", *head(True), *rows[True], "", END]
    PAGE.write_text(before + "\n".join(table) + after, encoding="utf-8")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The summary as people read it: a Rich table on a terminal, a Markdown table in the docs."""

from __future__ import annotations

from typing import Any

from vgf_llm.console.screen import show

COLUMNS = (
    ("proxy", "proxy", 2),
    ("gold", "gold", 3),
    ("nll", "NLL/token", 2),
    ("selected_proxy", "sel. proxy", 2),
    ("selected_gold", "sel. gold", 3),
    ("selected_nll", "sel. NLL", 2),
    ("nats", "nats", 2),
    ("changed_tokens", "changed", 1),
    ("displacement", "moved", 2),
    ("tflops", "TFLOP", 2),
    ("seconds", "s", 2),
)
_ON_A_SCREEN = (
    ("gold", "gold, mean of the N", 3),
    ("selected_proxy", "value", 2),
    ("selected_gold", "gold", 3),
    ("selected_nll", "NLL per token", 2),
    ("nats", "nats", 2),
    ("tflops", "TFLOP", 2),
    ("seconds", "s", 2),
)
_SCREEN_LEGEND = (
    "Per prompt, 95% intervals in brackets. The N responses of an arm: mean gold. The one returned: value, gold, NLL "
    "per token under the base. nats: KL spent while decoding. TFLOP and s include sampling. summary.json has the rest."
)
LEGEND = (
    "A row is an arm, per prompt. proxy, gold, NLL/token: mean of the cloud of N responses (value; gold scorer; nats "
    "per token under the base). sel.: the response returned. nats: KL spent while decoding. changed: tokens. moved: "
    "mean displacement in nearest-token distances. TFLOP and s include sampling."
)


def _cell(estimate: dict[str, float] | None, digits: int, interval: bool) -> str:
    if estimate is None:
        return "-"
    text = f"{estimate['mean']:.{digits}f}"
    if interval and estimate["low"] != estimate["high"]:
        text += f" [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"
    return text


COMPARED = ("proxy", "gold", "nll", "selected_proxy", "selected_gold", "selected_nll")


def equal_cost_lines(equal_cost: dict[str, Any]) -> list[str]:
    """Say for each arm what its response gains over best-of-N of at least equal FLOPs, one line each."""
    lines = []
    for name, entry in equal_cost.items():
        gold, nll = entry["selected_gold"], entry["selected_nll"]
        verdict = "better" if gold["low"] > 0 else "worse" if gold["high"] < 0 else "no difference shown"
        lines.append(
            f"{name} - {entry['than']} (of {entry['tflops']:.2f} times its FLOPs): gold {gold['mean']:+.3f} "
            f"[{gold['low']:+.3f}, {gold['high']:+.3f}], NLL per token {nll['mean']:+.2f} [{nll['low']:+.2f}, "
            f"{nll['high']:+.2f}]: {verdict}"
        )
    return lines


def part_lines(summary: dict[str, Any]) -> list[str]:
    """Say what the components of a composed gold are in each arm, one line each; none where it is not composed."""
    lines = []
    for name, entry in summary.items():
        parts = {key: found for key, found in entry.items() if key.startswith("gold.")}
        if parts:
            shown = (
                f"{key} -" if found is None else f"{key} {_cell(found, 3, True)}{_share(found['scored'])}"
                for key, found in parts.items()
            )
            lines.append(f"{name}: {', '.join(shown)}")
    return lines


def _share(scored: float) -> str:
    return "" if scored == 1 else f" (of {scored:.0%} of the responses)"


def markdown_table(summary: dict[str, Any], interval: bool = True) -> str:
    """Return the summary as a Markdown table, intervals on the compared measures."""
    header = ["arm", "seeds", *(title for _, title, _ in COLUMNS)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, entry in summary.items():
        cells = [_cell(entry[key], digits, interval and key in COMPARED) for key, _, digits in COLUMNS]
        lines.append("| " + " | ".join([name, str(entry["seeds"]), *cells]) + " |")
    return "\n".join(lines)


def difference_table(differences: dict[str, Any]) -> str:
    """Return paired differences as a Markdown table; intervals that exclude zero are bold."""
    measures = (("proxy", 2), ("gold", 3), ("nll", 3), ("selected_proxy", 2), ("selected_gold", 3), ("selected_nll", 3))
    lines = ["| arm | " + " | ".join(key.replace("_", " ") for key, _ in measures) + " |", "|" + "---|" * 7]
    for name, entry in differences.items():
        cells = []
        for key, digits in measures:
            estimate = entry[key]
            text = f"{estimate['mean']:+.{digits}f} [{estimate['low']:+.{digits}f}, {estimate['high']:+.{digits}f}]"
            cells.append(f"**{text}**" if estimate["low"] > 0 or estimate["high"] < 0 else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def print_table(summary: dict[str, Any], title: str) -> None:
    """Print the summary as a Rich table for people."""
    from rich.table import Table

    table = Table(title=title, caption=_SCREEN_LEGEND)
    table.add_column("arm", no_wrap=True)
    for _, heading, _ in _ON_A_SCREEN:
        table.add_column(heading, justify="right", overflow="fold")
    for name, entry in summary.items():
        cells = (_cell(entry[key], digits, key in COMPARED) for key, _, digits in _ON_A_SCREEN)
        table.add_row(name, *(cell.replace(" [", "\n[") for cell in cells))
    show(table)

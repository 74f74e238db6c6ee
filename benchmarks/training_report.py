"""The comparison of trainers as people read it: a summary with intervals, tables, unfiltered texts, and a figure.

Intervals are 95% percentile bootstraps over prompts; a prompt's figure is the mean over its samples and over training
seeds. Differences are paired prompt by prompt. Between-run noise is not in them unless there are several seeds.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_evaluate import BASE, MEASURES, means
from benchmarks.training_job import Job
from vgf_llm.machine.facts import facts
from vgf_llm.runs.files import check_writable, write_json_atomic, write_text_atomic

RECORDS, FIGURES = Path("docs/results"), Path("docs/figures")
TITLES = {"vgf": "VGF (ours)", "grpo": "GRPO (TRL)", "rloo": "RLOO (TRL)", "dpo": "DPO (TRL)", BASE: "base"}
COLOURS = {"vgf": "#D55E00", "grpo": "#0072B2", "rloo": "#009E73", "dpo": "#CC79A7"}
_SHOWN = 12

Rows = list[dict[str, Any]]


def read_rows(folder: str | Path, prompts: str) -> Rows:
    """Return the figures of an adapter (or of the base, in the benchmark's folder), one row a prompt."""
    return json.loads((Path(folder) / f"evaluation_{Path(prompts).stem}.json").read_text())["prompts"]


def read_means(folder: str | Path, prompts: str) -> dict[str, float]:
    """Return the means of an adapter's figures."""
    return means({"prompts": read_rows(folder, prompts)})


def summarise(
    jobs: Sequence[Job], results: dict[str, dict[str, Any]], output_dir: str, prompts: str, tuned: dict[str, Any]
) -> dict[str, Any]:
    """Return the whole comparison as one object.

    Args:
        jobs: Finished and measured runs.
        results: Their results by output folder.
        output_dir: Where the base's figures are.
        prompts: The test prompts.
        tuned: What tuning found, by method.
    """
    base = read_rows(output_dir, prompts)
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(job.method for job in jobs):
        runs = [job for job in jobs if job.method == method]
        of = [results[job.output_dir] for job in runs]
        marks = []
        for number in range(1, runs[0].marks + 1):
            rows = _mean_of([read_rows(job.mark(number), prompts) for job in runs])
            minutes = [result["marks"][number - 1]["minutes"] for result in of]
            steps = [result["marks"][number - 1]["steps"] for result in of]
            marks.append({"minutes": _mean(minutes), "steps": _mean(steps), **_estimates(rows)})
        last = _mean_of([read_rows(job.mark(runs[0].marks), prompts) for job in runs])
        methods[method] = {
            "learning_rate": runs[0].learning_rate,
            "tuned": tuned.get(method),
            "seeds": [job.seed for job in runs],
            "minutes": runs[0].minutes,
            "clock": runs[0].clock,
            "seconds_a_step": _mean([result["seconds_a_step"] for result in of]),
            "processor_seconds_a_step": _mean([result["processor_seconds_a_step"] for result in of]),
            "peak_memory_gib": max(result["peak_memory_gib"] for result in of),
            "kl_samples": sum(row["kl_samples"] for row in last) * len(runs),
            **{key: value for key, value in marks[-1].items() if key in (*MEASURES, "steps")},
            "gold_minus_base": _difference(last, base),
            "marks": marks,
            "rows": last,
            "runs": of,
        }
    differences = {
        method: {key: _difference(methods["vgf"]["rows"], entry["rows"], key) for key in MEASURES}
        for method, entry in methods.items()
        if "vgf" in methods and method != "vgf"
    }
    return {
        "prompts": len(base),
        "prompt_file": prompts,
        "hardware": ", ".join(facts("cpu", "system").values()),
        BASE: {**_estimates(base), "rows": base},
        "methods": methods,
        "vgf_minus": differences,
    }


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the last line's object."""
    methods = summary["methods"]
    return {
        "gold_at_equal_time": {name: round(entry["gold"]["mean"], 4) for name, entry in methods.items()},
        "peak_memory_gib": {name: round(entry["peak_memory_gib"], 3) for name, entry in methods.items()},
    }


def write_report(summary: dict[str, Any], output_dir: Path, record: str | None) -> None:
    """Print the table; write summary, Markdown and figure to output_dir and, where recorded, to the documents."""
    places = [(output_dir / "summary.json", output_dir / "report.md", output_dir / "figure.png")]
    if record:
        check_writable(RECORDS)
        check_writable(FIGURES)
        places.append((RECORDS / f"{record}.json", RECORDS / f"{record}.md", FIGURES / f"{record}.png"))
    picture = draw(summary)
    for summary_path, text_path, figure_path in places:
        write_json_atomic(summary_path, summary)
        write_text_atomic(text_path, markdown(summary))
        figure_path.write_bytes(picture)
    print_table(summary)
    print(f"wrote {', '.join(str(path) for path in places[-1])}", file=sys.stderr)


def table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the comparison's header and rows as text."""
    one = next(iter(summary["methods"].values()))
    minutes, clock = one["minutes"], "" if one["clock"] == "wall" else " of processor time"
    header = [
        "method", "rate", "steps", "s a step", "peak GiB", f"gold after {minutes:g} min{clock}", "gold - base",
        "reward", "KL a response", "NLL a token",
    ]  # fmt: skip
    base = summary[BASE]
    rows = [[TITLES[BASE], "", "0", "", "", *(_text(base[key]) for key in ("gold",)), "", _text(base["reward"]), "0"]]
    rows[0].append(_text(base["nll"]))
    for name, entry in summary["methods"].items():
        rows.append(
            [
                TITLES[name],
                f"{entry['learning_rate']:g}",
                f"{entry['steps']:.0f}",
                f"{entry['seconds_a_step']:.1f}",
                f"{entry['peak_memory_gib']:.2f}",
                _text(entry["gold"]),
                _text(entry["gold_minus_base"], sign=True),
                _text(entry["reward"]),
                _text(entry["kl"]),
                _text(entry["nll"]),
            ]
        )
    return header, rows


def print_table(summary: dict[str, Any]) -> None:
    """Print the comparison as a Rich table on standard output."""
    from rich.console import Console
    from rich.table import Table

    header, rows = table(summary)
    shown = Table(title=f"{summary['prompts']} prompts, 95% intervals over prompts")
    for index, heading in enumerate(header):
        shown.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        shown.add_row(*row)
    console = Console()
    Console(width=max(console.width, 150)).print(shown)


def markdown(summary: dict[str, Any]) -> str:
    """Return the report: the table, differences, marks, tuning, and unfiltered texts."""
    parts = ["# Fine-tuning at equal wall-clock", _markdown_table(*table(summary))]
    samples = {name: entry["kl_samples"] for name, entry in summary["methods"].items()}
    parts.append(
        f"Means over {summary['prompts']} prompts of {summary['prompt_file']}, 95% bootstrap intervals over prompts. "
        "Gold, reward and NLL of the policy's own samples under the sampling distribution; KL from untruncated samples "
        f"({', '.join(f'{name}: {count}' for name, count in samples.items())}). Peak GiB: resident, libraries included."
    )
    if summary["vgf_minus"]:
        cells = [[TITLES[n], *(_text(e[key], sign=True) for key in MEASURES)] for n, e in summary["vgf_minus"].items()]
        parts += ["## Ours minus theirs, paired", _markdown_table(["method", *MEASURES], cells)]
    cells = [
        [TITLES[name], f"{mark['minutes']:.1f}", f"{mark['steps']:.0f}", *(_text(mark[key]) for key in MEASURES)]
        for name, entry in summary["methods"].items()
        for mark in entry["marks"]
    ]
    parts += ["## On the way", _markdown_table(["method", "minutes", "steps", *MEASURES], cells)]
    cells = [
        [TITLES[name], rate, *(f"{values[key]:.3f}" for key in MEASURES)]
        for name, entry in summary["methods"].items()
        for rate, values in (entry["tuned"] or {"tries": {}})["tries"].items()
    ]
    if cells:
        parts += [
            "## Learning rates tried, on validation prompts",
            _markdown_table(["method", "rate", *MEASURES], cells),
        ]
    parts.append("## Unfiltered texts: the first sample to each of the first prompts")
    of = {BASE: summary[BASE]["rows"], **{name: entry["rows"] for name, entry in summary["methods"].items()}}
    for place in range(min(_SHOWN, summary["prompts"])):
        lines = [
            f"- {TITLES[name]}: {json.dumps(rows[place]['response'], ensure_ascii=False)}" for name, rows in of.items()
        ]
        parts.append(f"Prompt {of[BASE][place]['index']}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw(summary: dict[str, Any]) -> bytes:
    """Return the figure as PNG: gold against wall-clock, and gold against the KL from the base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_time, by_kl) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
    base = summary[BASE]["gold"]
    for name, entry in summary["methods"].items():
        points = [{"minutes": 0.0, "kl": {"mean": 0.0, "low": 0.0, "high": 0.0}, "gold": base}, *entry["marks"]]
        gold = [point["gold"]["mean"] for point in points]
        bars = [
            [p["gold"]["mean"] - p["gold"]["low"] for p in points],
            [p["gold"]["high"] - p["gold"]["mean"] for p in points],
        ]
        look = {"color": COLOURS[name], "marker": "o", "markersize": 4, "capsize": 2, "label": TITLES[name]}
        by_time.errorbar([point["minutes"] for point in points], gold, yerr=bars, **look)
        kl = [point["kl"] for point in points]
        kl_bars = [[k["mean"] - k["low"] for k in kl], [k["high"] - k["mean"] for k in kl]]
        by_kl.errorbar([k["mean"] for k in kl], gold, xerr=kl_bars, yerr=bars, **look)
    by_time.set(xlabel="minutes of training", ylabel="mean gold of a sample")
    by_kl.set(xlabel="KL to the base, nats a response")
    by_kl.legend(frameon=False)
    for axis in (by_time, by_kl):
        axis.grid(alpha=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    return buffer.getvalue()


def _estimates(rows: Rows) -> dict[str, dict[str, float]]:
    from vgf_llm.statistics.intervals import bootstrap_mean

    return {key: dataclasses.asdict(bootstrap_mean([row[key] for row in rows])) for key in MEASURES}


def _difference(rows: Rows, other: Rows, key: str = "gold") -> dict[str, float]:
    """Return the paired difference of two policies on the same prompts."""
    from vgf_llm.statistics.intervals import bootstrap_mean

    of = {row["index"]: row[key] for row in other}
    return dataclasses.asdict(bootstrap_mean([row[key] - of[row["index"]] for row in rows]))


def _mean_of(runs: list[Rows]) -> Rows:
    """Average the figures of several seeds prompt by prompt; the text is the first seed's."""
    return [
        {**same[0], **{key: _mean([row[key] for row in same]) for key in MEASURES}} for same in zip(*runs, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)


def _text(estimate: dict[str, float], sign: bool = False) -> str:
    mean, low, high = (f"{estimate[key]:{'+' if sign else ''}.2f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])

"""The bake-off in one figure: gold against compute, gold against likelihood, and what a growing budget does.

    python -m benchmarks.decoder_figure docs/results/decoders_sentiment.json docs/figures/decoders_sentiment.png

Left: gold of the selected response against TFLOP a prompt, a line a decoder. Middle: mean gold of the cloud against its
NLL under the base. Right: value and gold of the cloud as ``prior``'s nats or ``pivot``'s rounds grow. Bars are the
summary's 95% intervals over prompts. An arm that ran on fewer prompts than the others (open marker) is placed by its
paired difference from best-of-N, or from the base model for a cloud, so that easy prompts lift no line; its bar is that
of the difference. An arm that the summary lacks is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.decoder_arms import BASE, DEFAULT_NATS
from vgf_llm.cli import run_main
from vgf_llm.errors import DataError

INK, QUIET = "#22303c", "#7b8794"
COLOURS = {  # Okabe and Ito's, without yellow; a variant has its decoder's colour and a dashed line
    "prior": "#0072B2",
    "pivot": "#D55E00",
    "block": "#009E73",
    "edit greedy": "#CC79A7",
    "edit": "#E69F00",
    "nearest": "#56B4E9",
}
MARKERS = {"prior": "o", "pivot": "s", "block": "D", "edit": "^", "edit greedy": "v", "nearest": "P"}
PIVOT_ROUNDS = 2  # where its growing budgets start
SHARE_OF_STD = 0.1  # the bake-off's alpha, in standard deviations of the value
_LEVEL = re.compile(r"(.+) @\d+$")
_NATS = re.compile(r"prior ([\d.]+) nats, cloud$")
_ROUNDS = re.compile(r"pivot (\d+) rounds, cloud$")


@dataclass(frozen=True)
class Point:
    """A mean with its interval."""

    mean: float
    low: float
    high: float
    fewer_prompts: bool = False


@dataclass(frozen=True)
class Summary:
    """What the bake-off wrote."""

    arms: dict[str, Any]
    differences: dict[str, Any]
    alpha: float | None

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read a summary.

        Raises:
            DataError: The file is no summary of the bake-off.
        """
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no summary of the bake-off can be read: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("arms"), dict):
            raise DataError(f"{path}: no summary of the bake-off, 'arms' is missing; write one with --record")
        return cls(found["arms"], found.get("differences", {}), found.get("alpha"))

    def point(self, arm: str, measure: str, baseline: str) -> Point | None:
        """Return a measure of an arm on the baseline's prompts; None where there is none."""
        one, base = self.arms.get(arm, {}), self.arms.get(baseline, {})
        if one.get(measure) is None:
            return None
        paired = self.differences.get(baseline, {}).get(arm, {}).get(measure)
        if one.get("prompts", 0) >= base.get("prompts", 0) or not paired or not base.get(measure):
            return Point(**one[measure], fewer_prompts=one.get("prompts", 0) < base.get("prompts", 0))
        start = base[measure]["mean"]
        return Point(*(start + paired[key] for key in ("mean", "low", "high")), fewer_prompts=True)

    def budgets(self, pattern: re.Pattern[str]) -> list[tuple[float, str]]:
        """Return the sizes and names of the clouds that match, the smallest budget first."""
        return sorted((float(match[1]), name) for name in self.arms if (match := pattern.match(name)))

    def levels(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each decoder with its arms, best-of-N first, the cheapest arm first."""
        lines: dict[str, list[str]] = {}
        for name in self.arms:
            if name.startswith("best-of-"):
                lines.setdefault("best-of-N", []).append(name)
            elif match := _LEVEL.match(name):
                lines.setdefault(match[1], []).append(name)
        for decoder in sorted(lines, key=lambda name: name != "best-of-N"):
            yield decoder, sorted(lines[decoder], key=lambda name: self.arms[name]["tflops"]["mean"])


def draw(summary: Summary, path: Path) -> None:
    """Draw the three panels and write them as PNG; the folder is made."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    style = {"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.edgecolor": "#c9d1d9"}
    with plt.rc_context(style | {"axes.spines.top": False, "axes.labelcolor": INK, "legend.frameon": False}):
        figure, axes = plt.subplots(1, 3, figsize=(15, 5.4), layout="constrained")
        titles = ("Selected gold at what it costs", "Gold and fluency of the cloud", "The cloud as the budget grows")
        panels = (compute_panel, cloud_panel, growth_panel)
        for axis, title, panel in zip(axes, titles, panels, strict=True):
            axis.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=8)
            if not panel(axis, summary):
                axis.text(0.5, 0.5, "no such arms in this run", ha="center", color=QUIET, transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, facecolor="white")
        plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(128).save(path, "PNG", optimize=True)  # a third of the bytes


def compute_panel(axis: Any, summary: Summary) -> bool:
    """Draw selected gold against TFLOP a prompt; returns whether there was anything to draw."""
    drawn = False
    for decoder, names in summary.levels():
        found = [(summary.arms[name]["tflops"]["mean"], summary.point(name, "selected_gold", BASE)) for name in names]
        found = [(tflops, point) for tflops, point in found if point]
        if not found:
            continue
        drawn = True
        prompts = max(summary.arms[name].get("prompts", 0) for name in names)
        label = f"{decoder} ({prompts} prompts)"
        _line(axis, [x for x, _ in found], [point for _, point in found], *_look(decoder), label)
    if drawn:
        from matplotlib.ticker import LogLocator, NullLocator

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set(xlabel="TFLOP a prompt, sampling included", ylabel="gold of the selected response")
        axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", ncols=5, handlelength=2.6)
    return drawn


def cloud_panel(axis: Any, summary: Summary) -> bool:
    """Draw the cloud's mean gold against its NLL, budgets labelled; returns whether there was anything to draw."""
    drawn = False
    start = [(0.0, "base")]
    for decoder, pattern, unit in (("prior", _NATS, "nats"), ("pivot", _ROUNDS, "rounds")):
        found = []
        for size, name in start + summary.budgets(pattern):
            gold, nll = summary.point(name, "gold", "base"), summary.point(name, "nll", "base")
            if gold and nll:
                found.append((size, nll, gold))
        if not any(size for size, _, _ in found):
            continue
        drawn = True
        colour, style, _ = _look(decoder)
        xs, ys = [nll.mean for _, nll, _ in found], [gold.mean for _, _, gold in found]
        axis.errorbar(xs, ys, xerr=_bars([nll for _, nll, _ in found]), fmt="none", ecolor=colour, alpha=0.4, lw=1)
        _line(axis, xs, [gold for _, _, gold in found], *_look(decoder), f"{decoder}, {unit} at the points")
        offset = (5, -11) if decoder == "prior" else (-5, 6)
        side = "left" if decoder == "prior" else "right"
        for size, nll, gold in found:
            if size:
                axis.annotate(
                    f"{size:g}", (nll.mean, gold.mean), offset, ha=side, textcoords="offset points", color=colour
                )
    base = summary.point("base", "gold", "base"), summary.point("base", "nll", "base")
    if all(base):
        drawn = True
        axis.plot(base[1].mean, base[0].mean, "*", ms=13, color="black", label="base model", zorder=6)
    if drawn:
        axis.set(xlabel="NLL under the base model, nats a token", ylabel="mean gold of the cloud")
        axis.legend(fontsize=8, loc="lower right")
    return drawn


def growth_panel(axis: Any, summary: Summary) -> bool:
    """Draw value (left) and gold (right) against the budget; returns whether there was anything to draw."""
    std = summary.alpha / SHARE_OF_STD if summary.alpha else None
    base = summary.point("base", "proxy", "base")
    other, drawn = None, False
    for decoder, pattern, default in (("prior", _NATS, DEFAULT_NATS), ("pivot", _ROUNDS, PIVOT_ROUNDS)):
        colour, _, marker = _look(decoder)
        for measure, style in (("proxy", "-"), ("gold", ":")):
            found = [(size / default, summary.point(name, measure, "base")) for size, name in summary.budgets(pattern)]
            found = [(size, point) for size, point in found if point]
            if not found:
                continue
            drawn, other = True, other or axis.twinx()
            points = [point for _, point in found]
            if measure == "proxy" and std and base:
                points = [_scaled(point, base.mean, std) for point in points]
            name = f"{decoder}, {'value (left)' if measure == 'proxy' else 'gold (right)'}"
            _line(axis if measure == "proxy" else other, [x for x, _ in found], points, colour, style, marker, name)
    if other is not None:
        unit = "value above the base, in its standard deviations" if std and base else "value"
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set(xlabel=f"budget (1: prior's {DEFAULT_NATS:g} nats, pivot's {PIVOT_ROUNDS} rounds)", ylabel=unit)
        other.set_ylabel("mean gold of the cloud")
        handles = [one.get_legend_handles_labels() for one in (axis, other)]
        axis.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], fontsize=8, loc="upper left")
    return drawn


def _line(axis: Any, xs: list[float], points: list[Point], colour: str, style: str, marker: str, label: str) -> None:
    """A line through points with their bars; open markers where an arm ran on fewer prompts."""
    ys = [point.mean for point in points]
    filled = "white" if any(point.fewer_prompts for point in points) else colour
    options = {"ms": 5.5, "lw": 1.6, "elinewidth": 1, "capsize": 2, "markerfacecolor": filled, "zorder": 4}
    drawn = axis.errorbar(xs, ys, yerr=_bars(points), color=colour, ls=style, marker=marker, label=label, **options)
    for part in (*drawn[1], *drawn[2]):
        part.set_alpha(0.5)


def _bars(points: list[Point]) -> list[list[float]]:
    """Lengths of the bars below and above, as matplotlib wants them."""
    below, above = [p.mean - p.low for p in points], [p.high - p.mean for p in points]
    return [[max(0.0, length) for length in side] for side in (below, above)]


def _scaled(point: Point, start: float, unit: float) -> Point:
    values = ((value - start) / unit for value in (point.mean, point.low, point.high))
    return Point(*values, fewer_prompts=point.fewer_prompts)


def _look(decoder: str) -> tuple[str, Any, str]:
    """Colour, line style and marker."""
    if decoder == "best-of-N":
        return "black", "-", "X"
    family = next((name for name in COLOURS if decoder.startswith(name)), None)
    return (COLOURS[family], "-" if decoder == family else "--", MARKERS[family]) if family else (QUIET, "-", ".")


def main(argv: list[str] | None = None) -> int:
    """Draw the figure and print where it is; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the bake-off.")
    parser.add_argument("summary", type=Path, help="the bake-off's summary, JSON")
    parser.add_argument("figure", type=Path, help="PNG to write")
    arguments = parser.parse_args(argv)
    draw(Summary.read(arguments.summary), arguments.figure)
    print(json.dumps({"figure": str(arguments.figure), "bytes": arguments.figure.stat().st_size}))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

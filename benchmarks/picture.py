"""The method in two dimensions: best-of-N stays where the reference is, transported particles reach the reward's mode.

After the paper's illustration (Value Gradient Flow, arXiv 2604.14265), with our own reference and reward: a Gaussian
reference, and a reward whose mode lies 7 of the reference's standard deviations away along a bent ridge.

    python -m benchmarks.picture [--output docs/figures/transport_2d.png]

The last line of standard output is one JSON object with the numbers behind the figure.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vgf_llm.flow import Trajectory, TransportBudget, autograd_value, mmd2, transport, wasserstein2

PARTICLES = 64
SPREAD = 0.5  # standard deviation of the reference around the origin
MODE = (3.0, 1.9)  # the reward's maximum, where it is 0
STEPS = (0, 30, 1000)
BUDGETS = tuple(TransportBudget(steps=steps, step_size=0.01, temperature=0.15, kernel="rbf") for steps in STEPS)


def reward(x: Tensor) -> Tensor:
    """R(x, y) = -(x - 3)^2 / 4 - (y - bend(x))^2, bend(x) = 1.9 + 2.2 (cos(0.9 (x - 3)) - 1): a ridge up to `MODE`.

    Args:
        x: Points [..., 2].

    Returns:
        Rewards [...] <= 0, 0 at the mode alone.
    """
    along = x[..., 0] - MODE[0]
    bend = MODE[1] + 2.2 * (torch.cos(0.9 * along) - 1)
    return -along.square() / 4 - (x[..., 1] - bend).square()


@dataclass(frozen=True)
class Outcome:
    """What one budget did to the reference's samples."""

    budget: TransportBudget
    trajectory: Trajectory
    selected: int
    """Index of the particle with the highest reward after transport."""

    def selected_point(self) -> tuple[float, float]:
        """Where the selected particle ended."""
        x, y = self.trajectory.final[0, self.selected].tolist()
        return x, y

    def figures(self) -> dict[str, float]:
        """The numbers under a panel: reward, distance to the mode, distance to the reference."""
        start, final = self.trajectory.initial[0], self.trajectory.final[0]
        return {
            "steps": self.budget.steps,
            "mean_reward": reward(final).mean().item(),
            "selected_reward": reward(final)[self.selected].item(),
            "selected_distance_to_mode": (final[self.selected] - torch.tensor(MODE)).norm().item(),
            "selected_reference_deviations": final[self.selected].norm().item() / SPREAD,
            "mean_distance_to_mode": (final.mean(0) - torch.tensor(MODE)).norm().item(),
            "mmd2_to_reference": mmd2(start, final, 1.0).item(),
            "wasserstein2_to_reference": wasserstein2(start, final),
        }


def outcomes(seed: int = 0) -> list[Outcome]:
    """Transports the same reference samples under each of `BUDGETS`."""
    start = SPREAD * torch.randn(1, PARTICLES, 2, generator=torch.Generator().manual_seed(seed))
    found = []
    for budget in BUDGETS:
        trajectory = transport(start, autograd_value(reward), budget, record=True)
        found.append(Outcome(budget, trajectory, int(reward(trajectory.final[0]).argmax())))
    return found


def draw(found: list[Outcome], path: Path) -> None:
    """Draws one panel a budget and writes the figure as PNG.

    Args:
        found: Outcomes, first the one without transport.
        path: File to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, quiet, moved, chosen = "#22303c", "#7b8794", "#0f7173", "#d1495b"
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": ink, "axes.edgecolor": "#c9d1d9"})
    figure, axes = plt.subplots(1, len(found), figsize=(12.6, 4.75), sharex=True, sharey=True, layout="constrained")
    x, y = torch.meshgrid(torch.linspace(-2.3, 5.1, 300), torch.linspace(-3.1, 3.6, 300), indexing="xy")
    height = reward(torch.stack([x, y], -1))
    levels = [-math.inf, -12, -8, -5, -3, -1.75, -0.9, -0.3, 0.01]
    shades = ["#ffffff", "#fefbf3", "#fdf5e3", "#fceed0", "#fae4b8", "#f7d89c", "#f3c97c", "#edb659"]
    titles = ("No budget: best-of-N", f"Small budget: {STEPS[1]} steps", f"Large budget: {STEPS[2]} steps")
    for axis, outcome, title in zip(axes, found, titles, strict=True):
        height_levels = [height.min().item() - 1, *levels[1:]]
        axis.contourf(x, y, height, levels=height_levels, colors=shades)
        axis.contour(x, y, height, levels=levels[1:-1], colors="#d9a441", linewidths=0.5, linestyles="-", alpha=0.7)
        for deviations, style in ((2, "-"), (3, (0, (4, 3)))):
            circle = plt.Circle((0, 0), deviations * SPREAD, fill=False, color=quiet, lw=1, ls=style, zorder=2)
            axis.add_patch(circle)
        assert outcome.trajectory.particles is not None
        path_LN2 = torch.stack([particles[0] for particles in outcome.trajectory.particles])
        final_N2 = path_LN2[-1]
        axis.scatter(*path_LN2[0].T, s=13, color=quiet, lw=0, alpha=0.9 if outcome.budget.is_none else 0.55, zorder=3)
        if not outcome.budget.is_none:
            for n in range(PARTICLES):
                axis.plot(*path_LN2[:, n].T, color=moved, lw=0.8, alpha=0.35, zorder=3, solid_capstyle="round")
            axis.scatter(*final_N2.T, s=19, color=moved, edgecolor="white", lw=0.5, zorder=4)
        axis.scatter(*MODE, marker="+", s=150, color=ink, lw=1.6, zorder=5)
        axis.scatter(*outcome.selected_point(), marker="*", s=230, color=chosen, edgecolor="white", lw=0.9, zorder=6)
        figures = outcome.figures()
        axis.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=ink, pad=8)
        axis.set_xlabel(
            f"best reward {figures['selected_reward']:z.2f}  ·  mean reward {figures['mean_reward']:.2f}  ·  "
            f"$W_2$ moved {figures['wasserstein2_to_reference']:.2f}",
            fontsize=9.5,
            color=ink,
            labelpad=8,
        )
        axis.set(xlim=(-2.2, 5.0), ylim=(-3.0, 3.4), aspect="equal", xticks=[], yticks=[])
    leader = {"arrowstyle": "-", "color": ink, "lw": 0.8, "shrinkA": 2, "shrinkB": 7}
    note = {"fontsize": 10, "color": ink, "va": "center", "ha": "center", "arrowprops": leader, "zorder": 7}
    axes[0].annotate("highest reward", MODE, (3.0, 2.95), **note)
    axes[0].annotate(f"best of {PARTICLES}", found[0].selected_point(), (2.05, -1.75), **note)
    axes[0].annotate("reference,\n2 and 3 standard deviations", (-1.06, 1.06), (-0.35, 2.6), **note)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draws the figure and prints its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/figures/transport_2d.png"), help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the reference's samples")
    arguments = parser.parse_args()
    found = outcomes(arguments.seed)
    draw(found, arguments.output)
    print(json.dumps({"figure": str(arguments.output), "budgets": [outcome.figures() for outcome in found]}))


if __name__ == "__main__":
    main()

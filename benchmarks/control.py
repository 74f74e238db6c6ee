"""Gradient steps a second of the control agent, against plain PyTorch at equal sizes, and how they fall.

The plain arm is what one would write first: a flow-matching clone and two critics as `nn.Sequential`, observations
repeated for every particle, a TD target averaged over N samples of the clone, no transport. Ours without transport does
the same work; with transport it adds flow steps through the critics; cached, it leaves the clone out.

    steps_over_plain     time of a plain step over time of ours, by arm (above 1: ours is faster)
    growth_by_particles  time of a step with N particles over that with one (1 flow step)
    growth_by_flow_steps time of a step with L flow steps over that with none (10 particles)

Arms take turns; ratios are taken within a repetition and their medians reported with quartiles, in wall time and, on a
CPU, in processor time, which is blind to other work on the machine. The last line of standard output is JSON.

    python -m benchmarks.control [--record] [--sizes 512 512 512 512] [--device cpu|cuda] [--compile]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgf_llm.control.agent import Batch, ControlAgent, Noise
from vgf_llm.control.settings import AgentSettings
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.machine.facts import device_facts
from vgf_llm.runs.files import check_writable, write_json_atomic

OBSERVATION, ACTION = 28, 5  # of OGBench's cube-single


def perceptron(inputs: int, sizes: list[int], outputs: int, norm: bool) -> nn.Sequential:
    """Linear, ReLU and, for critics, layer norm."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(inputs, size), nn.ReLU(), *([nn.LayerNorm(size)] if norm else [])]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Plain:
    """Behaviour cloning and TD, written plainly."""

    def __init__(self, sizes: list[int], particles: int, euler_steps: int, device: str) -> None:
        """Builds the networks and one optimiser each."""
        self.particles, self.euler_steps = particles, euler_steps
        self.clone = perceptron(OBSERVATION + ACTION + 1, sizes, ACTION, False).to(device)
        self.critics = [perceptron(OBSERVATION + ACTION, sizes, 1, True).to(device) for _ in range(2)]
        self.averaged = [perceptron(OBSERVATION + ACTION, sizes, 1, True).to(device) for _ in range(2)]
        self.clone_optimiser = torch.optim.Adam(self.clone.parameters(), lr=3e-4)
        self.critic_optimiser = torch.optim.Adam([p for c in self.critics for p in c.parameters()], lr=3e-4)

    def step(self, batch: Batch, noise: Noise) -> None:
        """One update of the clone and of both critics."""
        points = (1 - noise.times_B1) * noise.clone_BA + noise.times_B1 * batch.actions_BA
        velocity = self.clone(torch.cat([batch.observations_BO, points, noise.times_B1], 1))
        self._apply(self.clone_optimiser, (velocity - (batch.actions_BA - noise.clone_BA)).square().mean())
        with torch.no_grad():
            next_rows = batch.next_observations_BO.repeat_interleave(self.particles, 0)
            actions = self._sample(next_rows, noise.particles_BNA.flatten(0, 1))
            rows = torch.cat([next_rows, actions], 1)
            q = torch.minimum(self.averaged[0](rows), self.averaged[1](rows)).view(-1, self.particles).mean(1)
            target = (batch.rewards_B + 0.99 * batch.masks_B * q).unsqueeze(1)
        rows = torch.cat([batch.observations_BO, batch.actions_BA], 1)
        losses = [(target - critic(rows)).square().mean() for critic in self.critics]
        self._apply(self.critic_optimiser, losses[0] + losses[1])
        with torch.no_grad():
            for slow, fast in zip(self.averaged, self.critics, strict=True):
                for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
                    p.mul_(0.995).add_(q, alpha=0.005)

    def _sample(self, rows: Tensor, points: Tensor) -> Tensor:
        for step in range(self.euler_steps):
            times = torch.full_like(points[:, :1], step / self.euler_steps)
            points = points + self.clone(torch.cat([rows, points, times], 1)) / self.euler_steps
        return points.clamp(-1, 1)

    @staticmethod
    def _apply(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def ours(
    arguments: argparse.Namespace, particles: int, flow_steps: int, cached: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """One step of our agent as a function of nothing."""
    budget = TransportBudget(steps=flow_steps, step="adam", step_size=0.1, kernel="rbf")
    settings = AgentSettings(
        clone_hidden=arguments.sizes,
        critic_hidden=arguments.sizes,
        num_particles=particles,
        euler_steps=arguments.euler_steps,
        budget=budget,
    )
    agent = ControlAgent(settings, OBSERVATION, ACTION).prepare(arguments.device, compiled)
    batch, noise = inputs(arguments, particles)

    def step() -> None:
        if cached:
            agent.update_critics(batch, noise.particles_BNA.clamp(-1, 1))
            return
        agent.update_clone(batch, noise)
        agent.update_critics(batch, agent.propose(batch.next_observations_BO, noise.particles_BNA))

    return step


def inputs(arguments: argparse.Namespace, particles: int) -> tuple[Batch, Noise]:
    """A batch and its noise, the same for every arm."""
    generator = torch.Generator().manual_seed(0)
    B = arguments.batch_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(arguments.device)

    batch = Batch(
        normal(B, OBSERVATION), normal(B, ACTION).clamp(-1, 1), normal(B), torch.ones_like(normal(B)),
        normal(B, OBSERVATION),
    )  # fmt: skip
    return batch, Noise(normal(B, particles, ACTION), normal(B, ACTION), normal(B, 1).sigmoid())


def make_arms(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Every arm by name; names of the growth arms carry their numbers."""
    N = arguments.particles
    plain = Plain(arguments.sizes, N, arguments.euler_steps, arguments.device)
    batch, noise = inputs(arguments, N)
    arms = {
        "plain": lambda: plain.step(batch, noise),
        "no transport": ours(arguments, N, 0),
        "1 flow step": ours(arguments, N, 1),
        "1 flow step, cached": ours(arguments, N, 1, cached=True),
        "no transport, cached": ours(arguments, N, 0, cached=True),
    }
    if arguments.compile:
        arms["1 flow step, compiled"] = ours(arguments, N, 1, compiled=True)
        arms["1 flow step, cached, compiled"] = ours(arguments, N, 1, cached=True, compiled=True)
    arms |= {f"N={n}": ours(arguments, n, 1) for n in (1, 5, 20)}
    arms |= {f"L={steps}": ours(arguments, N, steps) for steps in (3, 5)}
    return arms


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the figures of the JSON line."""
    torch.manual_seed(0)
    arms = make_arms(arguments)
    clocks: dict[str, dict[str, list[float]]] = {clock: {arm: [] for arm in arms} for clock in ("wall", "processor")}
    names = list(arms)
    for repetition in range(-1, arguments.repetitions):
        for index in range(len(names)):
            arm = names[(index + repetition) % len(names)]
            for clock, seconds in zip(clocks, _seconds(arms[arm], arguments.device), strict=True):
                if repetition >= 0:
                    clocks[clock][arm].append(seconds)
    if arguments.device != "cpu":
        del clocks["processor"]
    return {
        "steps_over_plain": {c: _ratios(t, "plain", [n for n in names[1:] if "=" not in n]) for c, t in clocks.items()},
        "growth_by_particles": {c: _growth(t, "N=1", {"1": "N=1", "5": "N=5", "10": "1 flow step", "20": "N=20"})
                                for c, t in clocks.items()},
        "growth_by_flow_steps": {c: _growth(t, "no transport", {"1": "1 flow step", "3": "L=3", "5": "L=5"})
                                 for c, t in clocks.items()},
        "seconds_a_step": {c: {arm: round(statistics.median(v), 5) for arm, v in t.items()} for c, t in clocks.items()},
        "setting": {k: getattr(arguments, k) for k in ("sizes", "batch_size", "particles", "euler_steps",
                                                        "repetitions", "threads")},
        "hardware": device_facts(arguments.device, ("cores", "load_average")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python -m benchmarks.control", *sys.argv[1:]]),
    }  # fmt: skip


def _ratios(taken: dict[str, list[float]], base: str, names: list[str]) -> dict[str, list[float]]:
    """Time of the base over time of each arm: lower quartile, median, upper quartile."""
    return {n: _quartiles([a / b for a, b in zip(taken[base], taken[n], strict=True)]) for n in names}


def _growth(taken: dict[str, list[float]], base: str, names: dict[str, str]) -> dict[str, list[float]]:
    """Time of each arm over time of the base."""
    return {k: _quartiles([a / b for a, b in zip(taken[n], taken[base], strict=True)]) for k, n in names.items()}


def _quartiles(values: list[float]) -> list[float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(value, 3) for value in quartiles]


def _seconds(work: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall and processor seconds of `work`."""
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    wall, processor = time.perf_counter(), time.process_time()
    work()
    synchronise()
    return time.perf_counter() - wall, time.process_time() - processor


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Gradient steps of the control agent against plain PyTorch.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 512, 512, 512], help="hidden widths")
    parser.add_argument("--batch-size", type=int, default=256, help="transitions B")
    parser.add_argument("--particles", type=int, default=10, help="particles N")
    parser.add_argument("--euler-steps", type=int, default=10, help="Euler steps of the clone")
    parser.add_argument("--repetitions", type=int, default=5, help="measured rounds, each of all arms")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument(
        "--record", action="store_true", help="write docs/results/control_speed_<sizes>_<device>.json too"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures, records if asked, and prints the JSON line."""
    arguments = parse(argv)
    folder = check_writable("docs/results") if arguments.record else Path()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    if arguments.record:
        sizes = f"{len(arguments.sizes)}x{arguments.sizes[0]}"
        write_json_atomic(folder / f"control_speed_{sizes}_{arguments.device}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Running mean and deviation of a reward, the same on every process and however a step is cut.

    delta = x - m          summed over the step's values of all processes: n, S1 = sum delta, S2 = sum delta^2
    N' = N + n             m' = m + S1 / N'             M2' = M2 + S2 - S1^2 / N'

(Chan, Golub and LeVeque, 1983, with the current mean as the shift.) Within a step the statistics stay as they were
when it began, so that all its values are standardised alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_ROUNDING = 1e-7  # of a deviation, relative to the mean: the root of float64's

Sums = list[float]
"""n, S1, S2 of a step."""


@dataclass
class Running:
    """Mean and deviation of all values so far.

    Attributes:
        count: Values.
        mean: Their mean; 0 before the first.
        square: Sum of squared distances from it.
    """

    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0

    @property
    def state(self) -> tuple[float, float, float]:
        """Count, mean and sum of squared distances."""
        return self.count, self.mean, self.square

    @property
    def deviation(self) -> float:
        """Standard deviation of all values; 1 where there are fewer than two, or all are alike up to rounding."""
        deviation = math.sqrt(max(self.square, 0.0) / self.count) if self.count > 1 else 0.0
        return deviation if deviation > _ROUNDING * abs(self.mean) else 1.0

    def standardised(self, values: Iterable[float]) -> list[float]:
        """Return values less the mean, over the deviation."""
        mean, deviation = self.mean, self.deviation
        return [(value - mean) / deviation for value in values]

    def sums(self, values: Iterable[float]) -> Sums:
        """Return the sums of some values of the step."""
        deltas = [value - self.mean for value in values]
        return [float(len(deltas)), math.fsum(deltas), math.fsum(delta**2 for delta in deltas)]

    def add(self, sums: Sums) -> None:
        """Take a step's values in; their sums are those of all processes."""
        number, first, second = sums
        if number:
            self.count += number
            self.mean += first / self.count
            self.square += second - first**2 / self.count


class RunningRewards:
    """The running statistics of a training run's rewards, by name.

    Args:
        names: Of the rewards that are standardised by them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.by_name = {name: Running() for name in names}
        self._seen = self._none()

    def _none(self) -> dict[str, Sums]:
        return {name: [0.0, 0.0, 0.0] for name in self.by_name}

    def see(self, name: str, values: Iterable[float]) -> None:
        """Add values to the step's sums."""
        self._seen[name] = [a + b for a, b in zip(self._seen[name], self.by_name[name].sums(values), strict=True)]

    def forget(self, before: Mapping[str, Sums]) -> None:
        """Take back what was seen since `seen` returned ``before``."""
        self._seen = {name: list(sums) for name, sums in before.items()}

    @property
    def seen(self) -> dict[str, Sums]:
        """The step's sums so far, by name."""
        return {name: list(sums) for name, sums in self._seen.items()}

    def end_step(self, reduce: Callable[[list[Sums]], list[Sums]]) -> None:
        """Take the step's values in.

        Args:
            reduce: Adds up a table of sums over all processes.
        """
        if self.by_name:
            for running, sums in zip(self.by_name.values(), reduce(list(self._seen.values())), strict=True):
                running.add(sums)
            self._seen = self._none()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the statistics as plain JSON; ``deviation`` is for people."""
        return {
            name: {"count": one.count, "mean": one.mean, "square": one.square, "deviation": one.deviation}
            for name, one in self.by_name.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from statistics that `state_dict` returned.

        Raises:
            KeyError: One is missing.
        """
        for name, one in self.by_name.items():
            one.count, one.mean, one.square = (state[name][key] for key in ("count", "mean", "square"))
        self._seen = self._none()

"""A composed reward: parts that are weighted, clipped, standardised, added, multiplied and guarded by constraints.

    v = reward, sum_k v_k or prod_k v_k      v <- (v - mean) / deviation      v <- min(max(v, least), greatest)
    v <- otherwise, where a required part is not above 0                      v <- weight * v

A response that breaks a constraint is not scored any further, so that no server is asked for it. Running statistics are
read here and kept by the trainer (`reward_models.running`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward_models.functions import RewardFunction, call_function
from reward_models.grammar import Part
from reward_models.running import Running, RunningRewards
from reward_models.signature import name_of, place_of
from vgf_llm.errors import ConfigError, ModelError

Components = dict[str, list[float]]
"""Values of the parts by name, before they are standardised, clipped or weighted; NaN where one was not scored."""


class ComposedReward:
    """A composed reward as a reward function.

    Args:
        part: The root.
        scorer_of: Returns what scores a part that is a reward or an endpoint.
        name: For messages.
    """

    def __init__(self, part: Part, scorer_of: Callable[[Part], RewardFunction], name: str) -> None:
        self.part, self.__name__ = part, name
        leaves = [one for one in part.walk() if one.reward is not None or one.endpoint is not None]
        self._scorers = {_label(leaf): scorer_of(leaf) for leaf in leaves}
        self.labels = [one.label for one in part.walk() if one.label is not None]
        self.running_labels = [_label(one) for one in part.walk() if one.standardise is True]

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one reward per response, outside training.

        Raises:
            ConfigError: A part is standardised by running statistics, which only training has.
            VGFError: A part cannot be scored.
        """
        return self.scored(prompts, responses)[0]

    def check_fixed(self) -> None:
        """Refuse running statistics.

        Raises:
            ConfigError: Naming the part.
        """
        if self.running_labels:
            raise ConfigError(
                f"{self.__name__}: {self.running_labels[0]!r} has standardise: true, whose mean and deviation only the "
                "rewards of a training run have; give fixed ones, such as those in a run's reward_statistics.json: "
                "standardise: {mean: 0.0, deviation: 1.0}"
            )

    def scored(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        statistics: Mapping[str, Running] | None = None,
        see: Callable[[str, list[float]], None] | None = None,
    ) -> tuple[list[float], Components]:
        """Return the rewards and their components.

        Args:
            prompts: One per response.
            responses: R texts.
            statistics: Of the parts that are standardised by running ones; without it there must be none.
            see: Is given the values of such parts.

        Raises:
            ConfigError: As for `check_fixed`, where no statistics are given.
            ModelError: The value of a part is not finite.
            VGFError: A part cannot be scored.
        """
        if statistics is None:
            self.check_fixed()
        scoring = _Scoring(self._scorers, prompts, responses, statistics or {}, see)
        values = scoring.value(self.part, list(range(len(responses))))
        nothing = [math.nan] * len(responses)
        return values, {label: scoring.components.get(label, nothing) for label in self.labels}


class _Scoring:
    """One call: values of parts for some of the responses."""

    def __init__(
        self,
        scorers: Mapping[str, RewardFunction],
        prompts: Sequence[str],
        responses: Sequence[str],
        statistics: Mapping[str, Running],
        see: Callable[[str, list[float]], None] | None,
    ) -> None:
        self.scorers, self.prompts, self.responses = scorers, prompts, responses
        self.statistics, self.see = statistics, see
        self.components: Components = {}

    def value(self, part: Part, rows: list[int]) -> list[float]:
        """Return the value of a part for some responses."""
        left = rows
        for needed in part.require:
            kept = self.value(needed, left)
            left = [row for row, value in zip(left, kept, strict=True) if value > 0]
        found = dict.fromkeys(rows, part.otherwise)
        found |= dict(zip(left, self._clipped(part, self._standardised(part, self._raw(part, left))), strict=True))
        values = [part.weight * found[row] for row in rows]
        for row, value in zip(rows, values, strict=True):
            if not math.isfinite(value):
                name = part.label or ("a sum" if part.sum else "a product")
                where = place_of(self.prompts[row], self.responses[row])
                raise ModelError(
                    f"reward part {name} is {value} after standardise, clip and weight, for {where}; give it a clip "
                    "or a smaller weight"
                )
        return values

    def _raw(self, part: Part, rows: list[int]) -> list[float]:
        if not rows:
            return []
        if part.parts:
            columns = zip(*(self.value(one, rows) for one in part.parts), strict=True)
            values = [sum(column) if part.sum else math.prod(column) for column in columns]
        else:
            prompts, responses = [self.prompts[row] for row in rows], [self.responses[row] for row in rows]
            values = call_function(self.scorers[_label(part)], prompts, responses)
        if part.label is not None:
            kept = self.components.setdefault(part.label, [math.nan] * len(self.responses))
            for row, value in zip(rows, values, strict=True):
                kept[row] = value
        return values

    def _standardised(self, part: Part, values: list[float]) -> list[float]:
        if part.standardise is True:
            if self.see is not None:
                self.see(_label(part), values)
            return self.statistics[_label(part)].standardised(values)
        if isinstance(part.standardise, Mapping):
            mean, deviation = part.standardise["mean"], part.standardise["deviation"]
            return [(value - mean) / deviation for value in values]
        return values

    @staticmethod
    def _clipped(part: Part, values: list[float]) -> list[float]:
        if part.clip is None:
            return values
        least, greatest = part.clip
        lowest = -math.inf if least is None else least
        highest = math.inf if greatest is None else greatest
        return [min(max(value, lowest), highest) for value in values]


def scored(
    function: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    running: RunningRewards | None = None,
    prefix: str = "",
    learn: bool = False,
) -> tuple[list[float], Components]:
    """Return the rewards of any function, and the components of a composed one.

    Args:
        function: A reward function, composed or not.
        prompts: One per response.
        responses: R texts.
        running: Statistics of a training run; None outside.
        prefix: Of this reward's names in ``running``.
        learn: Whether the statistics are to take these values in.

    Raises:
        VGFError: It cannot be scored.
    """
    if not isinstance(function, ComposedReward):
        return call_function(function, list(prompts), list(responses)), {}
    if running is None:
        return function.scored(prompts, responses)
    statistics = {label: running.by_name[f"{prefix}{label}"] for label in function.running_labels}

    def see(label: str, values: list[float]) -> None:
        running.see(f"{prefix}{label}", values)

    return function.scored(prompts, responses, statistics, see if learn else None)


class Remembered:
    """A reward function that is called once for each prompt and response: arms of a comparison share their samples.

    Args:
        function: Composed or not.
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function, self.__name__ = function, name_of(function)
        self._known: dict[tuple[str, ...], tuple[float, dict[str, float]]] = {}

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one reward per response."""
        return self.scored(prompts, responses)[0]

    def scored(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[float], Components]:
        """Return the rewards and their components."""
        pairs = list(zip(prompts, responses, strict=True))
        read = ("prompt", "columns")  # of a prompt besides its text
        keys = [
            (str(prompt), response, *(repr(getattr(prompt, name, None)) for name in read)) for prompt, response in pairs
        ]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        if new:
            asked, answers = zip(*new.values(), strict=True)
            rewards, components = scored(self.function, list(asked), list(answers))
            for place, key in enumerate(new):
                parts = {label: values[place] for label, values in components.items()}
                self._known[key] = rewards[place], parts
        found = [self._known[key] for key in keys]
        labels = dict.fromkeys(label for _, parts in found for label in parts)
        return [reward for reward, _ in found], {label: [parts[label] for _, parts in found] for label in labels}


def _label(part: Part) -> str:
    label: Any = part.label
    return str(label)

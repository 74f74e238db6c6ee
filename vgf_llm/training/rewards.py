"""The rewards of a run: reward models and Python functions, weighted and added, and the value they give the flow.

    r(x, y) = sum_m w_m r_m(x, y)

Reward models read tokens and are differentiable; functions read texts and are not. Where the flow is driven by the
reward itself it climbs the models' part of the sum; a sum of functions alone needs a learned value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.foreign import foreign_reward, text_reward
from reward_models.functions import RewardFunction, call_function, further_arguments, load_function
from reward_models.loading import load_reward_model
from reward_models.modelling import RewardModel
from reward_models.sources import is_hub_name, local_folder
from reward_models.weighted import WeightedRewards
from vgf_llm.answering.pipeline import load_gradient
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses

Flow = Callable[[], tuple[Value, GradientSource]]
"""Returns what the flow climbs as it is now, and where its direction comes from."""


@dataclass(frozen=True)
class NamedReward:
    """One reward: a model or a function, by the name it is logged under."""

    name: str
    weight: float
    scorer: RewardModel | RewardFunction
    source: str


class Rewards:
    """Scores responses by every reward and by their weighted sum.

    Args:
        members: At least one.
        tokenizer: Turns responses into the texts that functions read.
        gold: A function that is scored too, and is not part of the sum.
    """

    def __init__(
        self,
        members: Sequence[NamedReward],
        tokenizer: PreTrainedTokenizerBase,
        gold: RewardFunction | None = None,
    ) -> None:
        self.members = list(members)
        self.tokenizer = tokenizer
        self.gold = gold

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: Responses) -> dict[str, Tensor]:
        """Return ``{"reward": sum, <name>: its own, ..., "gold": gold}``, each [B, N] float32.

        Args:
            prompts: B texts, for functions.
            responses: B x N responses.

        Raises:
            ModelError: A function raises, or returns something else than finite numbers.
        """
        texts = responses.texts(self.tokenizer)
        found = {member.name: self._one(member, prompts, texts, responses) for member in self.members}
        weighted = [member.weight * found[member.name] for member in self.members]
        scores = {"reward": torch.stack(weighted).sum(0)}
        if len(self.members) > 1:
            scores |= {f"reward_{name}": values_BN for name, values_BN in found.items()}
        if self.gold is not None:
            scores["gold"] = self._one(NamedReward("gold", 1.0, self.gold, "gold"), prompts, texts, responses)
        return scores

    @staticmethod
    def _one(member: NamedReward, prompts: list[str], texts: list[list[str]], responses: Responses) -> Tensor:
        scorer = member.scorer
        if isinstance(scorer, RewardModel):
            scores_BN = scorer.score(scorer.prefix(responses.prompts), responses.tokens_BNT, responses.mask_BNT).float()
            _refuse_non_finite(member, scores_BN, prompts)
            return scores_BN
        flat_prompts = [prompt for prompt, group in zip(prompts, texts, strict=True) for _ in group]
        rewards = call_function(scorer, flat_prompts, [text for group in texts for text in group])
        return torch.tensor(rewards, device=responses.tokens_BNT.device).view(responses.tokens_BNT.shape[:2])

    def flow(self) -> Flow:
        """Return what gives the flow its value and direction where no value is learned.

        A single model brings its secant head where it has one; several are climbed by their exact gradient.

        Raises:
            ConfigError: There is no reward model among the rewards.
        """
        models = [(member, member.scorer) for member in self.members if isinstance(member.scorer, RewardModel)]
        if not models:
            names = ", ".join(member.name for member in self.members)
            raise ConfigError(
                f"rewards: {names} have no gradient that could move responses; set value: learned, or add a model"
            )
        if len(models) == 1 and models[0][0].weight == 1:
            found = models[0][1], load_gradient(models[0][0].source, models[0][1])
            return lambda: found
        weighted = WeightedRewards([scorer for _, scorer in models], [member.weight for member, _ in models])
        return lambda: (weighted, exact_gradient)


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    gold: str | None = None,
    foreign: bool = False,
    outputs: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Rewards:
    """Load rewards by name: a folder is a reward model, anything else a Python function.

    Args:
        names: Folders and functions.
        weights: One each; empty weighs all by 1.
        tokenizer: The policy's; reward models must have been trained with it, unless ``foreign``.
        gold: A function, or a reward model's folder, that is only looked at.
        outputs: Weights of the outputs of classifiers with several.
        foreign: Whether a model of another tokenizer may score texts; it cannot move particles.
        dtype: Of the reward models' bodies.
        device: Where they go.

    Raises:
        ConfigError: A function does not exist.
        ModelError: A reward model cannot be loaded, or is of another tokenizer.
    """
    members, names = [], [local_folder(name) for name in names]
    check_rewards(names)
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        scorer: Any
        if Path(name).is_dir():
            scorer = foreign_reward(name, tokenizer, device, dtype, outputs) if foreign else None
            scorer = scorer or load_reward_model(name, tokenizer=tokenizer, dtype=dtype, device=device, outputs=outputs)
        else:
            scorer = _function(name)
        members.append(NamedReward(_short(name), float(weight), scorer, name))
    if len({member.name for member in members}) < len(members):  # folders are often called alike
        members = [replace(member, name=f"{member.name}_{i}") for i, member in enumerate(members)]
    return Rewards(members, tokenizer, None if gold is None else text_reward(gold, device, dtype))


def check_rewards(names: Sequence[str], prompts: Sequence[str] = ()) -> None:
    """Check names, and the columns that functions take, before anything heavy is loaded.

    Args:
        names: Folders and functions.
        prompts: What functions will be called with; none are looked at when empty.

    Raises:
        ConfigError: One is neither a folder nor a function that exists, or takes a column that the prompts do not have.
    """
    for name in names:
        if not Path(name).is_dir() and not is_hub_name(name):
            function = _function(name)
            if prompts:
                further_arguments(function, prompts)


def _refuse_non_finite(member: NamedReward, scores_BN: Tensor, prompts: list[str]) -> None:
    bad = (~torch.isfinite(scores_BN)).nonzero()
    if len(bad):
        b, n = bad[0].tolist()
        raise ModelError(
            f"reward {member.name} ({member.source}) gave {float(scores_BN[b, n])} to response {n} of the prompt "
            f"{prompts[b][:60]!r}; a reward must be finite: train the model again, or load it in another dtype"
        )


def _function(name: str) -> Callable:
    if "/" in name:
        raise ConfigError(
            f"rewards: {name!r} is not a folder; train a reward model with `vgf-llm reward`, or name a function"
        )
    return load_function(name)


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name.rpartition(":")[2]

"""The rewards of a run: reward models and Python functions, weighted and added, and the value they give the flow.

    r(x, y) = sum_m w_m r_m(x, y)

Reward models read tokens and are differentiable; functions, servers and composed rewards read texts and are not. Where
the flow is driven by the reward itself it climbs the models' part of the sum; a sum of functions alone needs a learned
value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.composed import ComposedReward, scored
from reward_models.foreign import foreign_reward, text_reward
from reward_models.functions import RewardFunction
from reward_models.grammar import is_composed
from reward_models.inputs import check_rewards
from reward_models.loading import load_reward_model, outputs_of
from reward_models.modelling import RewardModel
from reward_models.outputs import place_of
from reward_models.running import RunningRewards
from reward_models.sources import local_folder, shown_name
from reward_models.weighted import WeightedRewards
from vgf_llm.answering.pipeline import load_gradient
from vgf_llm.data.encoding import template_variables
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.settings import RewardCallSettings
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses

_ROWS = 128  # responses that a reward model scores in one forward, where there are many to a prompt

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

    Attributes:
        running: Statistics of the parts that are standardised by them; the trainer ends its steps.
    """

    def __init__(
        self,
        members: Sequence[NamedReward],
        tokenizer: PreTrainedTokenizerBase,
        gold: RewardFunction | None = None,
    ) -> None:
        self.members = list(members)
        self.tokenizer = tokenizer
        self.gold = None if gold is None else NamedReward("gold", 1.0, gold, "gold")
        self.running = RunningRewards(
            f"{member.name}.{label}"
            for member in members
            if isinstance(member.scorer, ComposedReward)
            for label in member.scorer.running_labels
        )

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: Responses, learn: bool = False) -> dict[str, Tensor]:
        """Return ``{"reward": sum, <name>: its own, ..., "gold": gold}``, each [B, N] float32.

        A composed reward adds its components, as ``reward_<name>.<component>``, NaN where one was not scored.

        Args:
            prompts: B texts, for functions.
            responses: B x N responses.
            learn: Whether running statistics take the values in.

        Raises:
            ModelError: A function raises, or a reward or the sum is not a finite float32 number.
        """
        texts = responses.texts(self.tokenizer)
        parts: dict[str, Tensor] = {}
        found = {}
        for member in self.members:
            found[member.name], inside = self._one(member, prompts, texts, responses, learn)
            parts |= {f"reward_{member.name}.{name}": values_BN for name, values_BN in inside.items()}
        total_BN = torch.stack([member.weight * found[member.name] for member in self.members]).sum(0)
        _refuse_non_finite("of all rewards, weighted and added,", total_BN, prompts, "lower their weights")
        scores = {"reward": total_BN}
        if len(self.members) > 1:
            scores |= {f"reward_{name}": values_BN for name, values_BN in found.items()}
        scores |= parts
        if self.gold is not None:
            scores["gold"], inside = self._one(self.gold, prompts, texts, responses, False)
            scores |= {f"gold.{name}": values_BN for name, values_BN in inside.items()}
        return scores

    @torch.no_grad()
    def of_distinct(self, prompts: list[str], responses: Responses) -> tuple[Tensor, int]:
        """Return the weighted sum alone, [B, N] float32, and how many texts it was asked for.

        A text that comes twice to a prompt is asked for once. Running statistics do not take the values in, and what
        is only looked at is not asked.

        Args:
            prompts: B texts, for functions.
            responses: B x N responses.

        Raises:
            ModelError: As for a call.
        """
        texts = responses.texts(self.tokenizer)
        pairs = [(b, text) for b, group in enumerate(texts) for text in group]
        number = {pair: index for index, pair in enumerate(dict.fromkeys(pairs))}
        where_BN = torch.tensor([number[pair] for pair in pairs]).view(responses.tokens_BNT.shape[:2])
        asked_prompts, asked_texts = [prompts[b] for b, _ in number], [text for _, text in number]
        total_BN = torch.zeros(where_BN.shape, device=responses.tokens_BNT.device)
        for member in self.members:
            if isinstance(member.scorer, RewardModel):
                scores_BN = _scores_of(member.scorer, responses)
            else:
                found, _ = scored(member.scorer, asked_prompts, asked_texts, self.running, f"{member.name}.")
                scores_BN = torch.tensor(found, dtype=torch.float32)[where_BN].to(total_BN.device)
            total_BN += member.weight * scores_BN
        _refuse_non_finite("of all rewards, weighted and added,", total_BN, prompts, "lower their weights")
        return total_BN, len(number)

    def _one(
        self, member: NamedReward, prompts: list[str], texts: list[list[str]], responses: Responses, learn: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scores of one reward, and those of its components, [B, N]."""
        scorer, source = member.scorer, f"{member.name} ({shown_name(member.source)})"
        if isinstance(scorer, RewardModel):
            scores_BN = scorer.score(scorer.prefix(responses.prompts), responses.tokens_BNT, responses.mask_BNT).float()
            _refuse_non_finite(source, scores_BN, prompts, "train the model again, or load it in another dtype")
            return scores_BN, {}
        flat_prompts = [prompt for prompt, group in zip(prompts, texts, strict=True) for _ in group]
        flat_texts = [text for group in texts for text in group]
        running = None if member is self.gold else self.running
        rewards, inside = scored(scorer, flat_prompts, flat_texts, running, f"{member.name}.", learn)
        shape, device = responses.tokens_BNT.shape[:2], responses.tokens_BNT.device
        scores_BN = torch.tensor(rewards, dtype=torch.float32, device=device).view(shape)
        _refuse_non_finite(source, scores_BN, prompts, "scale it, so that it is a number of float32 (below 3.4e38)")
        return scores_BN, {
            name: torch.tensor(values, dtype=torch.float32, device=device).view(shape)
            for name, values in inside.items()
        }

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
    calls: RewardCallSettings | None = None,
) -> Rewards:
    """Load rewards by name: a folder is a reward model, a YAML file composes several, anything else is a function.

    Args:
        names: Folders, functions and files.
        weights: One each; empty weighs all by 1.
        tokenizer: The policy's; reward models must have been trained with it, unless ``foreign``. Variables that are
            fixed in its chat template reach the templates of models that have one of their own.
        gold: A function, or a reward model's folder, that is only looked at.
        outputs: Weights of the outputs of models with several, by name or number; each model gets those that it has.
        foreign: Whether a model of another tokenizer may score texts; it cannot move particles.
        dtype: Of the reward models' bodies.
        device: Where they go.
        calls: How functions and servers are called; None: plainly, without a cache.

    Raises:
        ConfigError: A function does not exist, a file is wrong, or no model has an output.
        ModelError: A reward model cannot be loaded, or is of another tokenizer.
    """
    members, names = [], [name if is_composed(name) else local_folder(name) for name in names]
    check_rewards(names)
    variables, weights_of = template_variables(tokenizer), _outputs_by_folder(names, outputs or {})
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        scorer: Any
        if Path(name).is_dir():
            own = weights_of[name]
            scorer = foreign_reward(name, tokenizer, device, dtype, own) if foreign else None
            scorer = scorer or load_reward_model(name, tokenizer=tokenizer, dtype=dtype, device=device, outputs=own)
        else:
            scorer = text_reward(name, device, dtype, calls, variables)
        members.append(NamedReward(_short(name), float(weight), scorer, name))
    if len({member.name for member in members}) < len(members):  # folders are often called alike
        members = [replace(member, name=f"{member.name}_{i}") for i, member in enumerate(members)]
    return Rewards(members, tokenizer, None if gold is None else text_reward(gold, device, dtype, calls, variables))


def _outputs_by_folder(names: Sequence[str], outputs: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return for each folder the weights of the outputs that it has; a number is one of a model with several.

    Raises:
        ConfigError: No model has an output.
    """
    folders = [name for name in names if Path(name).is_dir()]
    if not outputs:
        return {folder: {} for folder in folders}
    known = {folder: outputs_of(folder) for folder in folders}
    found = {
        folder: {
            output: weight
            for output, weight in outputs.items()
            if place_of(output, there) is not None and (str(output) in there or len(there) > 1 or len(folders) == 1)
        }
        for folder, there in known.items()
    }
    for output in outputs:
        if not any(output in own for own in found.values()):
            there = ", ".join(name for one in known.values() for name in one) or "none"
            raise ConfigError(f"reward_outputs: no model has an output {str(output)!r}; named outputs: {there}")
    return found


def _scores_of(model: RewardModel, responses: Responses) -> Tensor:
    """Return a model's scores of many responses, [B, N], some rows at a time."""
    prefix, at_once = model.prefix(responses.prompts), max(1, _ROWS // len(responses.prompts))
    parts = zip(responses.tokens_BNT.split(at_once, 1), responses.mask_BNT.split(at_once, 1), strict=True)
    return torch.cat([model.score(prefix, tokens_BNT, mask_BNT).float() for tokens_BNT, mask_BNT in parts], 1)


def _refuse_non_finite(name: str, scores_BN: Tensor, prompts: list[str], mend: str) -> None:
    bad = (~torch.isfinite(scores_BN)).nonzero()
    if len(bad):
        b, n = bad[0].tolist()
        raise ModelError(
            f"reward {name} gave {float(scores_BN[b, n])} to response {n} of the prompt "
            f"{prompts[b][:60]!r}; a reward must be finite: {mend}"
        )


def _short(name: str) -> str:
    if is_composed(name):
        return Path(name).stem
    if not Path(name).is_dir():
        return name.rpartition(":")[2]
    shown = shown_name(name)
    return Path(name).name if shown == name else shown

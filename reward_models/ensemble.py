"""Several reward models as one value: the lowest score, or the mean less kappa standard deviations.

    min:            V = min_m z_m
    mean_minus_std: V = mean_m z_m - kappa * std_m z_m,     z_m = (r_m - mean_m) / std_m with the member's own scale
    if given

Pessimism where members disagree curbs over-optimisation (Coste et al., arXiv 2310.02743). The standard deviation is the
population one. Bradley-Terry leaves each member a free constant and scale, so give `scales` (from the members' cards)
wherever members were trained apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from reward_models.modelling import RewardModel
from vgf_llm.errors import ModelError
from vgf_llm.models.prefix import PromptPrefix

_EPSILON = 1e-12  # the square root's gradient at equal scores stays finite


@dataclass(frozen=True)
class EnsemblePrefix:
    """One prompt prefix a member."""

    members: tuple[PromptPrefix, ...]

    def expand(self, n: int) -> EnsemblePrefix:
        """Repeat every prompt n times; row b * n + i continues prompt b."""
        return EnsemblePrefix(tuple(prefix.expand(n) for prefix in self.members))

    def select(self, rows_R: Tensor) -> EnsemblePrefix:
        """Pick rows by index, in the order given."""
        return EnsemblePrefix(tuple(prefix.select(rows_R) for prefix in self.members))


class RewardEnsemble(nn.Module):
    """Reward models over one embedding table, reduced to one score; same surface as a single model."""

    def __init__(
        self,
        members: Sequence[RewardModel],
        reduce: Literal["min", "mean_minus_std"] = "min",
        kappa: float = 1.0,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        """Check that the members can share particles.

        Args:
            members: at least one; input embedding tables must be equal.
            reduce: "min" or "mean_minus_std".
            kappa: standard deviations subtracted, at least 0.
            scales: (mean, std) of each member's scores; None: raw scores.

        Raises:
            ModelError: no member, different tables, or scales that do not fit.
            ValueError: unknown reduce or negative kappa.
        """
        super().__init__()
        if reduce not in ("min", "mean_minus_std"):
            raise ValueError(f'reduce must be "min" or "mean_minus_std", got {reduce!r}')
        if kappa < 0:
            raise ValueError(f"kappa must be at least 0, got {kappa}")
        if not members:
            raise ModelError("an ensemble needs at least one reward model")
        table_VD = members[0].embedding_table_VD
        for index, member in enumerate(members[1:], start=1):
            if member.embedding_table_VD.shape != table_VD.shape or not torch.equal(
                member.embedding_table_VD, table_VD
            ):
                raise ModelError(
                    f"ensemble member {index} has another input embedding table than member 0; particles are "
                    "embeddings, so train all members from one base with frozen embeddings"
                )
        if scales is not None and (len(scales) != len(members) or any(std <= 0 for _, std in scales)):
            raise ModelError(f"scales must give (mean, std > 0) for each of the {len(members)} members, got {scales}")
        self.members = nn.ModuleList(members)
        self.reduce = reduce
        self.kappa = kappa
        self.scales = list(scales) if scales is not None else [(0.0, 1.0)] * len(members)

    @property
    def _models(self) -> list[RewardModel]:
        return [cast(RewardModel, member) for member in self.members]

    @property
    def embedding_table_VD(self) -> Tensor:
        """The shared input embedding table."""
        return self._models[0].embedding_table_VD

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token ids [...] in the shared table."""
        return self._models[0].embed(tokens)

    def freeze(self) -> RewardEnsemble:
        """Eval mode, no parameter requires a gradient."""
        return self.eval().requires_grad_(False)

    def prefix(self, prompts: Sequence[Sequence[int]]) -> EnsemblePrefix:
        """Run the prompts once through every member."""
        return EnsemblePrefix(tuple(member.prefix(prompts) for member in self._models))

    def score(self, prefix: EnsemblePrefix, responses: Tensor, mask_BNT: Tensor) -> Tensor:
        """Score as `RewardModel.score` does and join the members: values_BN."""
        scores = [
            member.score(own, responses, mask_BNT) for member, own in zip(self._models, prefix.members, strict=True)
        ]
        return self.join(scores)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        response_mask: Tensor | None = None,
    ) -> Tensor:
        """Score whole sequences as `RewardModel.forward` does and join the members: rewards_R."""
        return self.join([member(input_ids, attention_mask, inputs_embeds, response_mask) for member in self.members])

    def join(self, scores: Sequence[Tensor]) -> Tensor:
        """Make one score of the members': any shape, the same for all."""
        scaled = [(score - mean) / std for score, (mean, std) in zip(scores, self.scales, strict=True)]
        return reduce_scores(torch.stack(scaled), self.reduce, self.kappa)


def reduce_scores(scores_M: Tensor, reduce: str, kappa: float) -> Tensor:
    """Reduce member scores [M, ...] over the first dimension: min, or mean - kappa * population std."""
    if reduce == "min":
        return scores_M.min(dim=0).values
    mean = scores_M.mean(dim=0)
    variance = (scores_M - mean).square().mean(dim=0)
    return mean - kappa * (variance + _EPSILON).sqrt()

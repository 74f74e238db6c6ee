"""What `benchmarks.fidelity` compares: settings of a variant, and the training losses that only the benchmark knows.

Cost is counted in passes of one layer over one batch of 16 pairs, forward and backward: the reference is 3 layers and
160 steps of one pass, 480 in all, and a variant with deeper bodies or more passes a step gets fewer steps.

    mixing       u_t + lambda (e_w - u_t) in place of u_t, w another response token of the batch, lambda ~ U(0, 0.5)
    adversarial  the loss once more at u + one mean token norm along its own gradient (L2 over the response, detached)
    chord        (R(u + lambda (u' - u)) - (1 - lambda) R(u) - lambda R(u'))^2, u' with a quarter of the tokens replaced
    sobolev      (<grad R(u), u' - u> - (R(u') - R(u)))^2, the same u'; differentiates the gradient (second order)
    linear       only the input skip is trained: the gradient holds everywhere, the body has no say

Sources: mixup (Zhang et al. 2018) for mixing, FGM on embeddings (Miyato et al. 2017) for adversarial, Sobolev training
(Czarnecki et al. 2017) for sobolev, here with the model's own finite changes as targets; chord is its first-order form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reward_models.losses import bradley_terry
from reward_models.trainer import RewardTrainer

Extra = Literal["none", "mixing", "adversarial", "chord", "sobolev", "linear"]
PASSES: dict[str, float] = {"none": 1, "mixing": 1, "adversarial": 2, "chord": 3, "sobolev": 4, "linear": 1}
REFERENCE_COST = 3 * 160


@dataclass(frozen=True)
class Variant:
    """One way to train a reward model, and the directions that are measured on it.

    Attributes:
        name: of its file and of its line in the table.
        layers: decoder layers kept.
        input_skip: whether the head also reads the mean input embedding.
        learning_rate: of the body.
        seed: of head, data order and noise.
        steps: optimiser steps; None: what the reference's cost allows, at most 160.
        pairs: training pairs, from all prompts evenly; None: all.
        noise: embedding noise in training, in root mean squares of the table.
        extra: a loss of this module.
        weight: of the extra loss (mixing: share of tokens mixed; adversarial: step in token norms).
        lora_r: LoRA rank; 0 trains all.
        secant: bases of the secant heads fitted on top.
    """

    name: str
    layers: int = 3
    input_skip: bool = True
    learning_rate: float = 5.0e-5
    seed: int = 0
    steps: int | None = None
    pairs: int | None = None
    noise: float = 0.0
    extra: Extra = "none"
    weight: float = 1.0
    lora_r: int = 0
    secant: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Optimiser steps at the reference's cost."""
        return self.steps or min(160, int(REFERENCE_COST / (self.layers * PASSES[self.extra])))


class VariantTrainer(RewardTrainer):
    """The trainer with an extra loss."""

    def __init__(self, *args: Any, variant: Variant, **kwargs: Any) -> None:
        """Take the trainer's arguments and the variant."""
        super().__init__(*args, **kwargs)
        self.variant = variant
        self.generator = torch.Generator().manual_seed(variant.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Add the variant's loss in training."""
        extra = self.variant.extra
        if extra in ("none", "linear") or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        masks = {name: inputs[name] for name in ("attention_mask", "response_mask")}
        embed = model.get_input_embeddings()
        u_RSD = embed(inputs["input_ids"])
        other_RS = self._other_tokens(inputs["input_ids"], masks["response_mask"].bool())

        def score(v_RSD: Tensor) -> Tensor:
            return model(inputs_embeds=v_RSD, **masks)

        if extra == "mixing":
            chosen = self._mask(masks["response_mask"], self.variant.weight).unsqueeze(-1)
            share = 0.5 * torch.rand(chosen.shape, generator=self.generator)
            return self._loss(score(u_RSD + chosen * share * (embed(other_RS) - u_RSD)))
        if extra == "adversarial":
            return self._adversarial(score, u_RSD, masks["response_mask"])
        moved_RSD = torch.where(self._mask(masks["response_mask"], 0.25).bool().unsqueeze(-1), embed(other_RS), u_RSD)
        matching = _chord if extra == "chord" else _sobolev
        with sdpa_kernel(SDPBackend.MATH):
            rewards_R, penalty = matching(score, u_RSD, moved_RSD, self.generator)
        return self._loss(rewards_R) + self.variant.weight * penalty

    def _loss(self, rewards_R: Tensor) -> Tensor:
        return bradley_terry(*rewards_R.chunk(2), None, self.settings.centring)[0]

    def _adversarial(self, score: Any, u_RSD: Tensor, mask_RS: Tensor) -> Tensor:
        leaf_RSD = u_RSD.detach().requires_grad_(True)
        clean = self._loss(score(leaf_RSD))
        (gradient_RSD,) = torch.autograd.grad(clean, leaf_RSD, retain_graph=True)
        gradient_RSD = gradient_RSD.float() * mask_RS.unsqueeze(-1)
        norm_R11 = gradient_RSD.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        length = self.variant.weight * float(u_RSD.detach().norm(dim=-1).mean())  # of the whole response's step
        return (clean + self._loss(score(u_RSD + length * gradient_RSD / norm_R11))) / 2

    def _mask(self, mask_RS: Tensor, share: float) -> Tensor:
        return mask_RS * (torch.rand(mask_RS.shape, generator=self.generator) < share)

    def _other_tokens(self, ids_RS: Tensor, mask_RS: Tensor) -> Tensor:
        """Put another response token of the batch at every place."""
        pool = ids_RS[mask_RS]
        return pool[torch.randint(len(pool), ids_RS.shape, generator=self.generator)]


def _chord(score: Any, u_RSD: Tensor, moved_RSD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    share_R = torch.rand(len(u_RSD), generator=generator)
    between_R = score(u_RSD + share_R[:, None, None] * (moved_RSD - u_RSD))
    here_R, there_R = score(u_RSD), score(moved_RSD)
    return here_R, _relative(between_R - (1 - share_R) * here_R - share_R * there_R, here_R)


def _sobolev(score: Any, u_RSD: Tensor, moved_RSD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    leaf_RSD = u_RSD.detach().requires_grad_(True)
    here_R = score(leaf_RSD)
    (gradient_RSD,) = torch.autograd.grad(here_R.sum(), leaf_RSD, create_graph=True)
    predicted_R = (gradient_RSD * (moved_RSD - u_RSD)).sum((1, 2))
    return here_R, _relative(predicted_R - (score(moved_RSD) - here_R), here_R)


def _relative(gap_R: Tensor, rewards_R: Tensor) -> Tensor:
    """Mean square of a gap, in variances of the rewards (at least 0.01, so that a new head does not divide by zero)."""
    return gap_R.square().mean() / rewards_R.detach().var().clamp(min=0.01)


def variants(shipped_rate: float) -> list[Variant]:
    """Return all variants, in the order in which they are run.

    Args:
        shipped_rate: learning rate of the two-layer variant.
    """
    two: dict[str, Any] = {"layers": 2, "learning_rate": shipped_rate}
    return [
        Variant("two layers, skip", **two, secant=("skip", "gradient")),
        Variant("three layers, skip", secant=("skip",)),
        Variant("three layers, no skip", input_skip=False, secant=("none", "gradient")),
        Variant("two layers, skip, rate 5e-5", layers=2, learning_rate=5.0e-5),
        Variant("two layers, skip, rate 1e-4", layers=2, learning_rate=1.0e-4),
        Variant("skip alone (linear)", layers=1, extra="linear"),
        Variant("two layers, skip, seed 1", **two, seed=1),
        Variant("two layers, skip, noise", **two, noise=1.0),
        Variant("two layers, skip, 460 pairs", **two, pairs=460, secant=("skip",)),
        Variant("two layers, skip, chord", **two, extra="chord"),
        Variant("two layers, skip, mixing", **two, extra="mixing", weight=0.3),
        Variant("two layers, skip, 230 pairs", **two, pairs=230, secant=("skip",)),
        Variant("two layers, skip, 920 pairs", **two, pairs=920, secant=("skip",)),
        Variant("two layers, skip, adversarial", **two, extra="adversarial"),
        Variant("two layers, skip, seed 2", **two, seed=2),
        Variant("two layers, skip, Sobolev", **two, extra="sobolev"),
        Variant("two layers, skip, LoRA 16", layers=2, learning_rate=5.0e-4, lora_r=16),
        Variant("ten layers, skip", layers=10, secant=("skip",)),
        Variant("one layer, skip", layers=1, learning_rate=shipped_rate),
    ]

"""The secant head: a gradient that is fitted to what token changes do, read off one forward pass of the value.

The flow needs a direction g_t at every token such that <g_t, e_v - e_{y_t}> predicts R(y with y_t := v) - R(y). The
value's input gradient is the tangent at y, but the next token is a secant away. This head is regressed on secants:

    g_t = base_t + (unit / (rms T)) W2 gelu(W1 [n(h_t), n(h_{t+1}), n(pool(h)), n(u_t)] + b1) + b2,   n = layer norm

h are the frozen value's last hidden states, rms the table's root mean square, T the response's tokens (1 for pooling
"last"), unit the standard deviation of the residual targets, so that the network works in numbers about 1. `base` is
what is known beforehand: "skip" (the input skip's constant direction, exact for that part of the value), "gradient"
(the value's own input gradient, which costs a backward pass), or "none". W2 starts at zero: an unfitted head is its
base.

Source: the discrete counterpart of the amortised gradient network f(s, a) of Value Gradient Flow (arXiv 2604.14265),
which is regressed on the critic's gradient. Departures: the targets are exact finite changes in place of gradients,
there is one network for all positions, and only what the base leaves over is learned.

Cost of a direction, in FLOPs a token: the value's forward (2 a parameter), plus 2 (4 D H + H D) of the head, which is
under a tenth of one decoder layer for D = 576 and H = 256. Base "gradient" adds the backward pass (about 2 forwards).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from reward_models.modelling import RewardModel
from reward_models.sources import weights_folder
from vgf_llm.errors import ModelError
from vgf_llm.flow.trajectory import ValueGradient
from vgf_llm.runs.files import write_json_atomic
from vgf_llm.runs.result import replaced, settle
from vgf_llm.text.particles import GradientSource
from vgf_llm.text.responses import Responses

WEIGHTS_NAME, FACTS_NAME = "secant.safetensors", "secant.json"
BASES = ("skip", "gradient", "none")
_PARTS = 4  # this position's hidden state, the next one's, the pooled one, the position's own embedding


class SecantHead(nn.Module):
    """Two layers from hidden states to directions; see the module's first lines.

    Args:
        width: D, of the value's hidden states and embeddings.
        hidden: H, units between the two layers, at least 1.
        base: what the network adds to: "skip", "gradient" or "none".
        seed: of the first layer.

    Raises:
        ValueError: base is not one of the three.
    """

    unit: Tensor

    def __init__(self, width: int, hidden: int = 256, base: str = "skip", seed: int = 0) -> None:
        super().__init__()
        if base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
        self.width, self.hidden, self.base = width, hidden, base
        self.first = nn.Linear(_PARTS * width, hidden)
        self.second = nn.Linear(hidden, width)
        self.register_buffer("unit", torch.ones(()))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(hidden, _PARTS * width, generator=generator) / (_PARTS * width) ** 0.5)
            self.first.bias.zero_()
            self.second.weight.zero_()
            self.second.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Map features [..., 4 D] (`secant_features`) to directions [..., D], in units of unit / (rms T)."""
        with torch.autocast(features.device.type, enabled=False):  # an engine may hold the weights in bfloat16
            found: Tensor = self.second(gelu(self.first(features.to(self.first.weight.dtype))))
            return found.float()


def secant_features(hidden_BNTD: Tensor, pooled_BND: Tensor, u_BNTD: Tensor, mask_BNT: Tensor) -> Tensor:
    """Put what the head reads side by side, float32, each part with mean 0 and variance 1: [B, N, T, 4 D].

    Args:
        hidden_BNTD: last hidden states; the part h_{t+1} is 0 at a response's last token.
        pooled_BND: what the value's own head reads.
        u_BNTD: the particles.
        mask_BNT: bool, right padded.
    """
    hidden_BNTD = hidden_BNTD.float().masked_fill(~mask_BNT.bool().unsqueeze(-1), 0.0)
    next_BNTD = torch.cat([hidden_BNTD[:, :, 1:], torch.zeros_like(hidden_BNTD[:, :, :1])], dim=2)
    pooled_BNTD = pooled_BND.float().unsqueeze(2).expand_as(hidden_BNTD)
    parts = (hidden_BNTD, next_BNTD, pooled_BNTD, u_BNTD.float())
    return torch.cat([layer_norm(part, part.shape[-1:]) for part in parts], dim=-1)


def direction_scale(value: RewardModel, mask_BNT: Tensor) -> Tensor:
    """Return 1 / (rms T), what one unit of the network is worth before `unit`: [B, N, 1, 1]."""
    tokens_BN = mask_BNT.sum(-1).clamp(min=1).float()
    if value.config.pooling != "mean":
        tokens_BN = torch.ones_like(tokens_BN)
    return (1.0 / (value.table_scale * tokens_BN))[..., None, None]


def base_direction(
    value: RewardModel, prefix: Any, u_BNTD: Tensor, mask_BNT: Tensor, base: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the value once and return what is known without the network.

    Args:
        value: a frozen reward model.
        prefix: `value.prefix` of the B prompts.
        u_BNTD: particles.
        mask_BNT: bool, right padded.
        base: "skip", "gradient" or "none".

    Returns:
        values_BN; base_BNTD, float32; and the features [B, N, T, 4 D]; all detached.
    """
    with torch.set_grad_enabled(base == "gradient"):
        leaf_BNTD = u_BNTD.detach().requires_grad_(base == "gradient")
        values_BN, hidden_BNTD, pooled_BND = value.score_with_hidden(prefix, leaf_BNTD, mask_BNT)
        if base == "gradient":
            (base_BNTD,) = torch.autograd.grad(values_BN.sum(), leaf_BNTD)
        elif base == "skip":
            base_BNTD = value.skip_gradient(mask_BNT)
        else:
            base_BNTD = torch.zeros_like(u_BNTD)
    features = secant_features(hidden_BNTD.detach(), pooled_BND.detach(), u_BNTD.detach(), mask_BNT)
    return values_BN.detach(), base_BNTD.float(), features


def secant_gradient(head: SecantHead) -> GradientSource:
    """Return the head as a source of directions: `ImplicitPolicy(..., gradient=secant_gradient(head))`.

    EOS and padding get a zero direction. The result raises ModelError for a value that shows no hidden states (an
    ensemble, say) or is of another width.
    """

    def source(value: Any, prefix: Any, responses: Responses) -> ValueGradient:
        _check_fits(head, value)
        movable_BNT1 = responses.movable_BNT.unsqueeze(-1)

        @torch.no_grad()
        def value_gradient(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
            values_BN, base_BNTD, features = base_direction(value, prefix, u_BNTD, responses.mask_BNT, head.base)
            learned_BNTD = head(features) * head.unit * direction_scale(value, responses.mask_BNT)
            return values_BN, ((base_BNTD + learned_BNTD) * movable_BNT1).to(u_BNTD.dtype)

        return value_gradient

    return GradientSource(source, passes=2 if head.base == "gradient" else 1)


def weights_digest(folder: str | Path) -> str:
    """Return the SHA-256 of a reward model's weight files, so that a head knows the model in whatever dtype it runs."""
    digest = hashlib.sha256()
    for path in sorted(weights_folder(folder).glob("*.safetensors")):
        if path.name != WEIGHTS_NAME:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def save_secant_head(head: SecantHead, folder: str | Path, **facts: Any) -> None:
    """Write secant.safetensors and secant.json beside a reward model's weights; a kill leaves the old pair or the new.

    Args:
        head: fitted to the reward model in ``folder``.
        folder: of that reward model.
        facts: figures and settings for secant.json, anything that JSON holds.

    Raises:
        OutputError: the folder refuses a write.
    """
    folder = Path(folder)
    shape = {"width": head.width, "hidden": head.hidden, "base": head.base}
    with replaced(folder, FACTS_NAME) as staging:
        save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, staging / WEIGHTS_NAME)
        write_json_atomic(staging / FACTS_NAME, shape | {"reward_model_sha256": weights_digest(folder)} | facts)


def load_secant_head(folder: str | Path, value: RewardModel) -> SecantHead:
    """Read a secant head and check that it belongs to this reward model.

    Args:
        folder: the reward model's, where `save_secant_head` wrote to.
        value: the reward model that it will be used with.

    Raises:
        ModelError: there is none, it cannot be read, its width is another one, or it was fitted to other weights of the
            reward model or of its outputs.
    """
    settle(folder)
    path = Path(folder) / FACTS_NAME
    advice = "fit it with `vgf-llm secant --reward_model ...`"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        head = SecantHead(int(facts["width"]), int(facts["hidden"]), facts["base"])
        fitted_to = facts["reward_model_sha256"]
    except FileNotFoundError as error:
        raise ModelError(f"'{folder}' has no {FACTS_NAME}; {advice}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"'{path}' cannot be read ({error!r}); {advice}") from error
    _check_fits(head, value)
    found = weights_digest(folder)
    if fitted_to != found:
        raise ModelError(
            f"'{path}' was fitted to other weights (SHA-256 {str(fitted_to)[:12]}, those beside it {found[:12]}); "
            f"{advice} again"
        )
    outputs = facts.get("reward_outputs")
    if outputs is not None and outputs != value.reward_outputs:
        raise ModelError(
            f"'{path}' was fitted to reward_outputs {outputs}, and those in use are {value.reward_outputs}; give the "
            "former, fit it again with `vgf-llm secant`, or remove the file"
        )
    try:
        head.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"'{Path(folder) / WEIGHTS_NAME}' cannot be read ({error}); {advice}") from error
    return head.to(value.device).eval().requires_grad_(False)


def stated_fidelity(folder: str | Path) -> dict[str, dict[str, float]]:
    """Return what a reward model's folder states about its directions, by name.

    ``gradient`` is from the card, ``secant head`` from secant.json; what is not there or was not measured is left out.
    The two may have been measured on different responses. A card of several objectives is of their mean, whatever the
    weights in use, and is left out.
    """
    from reward_models.card import CARD_NAME, read_card

    found: dict[str, dict[str, float]] = {}
    if (Path(folder) / CARD_NAME).is_file():
        card = read_card(folder)
        found |= {"gradient": card.fidelity} if card.fidelity and len(card.objectives or {}) < 2 else {}
    if (Path(folder) / FACTS_NAME).is_file():
        facts = json.loads((Path(folder) / FACTS_NAME).read_text(encoding="utf-8"))
        found |= {"secant head": facts["fidelity"]["after"]} if "fidelity" in facts else {}
    return found


def _check_fits(head: SecantHead, value: Any) -> None:
    if not isinstance(value, RewardModel):
        raise ModelError(f"a secant head reads the hidden states of one reward model, not of a {type(value).__name__}")
    width = value.embedding_table_VD.shape[1]
    if head.width != width:
        raise ModelError(f"the secant head is {head.width} wide, the reward model {width}; fit one to this model")

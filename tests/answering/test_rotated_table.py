"""A value whose input space is rotated is the same function of tokens, and tilts the base by the same amounts.

    u' = u Q,   W_in' = W_in diag(g) Q,   W_out' = Q^T W_out,   g' = 1      (Q orthogonal, g the norms' weights)

Root-mean-square norms commute with Q once their weights are moved into the layers that read them (SliceGPT, arXiv
2401.15024), so a Llama with a rotated residual stream has the scores of the plain one. Its table has the same size and
other rows. Everything that compares values with the base by token id must not see a difference.
"""

from __future__ import annotations

import copy

import pytest
import torch

from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from vgf_llm.answering.assemble import make_policy
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds

PROMPTS = [[4, 10, 11], [4, 12, 9, 14]]


@torch.no_grad()
def rotated(value: RewardModel) -> RewardModel:
    """Rotate the residual stream of a Llama value; exact up to rounding."""
    turned = copy.deepcopy(value)
    width = value.embedding_table_VD.shape[1]
    Q_DD = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[
        0
    ]
    Q_DD = Q_DD.to(value.embedding_table_VD.dtype)
    turned.body.embed_tokens.weight.copy_(value.embedding_table_VD @ Q_DD)
    for layer in turned.body.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            for reader in readers:
                reader.weight.copy_(reader.weight * norm.weight @ Q_DD)
            norm.weight.fill_(1.0)
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(Q_DD.T @ writer.weight)
    turned.head.weight.copy_(value.head.weight * turned.body.norm.weight @ Q_DD)
    turned.body.norm.weight.fill_(1.0)
    if value.skip_head is not None:
        turned.skip_head.weight.copy_(value.skip_head.weight @ Q_DD)
    return turned


def answered(value, decoder, kernel="none"):
    reference = TorchReference(build_llama().double(), SamplingSettings(top_k=12, max_new_tokens=8), (2,), 0)
    budget = TransportBudget(nats=3.0, steps=2, kernel=kernel, rounds=2, step_size=5.0)
    policy = make_policy(ImplicitPolicy, reference, value, budget, decoder=decoder, draws=2)
    return policy(PROMPTS, row_seeds(seed=0, prompt_keys=[0, 1], num_particles=3))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_and_tilts_are_those_of_the_plain_table(pooling):
    torch.manual_seed(0)
    value = RewardModel.from_base(build_llama(), pooling=pooling, input_skip=True).double().freeze()
    torch.nn.init.normal_(value.head.weight)
    torch.nn.init.normal_(value.skip_head.weight)
    for norm in (value.body.norm, value.body.layers[0].input_layernorm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    turned = rotated(value)
    assert turned.embedding_table_VD.shape == value.embedding_table_VD.shape
    assert not torch.allclose(turned.embedding_table_VD, value.embedding_table_VD, atol=0.1)
    tokens_BNT, mask_BNT = torch.randint(6, 50, (2, 3, 5)), torch.ones(2, 3, 5, dtype=torch.bool)
    tilts = []
    for one in (value, turned):
        u_BNTD = one.embed(tokens_BNT).detach().requires_grad_(True)
        scores_BN = one.score(one.prefix(PROMPTS), u_BNTD, mask_BNT)
        (gradient_BNTD,) = torch.autograd.grad(scores_BN.sum(), u_BNTD)
        tilts.append((scores_BN.detach(), gradient_BNTD @ one.embedding_table_VD.T))
    assert (tilts[0][0] - tilts[1][0]).abs().max() < 1e-5
    assert (tilts[0][1] - tilts[1][1]).abs().max() < 1e-5 * (1 + tilts[0][1].abs().max())


ARMS = [(one, "none") for one in ("prior", "block", "edit", "edit_greedy", "pivot", "nearest")] + [("prior", "rbf")]


@pytest.mark.parametrize(("decoder", "kernel"), ARMS)
def test_answers_are_token_for_token_those_of_the_plain_table(decoder, kernel):
    torch.manual_seed(0)
    value = RewardModel.from_base(build_llama()).double().freeze()
    value.head.weight.data.mul_(20)
    plain, turned = answered(value, decoder, kernel), answered(rotated(value), decoder, kernel)
    assert torch.equal(plain.selected.tokens_BNT, turned.selected.tokens_BNT)
    assert torch.allclose(plain.selected_values_B, turned.selected_values_B, atol=1e-4)
    assert torch.allclose(plain.nats_BN, turned.nats_BN, atol=1e-4, equal_nan=True)
    assert not torch.equal(plain.selected.tokens_BNT, plain.originals.tokens_BNT[:, :1])

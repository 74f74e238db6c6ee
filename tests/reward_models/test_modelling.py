"""One score, however it is computed: batch, padding side, pad id, prefix, ids or embeddings, before or after reload."""

from __future__ import annotations

import pytest
import torch

from reward_models.configuration import POOLINGS
from reward_models.modelling import RewardModel
from vgf_llm.errors import ModelError

PROMPTS = [[5, 6, 7, 8, 9], [10, 11]]
RESPONSES = [[[12, 13, 14], [15, 2]], [[16, 2], [18, 19, 20]]]


@pytest.fixture(params=POOLINGS)
def model(any_lm, request):
    return RewardModel.from_base(any_lm, num_layers=1, pooling=request.param).freeze()


def padded():
    tokens = torch.tensor([[r + [0] * (3 - len(r)) for r in group] for group in RESPONSES])
    mask = torch.tensor([[[True] * len(r) + [False] * (3 - len(r)) for r in group] for group in RESPONSES])
    return tokens, mask


def one_by_one(model):
    """The slow, obvious reference: every sequence alone, no padding."""
    scores = []
    for prompt, group in zip(PROMPTS, RESPONSES, strict=True):
        for response in group:
            response_mask = torch.tensor([[0] * len(prompt) + [1] * len(response)])
            scores.append(model(input_ids=torch.tensor([prompt + response]), response_mask=response_mask))
    return torch.cat(scores).reshape(2, 2)


def whole_rows(side, pad):
    rows = [(p, r) for p, group in zip(PROMPTS, RESPONSES, strict=True) for r in group]
    longest = max(len(p) + len(r) for p, r in rows)
    ids, attention, response_mask = [], [], []
    for prompt, response in rows:
        fill = longest - len(prompt) - len(response)
        left, right = (fill, 0) if side == "left" else (0, fill)
        ids.append([pad] * left + prompt + response + [pad] * right)
        attention.append([0] * left + [1] * (longest - fill) + [0] * right)
        response_mask.append([0] * (left + len(prompt)) + [1] * len(response) + [0] * right)
    return torch.tensor(ids), torch.tensor(attention), torch.tensor(response_mask)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_prefix_path_equals_one_sequence_at_a_time_for_ids_and_embeddings(model):
    tokens, mask = padded()
    expected = one_by_one(model)
    prefix = model.prefix(PROMPTS)
    close(model.score(prefix, tokens, mask), expected)
    close(model.score(prefix, model.embed(tokens), mask), expected)
    close(model.score(prefix, tokens, mask), expected)  # the prefix serves again
    assert expected.std() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 2])
def test_padding_side_and_pad_equal_to_eos_change_nothing(model, side, pad):
    ids, attention, response_mask = whole_rows(side, pad)
    expected = one_by_one(model).flatten()
    close(model(ids, attention, response_mask=response_mask), expected)
    close(model(None, attention, model.embed(ids), response_mask), expected)
    for row in range(len(ids)):
        one = slice(row, row + 1)
        close(model(ids[one], attention[one], response_mask=response_mask[one]), expected[one])


def test_a_saved_model_scores_the_same_and_stays_trainable_but_for_its_embeddings(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    tokens, mask = padded()
    assert torch.equal(
        again.score(again.prefix(PROMPTS), tokens, mask), model.score(model.prefix(PROMPTS), tokens, mask)
    )
    assert not again.get_input_embeddings().weight.requires_grad and again.head.weight.requires_grad
    assert again.config.pooling == model.config.pooling and again.config.num_layers == 1


def test_gradients_reach_attended_response_tokens_only(model):
    tokens, mask = padded()
    u = model.embed(tokens).requires_grad_(True)
    values = model.score(model.prefix(PROMPTS), u, mask)
    values.sum().backward()
    assert u.grad[~mask].abs().max() == 0
    assert (u.grad[mask].abs().sum(-1) > 0).all()
    assert all(p.grad is None for p in model.parameters())


def test_gradient_equals_the_difference_quotient(model):
    model.double()
    tokens, mask = padded()
    prefix = model.prefix(PROMPTS)
    u = model.embed(tokens).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.score(prefix, u, mask).double().sum(), u)
    direction = torch.randn_like(u) * mask[..., None]
    step = 1e-3
    with torch.no_grad():
        ahead, behind = (model.score(prefix, u + s * step * direction, mask).double().sum() for s in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * step), atol=2e-3, rtol=1e-3)


def test_token_scores_build_no_graph_even_when_parameters_are_trainable(model):
    tokens, mask = padded()
    model.unfreeze()
    assert not model.score(model.prefix(PROMPTS), tokens, mask).requires_grad


def test_from_base_leaves_the_base_alone_and_cuts_layers(any_lm):
    before = {name: tensor.clone() for name, tensor in any_lm.state_dict().items()}
    model = RewardModel.from_base(any_lm, num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in any_lm.state_dict().items())
    assert model.config.num_layers == 1
    assert RewardModel.from_base(any_lm).config.num_layers == 2


def test_the_table_is_the_base_models_and_nothing_has_vocabulary_size_twice(any_lm):
    model = RewardModel.from_base(any_lm, num_layers=1)
    assert torch.equal(model.embedding_table_VD, any_lm.get_input_embeddings().weight)
    assert sum(p.shape[0] == model.embedding_table_VD.shape[0] for p in model.parameters()) == 1


def test_half_precision_body_keeps_a_float32_head_across_reload(tiny_lm, tmp_path):
    model = RewardModel.from_base(tiny_lm, num_layers=1, dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.float32 and model.embedding_table_VD.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.head.weight.dtype == torch.float32 and torch.equal(again.head.weight, model.head.weight)
    tokens, mask = padded()
    values = again.score(again.prefix(PROMPTS), tokens, mask)
    assert values.dtype == torch.float32 and torch.isfinite(values).all()


def test_faults_are_named(any_lm):
    with pytest.raises(ModelError, match="num_layers is 3, but the base model has layers 1 to 2"):
        RewardModel.from_base(any_lm, num_layers=3)
    with pytest.raises(ValueError, match="pooling must be one of last, mean, got 'max'"):
        RewardModel.from_base(any_lm, pooling="max")
    model = RewardModel.from_base(any_lm, num_layers=1, pooling="mean")
    with pytest.raises(ModelError, match="pass response_mask"):
        model(input_ids=torch.tensor([[5, 6]]))
    tokens, mask = padded()
    mask[1, 0] = False
    with pytest.raises(ModelError, match="row 2 has no token to score"):
        model.score(model.prefix(PROMPTS), tokens, mask)

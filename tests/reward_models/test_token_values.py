"""The token-level value: every prefix's value from one forward is the score of the response cut there."""

from __future__ import annotations

import pytest
import torch

from reward_models.configuration import POOLINGS
from reward_models.loading import add_lora
from reward_models.modelling import RewardModel
from reward_models.pooling import pool_last, pool_mean, prefix_columns, prompt_end, running_mean
from vgf_llm.errors import ModelError

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12]]
RESPONSES = [[12, 13, 14, 2], [15, 2], [16]]


def batch(pad=0):
    """[prompt left padded | response right padded]."""
    P, T = max(map(len, PROMPTS)), max(map(len, RESPONSES))
    rows = list(zip(PROMPTS, RESPONSES, strict=True))
    ids = [[pad] * (P - len(p)) + p + r + [pad] * (T - len(r)) for p, r in rows]
    attention = [[0] * (P - len(p)) + [1] * (len(p) + len(r)) + [0] * (T - len(r)) for p, r in rows]
    response = [[0] * P + [1] * len(r) + [0] * (T - len(r)) for _, r in rows]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attention),
        "response_mask": torch.tensor(response),
    }


def build(lm, pooling, input_skip, lora=False):
    model = RewardModel.from_base(lm, num_layers=1, pooling=pooling, input_skip=input_skip)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.head.bias.fill_(0.7)
        if input_skip:
            model.skip_head.weight.normal_(generator=generator)
    if not lora:
        return model.eval()
    model = add_lora(model, r=2, alpha=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inner(model):
    return model if isinstance(model, RewardModel) else model.get_base_model()


def slow_values(model):
    """Each prefix scored as a response of its own, unpadded; the prompt by the head on its last hidden state."""
    values = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        hidden = inner(model).body(input_ids=torch.tensor([prompt])).last_hidden_state[:, -1]
        row = [inner(model).head(hidden).item()]
        for end in range(1, len(response) + 1):
            ids = torch.tensor([prompt + response[:end]])
            mask = torch.tensor([[0] * len(prompt) + [1] * end])
            row.append(model(input_ids=ids, response_mask=mask).item())
        values.append(row)
    return values


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("input_skip", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_it_equals_every_cut_response_scored_by_itself(any_lm, pooling, input_skip, lora):
    model = build(any_lm, pooling, input_skip, lora)
    inputs = batch()
    values_RS = model(**inputs, token_level=True)
    P, expected = 5, slow_values(model)
    assert values_RS.dtype == torch.float32 and values_RS.shape == inputs["input_ids"].shape
    for row, values in enumerate(expected):
        end = P + len(RESPONSES[row])
        torch.testing.assert_close(values_RS[row, P - 1 : end], torch.tensor(values), atol=1e-5, rtol=0)
        assert values_RS[row, : P - 1].abs().max() == 0 and values_RS[row, end:].abs().sum() == 0
    values_RT1, mask_RT1 = prefix_columns(values_RS, inputs["response_mask"])
    assert torch.equal(values_RT1, values_RS[:, P - 1 :]) and mask_RT1.sum(1).tolist() == [5, 3, 2]
    lengths = torch.tensor([len(r) for r in RESPONSES])
    torch.testing.assert_close(values_RT1[torch.arange(3), lengths], model(**inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_right_padded_prompts_and_another_pad_change_nothing(tiny_lm, pooling):
    model = build(tiny_lm, pooling, input_skip=True)
    inputs = batch()
    expected, mask = prefix_columns(model(**inputs, token_level=True), inputs["response_mask"])
    other = batch(pad=2)
    embedded = {"inputs_embeds": model.embed(other["input_ids"])} | {k: v for k, v in other.items() if k[0] != "i"}
    again, _ = prefix_columns(model(**embedded, token_level=True), other["response_mask"])
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
    rows = [p + r + [0] * (9 - len(p) - len(r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    lengths = [(len(p), len(r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    response = [[0] * p + [1] * r + [0] * (9 - p - r) for p, r in lengths]
    attention = [[1] * (p + r) + [0] * (9 - p - r) for p, r in lengths]
    ids, attention, response = map(torch.tensor, (rows, attention, response))
    again, again_mask = prefix_columns(model(ids, attention, response_mask=response, token_level=True), response)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
    assert torch.equal(again_mask, mask)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_reaches_what_trains_and_a_prefix_does_not_depend_on_what_follows(tiny_lm, pooling, lora):
    model = build(tiny_lm, pooling, input_skip=True, lora=lora).train()
    inputs = batch()
    model(**inputs, token_level=True).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name
    table = inner(model).get_input_embeddings()
    u = table(inputs["input_ids"]).detach().requires_grad_(True)
    masks = {k: v for k, v in inputs.items() if k != "input_ids"}
    values = model(inputs_embeds=u, **masks, token_level=True)
    (gradient,) = torch.autograd.grad(values[0, 6], u)  # the first row's second response token
    assert gradient[0, 7:].abs().max() == 0 and (gradient[0, :7].abs().sum(-1) > 0).all() and gradient[1:].eq(0).all()


def test_under_autocast_the_values_are_float32_and_close(tiny_lm):
    model = build(tiny_lm, "mean", input_skip=True)
    expected = model(**batch(), token_level=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = model(**batch(), token_level=True)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=0.1, rtol=0.1)


def test_pools_by_hand():
    """Tokens 1, 2, 4, 8 with the first left out: last 8, mean (2 + 4 + 8) / 3, running means 2, 3, 14/3."""
    hidden, mask = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]), torch.tensor([[0, 1, 1, 1]])
    assert pool_last(hidden, mask).tolist() == [[8.0]]
    assert pool_mean(hidden, mask).item() == pytest.approx(14 / 3)
    running = running_mean(hidden[..., 0], mask)
    torch.testing.assert_close(running, torch.tensor([[0.0, 2.0, 3.0, 14 / 3]]))
    assert prompt_end(mask).tolist() == [[True, False, False, False]]
    assert prompt_end(torch.tensor([[1, 1], [0, 0]])).tolist() == [[False, False], [False, False]]
    assert running_mean(torch.tensor([[torch.nan, 3.0]]), torch.tensor([[0, 1]])).tolist() == [[0.0, 3.0]]


def test_faults_are_named(tiny_lm):
    model = build(tiny_lm, "last", input_skip=False)
    ids = torch.tensor([[5, 6], [7, 8]])
    with pytest.raises(ModelError, match="pass response_mask"):
        model(ids, token_level=True)
    with pytest.raises(ModelError, match="row 1 has no token to score"):
        model(ids, response_mask=torch.tensor([[0, 1], [0, 0]]), token_level=True)
    with pytest.raises(ModelError, match="row 1 starts with its response"):
        model(ids, response_mask=torch.tensor([[0, 1], [1, 1]]), token_level=True)

"""The cached forward equals the uncached one, and the prefix is never changed."""

from __future__ import annotations

import pytest
import torch

from vgf_llm.models.prefix import compute_prefix, forward_with_prefix, positions_from_mask

PROMPTS = [[5, 6, 7, 8, 9], [10, 11]]


def uncached(body, prompt, response):
    return body(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0, len(prompt) :]


def test_cached_equals_uncached_for_unequal_prompts_and_responses(any_lm):
    body = any_lm.base_model
    responses = [[[12, 13, 14], [15, 2]], [[16, 17], [18, 19, 2]]]
    prefix = compute_prefix(body, PROMPTS, pad_token_id=0)
    assert prefix.num_prompts == 2 and prefix.lengths_B.tolist() == [5, 2]
    rows = [r for group in responses for r in group]
    tokens = torch.tensor([r + [0] * (3 - len(r)) for r in rows])
    mask = torch.tensor([[True] * len(r) + [False] * (3 - len(r)) for r in rows])
    embeds = body.get_input_embeddings()(tokens)
    hidden = forward_with_prefix(body, prefix.expand(2), embeds, mask)
    for index, response in enumerate(rows):
        expected = uncached(body, PROMPTS[index // 2], response)
        torch.testing.assert_close(hidden[index, : len(response)], expected, atol=1e-5, rtol=1e-5)


def test_forward_and_cache_leave_the_prefix_alone(any_lm):
    body = any_lm.base_model
    prefix = compute_prefix(body, PROMPTS, pad_token_id=0)
    before = [t.clone() for t in (*prefix.keys, *prefix.values)]
    embeds = body.get_input_embeddings()(torch.tensor([[12, 13], [14, 15]]))
    mask = torch.ones(2, 2, dtype=torch.bool)
    first = forward_with_prefix(body, prefix, embeds, mask)
    cache = prefix.cache()
    body(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    cache.reset()
    torch.testing.assert_close(forward_with_prefix(body, prefix, embeds, mask), first, atol=0, rtol=0)
    for old, new in zip(before, (*prefix.keys, *prefix.values), strict=True):
        assert torch.equal(old, new)


def test_gradients_reach_the_responses_only_where_attended(any_lm):
    body = any_lm.base_model
    prefix = compute_prefix(body.train(), PROMPTS, pad_token_id=0)
    assert body.training and not any(k.requires_grad for k in prefix.keys)
    body.eval().requires_grad_(False)
    embeds = body.get_input_embeddings()(torch.tensor([[12, 13, 0], [14, 15, 16]])).requires_grad_(True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    hidden = forward_with_prefix(body, prefix, embeds, mask)
    (hidden * mask[..., None]).pow(3).sum().backward()
    assert embeds.grad[0, 2].abs().max() == 0
    assert embeds.grad[0, :2].abs().min(dim=-1).values.max() > 0


def test_padding_id_does_not_matter(any_lm):
    body = any_lm.base_model
    one, other = (compute_prefix(body, PROMPTS, pad_token_id=pad) for pad in (0, 30))
    for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all()


def test_select_orders_and_repeats_rows(tiny_lm):
    prefix = compute_prefix(tiny_lm.base_model, PROMPTS, pad_token_id=0)
    rows = prefix.select(torch.tensor([1, 0, 1]))
    assert rows.lengths_B.tolist() == [2, 5, 2]
    assert torch.equal(rows.keys[0][0], prefix.keys[0][1])
    assert prefix.expand(2).lengths_B.tolist() == [5, 5, 2, 2]


def test_positions_ignore_the_padding_side():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_empty_prompts_and_mismatched_rows_are_refused(tiny_lm):
    body = tiny_lm.base_model
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        compute_prefix(body, [[5], []], pad_token_id=0)
    with pytest.raises(ValueError, match="no prompts"):
        compute_prefix(body, [], pad_token_id=0)
    prefix = compute_prefix(body, PROMPTS, pad_token_id=0)
    with pytest.raises(ValueError, match="prefix has 2 rows, embeddings 4"):
        forward_with_prefix(body, prefix, torch.zeros(4, 3, 32), torch.ones(4, 3))

"""Grouped attention against transformers' own, and the cache that grows in place."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vgf_llm.models.attention import NAME, group_attention, grouped_attention
from vgf_llm.models.prefix import compute_prefix


class Layer(torch.nn.Module):
    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("length", [1, 4])
def test_it_is_the_same_sum(length):
    """Two key-value heads for six query heads, ten cached positions, the first two of one row padded."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, length, 8), torch.randn(3, 2, 10, 8), torch.randn(3, 2, 10, 8)
    mask = torch.ones(3, 1, length, 10, dtype=torch.bool).tril(10 - length)
    mask[0, :, :, :2] = False
    ours, _ = grouped_attention(Layer(), query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(Layer(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


def test_no_mask_and_no_groups_are_left_to_transformers():
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    single = Layer()
    single.num_key_value_groups = 1
    ours, _ = grouped_attention(single, query, key, value, None)
    theirs, _ = sdpa_attention_forward(single, query, key, value, None)
    assert torch.equal(ours, theirs)


def test_a_model_with_groups_is_switched_and_answers_the_same(tiny_lm, tiny_neox):
    ids = torch.tensor([[0, 1, 10, 11, 12], [1, 20, 21, 22, 23]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        before = tiny_lm(ids, attention_mask=mask).logits
        assert group_attention(tiny_lm).config._attn_implementation == NAME
        after = tiny_lm(ids, attention_mask=mask).logits
    torch.testing.assert_close(before[0, 1:], after[0, 1:])
    torch.testing.assert_close(before[1], after[1])
    assert group_attention(tiny_neox).config._attn_implementation != NAME


def test_a_cache_grows_beyond_its_room_and_leaves_the_prefix_alone(tiny_lm):
    """100 tokens one by one, more than a cache has room for at first, against one uncached forward."""
    prompt, text = [1, 20, 21], torch.randint(3, 60, (1, 100))
    prefix = compute_prefix(tiny_lm.base_model, [prompt], 0)
    keys, cache, hidden = [key.clone() for key in prefix.keys], prefix.cache(), []
    with torch.no_grad():
        for position in range(100):
            output = tiny_lm.base_model(text[:, position : position + 1], past_key_values=cache, use_cache=True)
            hidden.append(output.last_hidden_state)
        whole = tiny_lm.base_model(torch.cat([torch.tensor([prompt]), text], 1)).last_hidden_state[:, 3:]
    torch.testing.assert_close(torch.cat(hidden, 1), whole, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before, after) for before, after in zip(keys, prefix.keys, strict=True))

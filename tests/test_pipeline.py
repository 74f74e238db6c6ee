"""Decoders by name, with options that are told apart."""

from typing import get_args

import pytest

from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from vgf_llm.errors import ConfigError
from vgf_llm.pipeline import make_decoder
from vgf_llm.settings import DecoderName, SamplingSettings
from vgf_llm.text import BlockDecoder, PivotDecoder, PriorDecoder, Reference


@pytest.fixture(scope="module")
def parts():
    model = build_llama()
    return Reference(model, SamplingSettings(), (2,), 0), RewardModel.from_base(model, num_layers=1).freeze()


@pytest.mark.parametrize("name", get_args(DecoderName))
def test_every_decoder_is_made_by_name_without_options(parts, name):
    decoder = make_decoder(name, *parts)
    assert type(decoder).__name__.lower() == name.replace("_", "") + "decoder"


def test_options_reach_their_decoder(parts):
    block = make_decoder("block", *parts, {"block_tokens": 3})
    assert isinstance(block, BlockDecoder) and block.block_tokens == 3
    pivot = make_decoder("pivot", *parts, {"tilted_tokens": 2})
    assert isinstance(pivot, PivotDecoder) and pivot.tilted_tokens == 2
    prior = make_decoder("prior", *parts, {"coupling": "maximal", "multiplier": "token"})
    assert isinstance(prior, PriorDecoder)
    assert (prior.options.coupling, prior.options.multiplier, prior.options.after_change) == (
        "maximal",
        "token",
        "keep",
    )


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("prior", "multiplier, coupling, after_change"),
        ("block", "block_tokens"),
        ("edit_greedy", "proposals, checked"),
        ("edit", "none"),
        ("nearest", "none"),
    ],
)
def test_an_unknown_option_is_named_beside_those_that_there_are(parts, name, known):
    message = f"decoder_options: the decoder '{name}' has no option 'wings'; it has {known}$"
    with pytest.raises(ConfigError, match=message):
        make_decoder(name, *parts, {"wings": 2})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("prior", {"coupling": "tight"}, "decoder_options: coupling must be gumbel or maximal, got 'tight'"),
        ("block", {"block_tokens": 0}, "decoder_options: block_tokens must be at least 1, got 0"),
        ("pivot", {"tilted_tokens": 0}, "decoder_options: tilted_tokens must be at least 1, got 0"),
        ("edit_greedy", {"proposals": 2, "checked": 3}, r"decoder_options: checked must be from 1 to proposals \(2\)"),
    ],
)
def test_a_value_out_of_range_is_named(parts, name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_decoder(name, *parts, options)

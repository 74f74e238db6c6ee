"""What commands load: the gradient that a reward model's folder offers, and decoders by name."""

import dataclasses

import pytest
import torch

import vgf_llm.answering.pipeline
import vgf_llm.evaluation.runner
from reward_models.loading import save_reward_model
from reward_models.modelling import RewardModel
from reward_models.secant import SecantHead, save_secant_head, stated_fidelity
from vgf_llm.answering.answer import answer
from vgf_llm.answering.pipeline import Pipeline, encode_prompts, load_gradient
from vgf_llm.data.dialogue import PromptText
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.errors import ConfigError, DataError, ModelError
from vgf_llm.evaluation.settings import EvaluateSettings
from vgf_llm.settings import AnswerSettings, ModelSettings, SamplingSettings
from vgf_llm.text import EditGreedyDecoder, PivotDecoder, TorchReference
from vgf_llm.text.decoders.make import make_decoder
from vgf_llm.text.particles import exact_gradient


@pytest.fixture
def value(tiny_lm):
    return RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean", input_skip=True).freeze()


def test_a_folder_without_a_head_gives_the_exact_gradient(value, tmp_path):
    save_reward_model(value, tmp_path)
    assert load_gradient(tmp_path, value) is exact_gradient
    assert stated_fidelity(tmp_path) == {}


def test_a_folder_with_a_head_gives_the_head_and_its_cost(value, tmp_path):
    """One forward pass of the value, and the head's own share of it."""
    save_reward_model(value, tmp_path)
    measured = {"spearman": 0.9, "low": 0.8, "high": 1.0, "top8_gain": 0.9, "best8_gain": 1.0}
    save_secant_head(SecantHead(32, hidden=8), tmp_path, fidelity={"before": {}, "after": measured})
    gradient = load_gradient(tmp_path, value)
    head = 8 * 4 * 32 + 8 + 32 * 8 + 32
    body = sum(parameter.numel() for parameter in value.body.layers.parameters())
    assert gradient.passes == pytest.approx(1 + head / body)
    assert stated_fidelity(tmp_path) == {"secant head": measured}


def test_a_head_of_another_model_is_refused(value, tmp_path):
    save_reward_model(value, tmp_path)
    save_secant_head(SecantHead(32), tmp_path)
    with torch.no_grad():
        value.skip_head.weight.add_(1.0)
    save_reward_model(value, tmp_path)
    with pytest.raises(ModelError, match="fitted to other weights"):
        load_gradient(tmp_path, value)


def test_decoder_options_reach_the_decoder_and_unknown_ones_are_named(tiny_lm, value):
    reference = TorchReference(tiny_lm, SamplingSettings(top_k=8), (2,), 0)
    greedy = make_decoder("edit_greedy", reference, value, {"proposals": 4, "checked": 2})
    assert isinstance(greedy, EditGreedyDecoder) and (greedy.proposals, greedy.checked) == (4, 2)
    assert isinstance(make_decoder("pivot", reference, value), PivotDecoder)
    with pytest.raises(ConfigError, match="'edit' has no option 'proposals'; it has none"):
        make_decoder("edit", reference, value, {"proposals": 4})
    with pytest.raises(ConfigError, match="checked must be from 1 to proposals"):
        make_decoder("edit_greedy", reference, value, {"checked": 9})


class ClosedPipeline(Pipeline):
    closed = 0

    def close(self):
        ClosedPipeline.closed += 1


@pytest.fixture
def loaded(tiny_lm, tiny_tokenizer, value, monkeypatch):
    """A pipeline that is found in place of a loaded one; no prompt is short enough for its model."""
    reference = TorchReference(tiny_lm, SamplingSettings(max_new_tokens=10_000), (2, 5), 0)
    pipeline = ClosedPipeline(reference, value, tiny_tokenizer, exact_gradient)
    for module in (vgf_llm.answering.pipeline, vgf_llm.evaluation.runner):
        monkeypatch.setattr(module, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(ClosedPipeline, "closed", 0)
    return pipeline


def test_a_prompt_that_does_not_fit_closes_the_engine(loaded, tmp_path):
    with pytest.raises(DataError, match="prompt 0: .* exceed the model's"):
        list(answer(AnswerSettings(), ModelSettings(), loaded.reference.sampling, ["red"]))
    assert ClosedPipeline.closed == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\n")
    settings = EvaluateSettings(prompts=str(prompts), gold="length_words")
    with pytest.raises(DataError, match="prompt 0: .* exceed the model's"):
        list(
            vgf_llm.evaluation.runner.work(
                settings, ModelSettings(), loaded.reference.sampling, [PromptText("red")], set()
            )
        )
    assert ClosedPipeline.closed == 2


def test_an_engine_keeps_a_position_free(loaded):
    model = loaded.reference.model
    limit = model.config.max_position_embeddings
    reference = TorchReference(model, SamplingSettings(max_new_tokens=limit - 3), (2,), 0)
    full = dataclasses.replace(loaded, reference=reference)
    assert len(encode_prompts(full, ["red"])[0]) == 3
    reference.reserved_positions = EngineReference.reserved_positions
    with pytest.raises(DataError, match=f"{limit} positions less the 1 that an engine needs to read"):
        encode_prompts(full, ["red"])

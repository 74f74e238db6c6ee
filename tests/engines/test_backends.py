"""Backends by name, and what is refused before one starts anything slow."""

from typing import get_args

import pytest
import torch

import vgf_llm.engines.vllm_backend
from vgf_llm.engines.backends import backend_named
from vgf_llm.engines.transformers_backend import TransformersBackend
from vgf_llm.engines.vllm_backend import VLLMBackend
from vgf_llm.errors import ConfigError
from vgf_llm.models.base import LoadedBase
from vgf_llm.settings import BackendName, EngineSettings, ModelSettings, SamplingSettings

SETTINGS = EngineSettings(max_sequences=3)


class Stub:
    """An engine that does nothing but close."""

    name, closed = "stub", False

    def close(self):
        self.closed = True


def test_every_name_has_a_backend():
    made = {name: backend_named(name, SETTINGS) for name in get_args(BackendName)}
    assert isinstance(made["transformers"], TransformersBackend)
    assert isinstance(made["vllm"], VLLMBackend) and made["vllm"].settings is SETTINGS


def test_a_distribution_that_an_engine_cannot_report_is_refused_before_it_is_started(
    tiny_lm, tiny_tokenizer, monkeypatch
):
    started, base, table_VD = [], LoadedBase(tiny_lm, tiny_tokenizer), torch.zeros(4, 2)
    monkeypatch.setattr(vgf_llm.engines.vllm_backend, "start_engine", lambda *args: started.append(args) or Stub())
    backend = VLLMBackend(SETTINGS)
    with pytest.raises(ConfigError, match="top_k must be at least 1 with backend vllm"):
        backend.start(base, ModelSettings(), SamplingSettings(top_k=0), table_VD)
    assert started == []
    reference = backend.start(base, ModelSettings(), SamplingSettings(top_k=5), table_VD)
    assert len(started) == 1 and reference.pad_id == base.pad_id and reference.eos_ids == base.eos_ids
    reference.close()
    assert reference.engine.closed


def test_a_reference_in_this_process_has_nothing_to_close(tiny_lm, tiny_tokenizer):
    base = LoadedBase(tiny_lm, tiny_tokenizer)
    reference = TransformersBackend().start(base, ModelSettings(), SamplingSettings(), torch.zeros(4, 2))
    reference.close()
    assert reference.model is tiny_lm and reference.vocabulary == base.vocabulary

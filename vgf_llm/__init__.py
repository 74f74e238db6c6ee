"""Value Gradient Flow for language models: a transport budget between best-of-N and free optimisation.

Particles sampled from a reference model are moved along the gradient of a value for a limited budget, decoded
back to tokens and selected (Xu, Hu, Sojoudi, Zhang, ICLR 2026, arXiv 2604.14265).
The names here import nothing heavy; ``vgf_llm.flow`` needs torch only, ``vgf_llm.text`` torch and transformers.
"""

from vgf_llm.errors import ConfigError, DataError, ModelError, NonFiniteError, OutputError, VGFError

__version__ = "0.1.0"

__all__ = ["ConfigError", "DataError", "ModelError", "NonFiniteError", "OutputError", "VGFError", "__version__"]

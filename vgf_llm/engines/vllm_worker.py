"""What vLLM's workers do when a whole model is pushed to them: their ``worker_extension_cls``, called by its name.

vLLM reloads weights from a folder by itself. On a CPU it also keeps a packed copy of every matrix that a linear layer
multiplies by, and where the output layer is tied to the embeddings that copy is not packed again: the model would
read new embeddings and write with the old ones. This packs it.
"""

from __future__ import annotations

from typing import Any


class FolderWorker:
    """Adds one method to vLLM's worker."""

    model_runner: Any

    def load_folder(self, folder: str) -> None:
        """Replace all weights by those of a folder of safetensors, under their names in transformers."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

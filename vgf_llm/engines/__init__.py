"""vLLM as the model that writes: in this process, in another, or behind a URL."""

"""Language models as they are found: loading, what an architecture does, adapters, attention, prompts cached."""

"""The policy: base model, value, flow and decoder put together once, and asked by every command."""

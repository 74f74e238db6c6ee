"""Tokens and particles: the prompt prefix, embedding, decoders and the implicit policy."""

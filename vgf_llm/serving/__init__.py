"""Serving: OpenAI's interface in front of one engine and one value, with a transport budget per request.

Data goes one way: body -> ``schema`` (types) -> ``request`` (defaults, limits, tokens) -> ``admission`` (a place) ->
``service`` (sample, transport, decode, select) -> ``answers`` (OpenAI's bodies). ``supervisor`` watches the engine,
``app`` holds the routes. Nothing here is imported by other packages; the command is :mod:`vgf_llm.serve`.
"""

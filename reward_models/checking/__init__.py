"""Checks of any reward model: how it reads a conversation, what its scores are worth, what its gradient says.

`subject` (loads anything that scores and scores with it as its own library does), `reading` (padding, BOS, template,
closing, position), `quality` (figures on pairs), `gradient` (fidelity and precision), `line` (one result), `examples`
(built-in pairs). The command is `reward_models.check`.
"""

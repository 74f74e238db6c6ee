"""Directions that need no original: a bonus for every token, known from the text before it alone.

`table` (rewards of tokens in contexts), `constant` (ridge regression on exact changes) and `causal` (a head on the
reference's own hidden state) are fitted and read; `reward` (anything that scores), `positions` (responses with what
stands before their tokens), `targets` (what is fitted to), `regrown` (changes that count the suffix), `agreement`
(fidelity to the true reward) and `saving` are shared. `ground` loads, `fitting` fits and `measuring` measures. Each
kind is a `vgf_llm.text.bonus.BonusSource`.
"""

"""Continuous control: offline and offline-to-online reinforcement learning on the same flow as the text half.

Data goes actions -> a clone of the behaviour -> particles at a state -> moved along the critic's gradient
(`vgf_llm.flow`) -> TD target in training, one selected action at test time. Nothing else is the policy.

    losses.py, targets.py    the formulas, torch only
    networks.py, agent.py    clone, twin critics, gradient network; one update, and acting under a budget
    data.py, loaders.py      transitions, what is refused; OGBench, D4RL and Minari files
    envs.py, episodes.py     environments by name; several budgets in one pass
    collect.py, oracles.py   data in OGBench's format from scripted behaviour
    train.py, report.py      the commands; report joins seeds, with intervals and a figure

Dimension letters here: B states, N particles of a state, A action and O observation coordinates, C critics, H hidden.
"""

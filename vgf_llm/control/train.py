"""Trains an agent on a data set and evaluates it under several budgets.

    python -m vgf_llm.control.train --config recipes/control/cube_single_cpu.yaml --seed 0 --output_dir outputs/cube/0
    python -m vgf_llm.control.train --config ... --resume                        goes on, bit for bit
    python -m vgf_llm.control.train --config ... --only_evaluate --test_steps '[1, 2]'   other budgets, no training

The folder holds checkpoints that are whole or absent, metrics.jsonl, evaluations.jsonl (a line an arm, with the
returns of all episodes) and the figure of score against budget. Seeds are joined by `vgf_llm.control.report`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import load_libraries, working
from vgf_llm.console.screen import emit, say
from vgf_llm.control.inputs import check_names, check_options
from vgf_llm.control.settings import AgentSettings, DataSettings, TrainSettings
from vgf_llm.errors import ConfigError
from vgf_llm.machine.device import resolve_device
from vgf_llm.runs.checkpoint import newest_whole
from vgf_llm.runs.files import check_writable, write_json_atomic
from vgf_llm.runs.manifest import check_identity, verify
from vgf_llm.runs.resume import check_resume, refuse_new_run
from vgf_llm.settings.parse import dump, parse

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class ScriptSettings:
    """What the command does."""

    only_evaluate: bool = False
    """Evaluate the newest checkpoint of output_dir under test_steps and test_step_sizes, without training."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the last line of standard output is JSON with the final score of each arm."""
    script, settings, data, agent = parse(
        ScriptSettings,
        TrainSettings,
        DataSettings,
        AgentSettings,
        argv=argv,
        prog="vgf-llm control-train",
        description="Offline and offline-to-online reinforcement learning by Value Gradient Flow.",
    )
    check_names(settings, data)
    check_resume(settings.resume, settings.output_dir)
    with library_output(settings.output_dir):
        rows = run(settings, data, agent, only_evaluate=script.only_evaluate)
    emit(json.dumps({row["arm"]: row["score"] for row in rows}))
    return 0


def run(
    settings: TrainSettings, data: DataSettings, agent: AgentSettings, only_evaluate: bool = False
) -> list[dict[str, Any]]:
    """Train, evaluate and save.

    Returns:
        The rows of the last evaluation, one an arm; empty without an environment.

    Raises:
        VGFError: An option, a data file, a checkpoint or the output folder does not fit.
    """
    check_resume(settings.resume, settings.output_dir)
    if not only_evaluate:
        refuse_new_run(settings.resume, settings.output_dir)
    folder = check_writable(settings.output_dir)
    checkpoint = _starting_point(settings, folder, only_evaluate)
    check_options(settings, data, agent)
    load_libraries("vgf_llm.control.trainer")
    with working("loading the data and building the agent"):
        trainer = _build(settings, data, agent)
    start = 0
    if checkpoint is not None:
        from vgf_llm.control.agent_checkpoint import restore
        from vgf_llm.runs.going_on import make_way

        manifest = verify(checkpoint)
        start = manifest.step
        if start > settings.total_steps:
            raise ConfigError(f"output_dir: {checkpoint.name} lies beyond the {settings.total_steps} steps asked for")
        for change in check_identity(manifest, trainer.identity(manifest.step), settings.allow_changes):
            say(f"allowed change: {change}")
        if not only_evaluate:
            make_way(folder, checkpoint, start, settings.resume, first=True)
        restore(checkpoint, trainer.agent, trainer.buffer)
        say(_what_follows(checkpoint, start == settings.total_steps, only_evaluate))
    if only_evaluate:
        evaluated: list[dict[str, Any]] = trainer.evaluate(start)
        return evaluated
    write_json_atomic(folder / CONFIG_NAME, dump(settings, data, agent))
    rows: list[dict[str, Any]] = trainer.run(start)
    if rows:
        from vgf_llm.control.report import write_figure

        write_figure([folder])
    return rows


def _starting_point(settings: TrainSettings, folder: Path, only_evaluate: bool) -> Path | None:
    """Return the checkpoint that the run continues from, or evaluates; None for a new run.

    Raises:
        ConfigError: There is none to evaluate.
    """
    if isinstance(settings.resume, str):
        return Path(settings.resume)
    if not (settings.resume or only_evaluate):
        return None
    checkpoint = newest_whole(folder)
    if checkpoint is None and only_evaluate:
        raise ConfigError(f"output_dir: '{folder}' holds no whole checkpoint to evaluate")
    if checkpoint is None and settings.resume:
        say(f"'{folder}' holds no whole checkpoint: starting anew")
    return checkpoint


def _what_follows(checkpoint: Path, finished: bool, only_evaluate: bool) -> str:
    if only_evaluate:
        return f"evaluating '{checkpoint}'"
    if finished:
        return f"'{checkpoint}' is of the last step: nothing is left to train; ask for more steps to go on"
    return f"going on from '{checkpoint}'"


def _build(settings: TrainSettings, data: DataSettings, agent_settings: AgentSettings) -> Any:
    """Load the data and put the parts of a run together."""
    import torch

    from vgf_llm.control.agent import ControlAgent
    from vgf_llm.control.data import Buffer
    from vgf_llm.control.envs import bounds_of, make_env
    from vgf_llm.control.episodes import Evaluator
    from vgf_llm.control.loaders import load
    from vgf_llm.control.online import OnlineEpisodes
    from vgf_llm.control.trainer import Trainer

    device = resolve_device(settings.device)
    env = bounds = None
    if data.env is not None:
        env = make_env(data.env)
        bounds = bounds_of(env, data.env)
    transitions = load(data.data, data.env, env, bounds)
    say(
        f"{len(transitions)} transitions of {int(transitions.ends.sum())} episodes, environment {data.env or 'none'}, "
        f"{device}, seed {settings.seed}, writing to '{settings.output_dir}'",
    )
    digest = transitions.digest()
    transitions, scale = transitions.with_rewards(data.reward_shift, data.normalise_returns)
    if env is not None and bounds is not None:
        _check_sizes(data, env, transitions)
    torch.manual_seed(settings.seed)
    agent = ControlAgent(agent_settings, transitions.observations.shape[1], transitions.actions.shape[1])
    if data.normalise_observations:
        agent.normalise_observations(*transitions.observation_moments())
    evaluator = online = None
    if data.env is not None and bounds is not None:
        name = data.env
        evaluator = Evaluator(lambda: make_env(name), bounds, settings.eval_episodes, settings.seed)
        if settings.online_steps:
            shift = data.reward_shift
            online = OnlineEpisodes(lambda: make_env(name), bounds, settings, lambda r: (r + shift) * scale)
    return Trainer(
        settings,
        data,
        agent.prepare(device, settings.compile),
        Buffer(transitions, settings.online_steps, device),
        evaluator,
        online,
        lambda step: _identity(settings, data, agent_settings, digest, step),
        device,
    )


def _check_sizes(data: DataSettings, env: Any, transitions: Any) -> None:
    for what, space, values in (
        ("observations", env.observation_space, transitions.observations),
        ("actions", env.action_space, transitions.actions),
    ):
        if tuple(space.shape) != values.shape[1:]:
            raise ConfigError(
                f"env: '{data.env}' has {what} of shape {tuple(space.shape)}, the data of {values.shape[1:]}"
            )


def _identity(
    settings: TrainSettings, data: DataSettings, agent: AgentSettings, digest: str, step: int
) -> dict[str, Any]:
    """What must not change between a checkpoint at a step and the run that goes on from it.

    More steps may be asked for, but not of the offline phase once the online one has begun.
    """
    begun = step > settings.clone_steps + settings.offline_steps
    online = {key: getattr(settings, key) for key in ("offline_steps", "online_warmup", "online_flow_steps")}
    return {
        "agent": dataclasses.asdict(agent),
        "data": {
            "env": data.env,
            "sha256": digest,
            "reward_shift": data.reward_shift,
            "normalise_returns": data.normalise_returns,
            "normalise_observations": data.normalise_observations,
        },
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "clone_steps": settings.clone_steps,
        "cached_samples": settings.cached_samples,
        "online": online if begun else {},
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

"""``vgf-llm <command>``: hands over to a command's own ``main`` and turns every error into a message and an exit code.

0: done. 2: the input is at fault; the message says what to mend. 130: stopped with Ctrl-C. A command's module is
imported only when it is called, so that help answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from vgf_llm import __version__
from vgf_llm.distributed.processes import in_process_group, leave_process_group
from vgf_llm.errors import VGFError

COMMANDS = {
    "demo": ("vgf_llm.demo", "train a reward model, transport, decode and compare, on a small real model (minutes)"),
    "reward": ("reward_models.train", "train a reward model on preference pairs"),
    "value": ("reward_models.train_value", "train a token-level value from logged responses and their rewards"),
    "secant": ("reward_models.train_secant", "fit a head whose direction predicts what token changes do to a reward"),
    "direction": ("reward_models.train_direction", "fit a bonus for every token that needs no original, to any reward"),
    "train": ("vgf_llm.train", "fine-tune a model on transported responses"),
    "verify-resume": ("vgf_llm.verify_resume", "resume a checkpoint twice and compare the results bit for bit"),
    "generate": ("vgf_llm.generate", "answer prompts under a transport budget"),
    "serve": ("vgf_llm.serve", "serve an OpenAI-compatible interface with a transport budget per request"),
    "transport": ("vgf_llm.transport", "write transported responses as datasets for SFT and DPO training"),
    "evaluate": ("vgf_llm.evaluate", "compare budgets with best-of-N and controls"),
    "reward-check": ("reward_models.check", "check any reward model: how it reads, its scores, its gradient"),
    "import-reward": ("reward_models.import_reward", "give a classifier or adapter of others a card and a secant head"),
    "export-reward": ("reward_models.export_reward", "write a reward model as a classifier of transformers"),
    "control-collect": ("vgf_llm.control.collect", "record episodes of a control task as data"),
    "control-train": ("vgf_llm.control.train", "train and evaluate an agent on control data"),
    "control-report": ("vgf_llm.control.report", "join the seeds of a control task"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command and its arguments; None takes those of the process.

    Returns:
        Exit code: 0 done, 2 a fault in the input, 130 stopped with Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"vgf-llm {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"vgf-llm: unknown command '{command}'; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:  # "module:function" of the current folder is found, as under `python -m`
        sys.path.append(os.getcwd())
    return run_main(importlib.import_module(COMMANDS[command][0]).main, rest)


def run_main(command_main: Callable[[list[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main`` and turn what stops it into a message on standard error and an exit code.

    A module ends in ``if __name__ == "__main__": sys.exit(run_main(main))``.

    Args:
        command_main: takes the arguments (None: those of the process) and returns an exit code.
        argv: the arguments.

    Returns:
        The command's code; 2 after a VGFError; 130 after Ctrl-C.
    """
    found_group = in_process_group()  # of an engine in this process, say, which outlives the command
    try:
        code = command_main(None if argv is None else list(argv)) or 0
        if not found_group:
            leave_process_group()
        return code
    except VGFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stopped with Ctrl-C; whatever rows and checkpoints were written so far are whole and stay in the output"
            " folder; where a run can go on, its --help names --resume",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader (head, less) has left; leave as quietly as other tools do
        sys.stderr.close()
        return 141


def _usage() -> str:
    commands = "\n".join(f"  {name:<15}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: vgf-llm <command> [--config recipe.yaml] [--key value ...]\n\n"
        "Value Gradient Flow for language models: move sampled responses along a reward's gradient within a budget.\n\n"
        f"commands:\n{commands}\n\n"
        "vgf-llm <command> --help lists a command's keys; --version prints the version."
    )


if __name__ == "__main__":
    sys.exit(main())

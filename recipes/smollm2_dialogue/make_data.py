"""Split a file of Anthropic HH dialogues for this recipe: pairs of two reward models and prompts that neither has seen.

    python -m recipes.smollm2_dialogue.make_data --source FILE

Dialogues are split by their first human turn (case and spacing aside), so that no conversation is in two files:
prompts first, then part A (the reward model that drives the flow) and part B (the held-out scorer), each with pairs for
validation. Within parts A and B every pair of a first turn stays together. Prompts are written as Human/Assistant text,
which a reward function then sees whole. What is dropped is counted and printed. The data contains offensive text; the
files stay in ``--output`` and are never part of this repository.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgf_llm.cli import run_main
from vgf_llm.data.dialogue import as_messages, as_text
from vgf_llm.data.prompts import PreferencePair, encode_prompt, load_preferences
from vgf_llm.errors import DataError
from vgf_llm.models.loading import load_tokenizer
from vgf_llm.runs.files import check_writable, write_text_atomic

OUTPUT = Path("outputs/smollm2_dialogue/data")
SEED = 20260414
MAX_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class Sizes:
    """How many first turns go where: prompts by count, pairs for validation by share of a part's first turns."""

    validation_prompts: int = 30
    test_prompts: int = 80
    validation_share: float = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Write the six files and print what was dropped; returns 0.

    Raises:
        DataError: the source is missing, has no dialogues in it, or holds too few of them.
        OutputError: the output folder cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", required=True, help="dialogues with columns chosen and rejected (.jsonl, .jsonl.gz)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the files")
    parser.add_argument("--max_prompt_tokens", type=int, default=MAX_PROMPT_TOKENS, help="longer prompts are dropped")
    arguments = parser.parse_args(argv)
    output = check_writable(arguments.output)
    pairs, dropped = read_pairs(arguments.source, load_tokenizer(), arguments.max_prompt_tokens)
    files, unused = split(pairs)
    dropped["in a dialogue whose prompt is one of prompts_*.jsonl"] = unused
    for name, rows in files.items():
        write_text_atomic(output / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    print(f"{arguments.source}: {len(pairs)} pairs kept; not in a file of pairs: {counts or 'none'}", file=sys.stderr)
    print(json.dumps({name: len(rows) for name, rows in files.items()}))
    return 0


def read_pairs(source: str, tokenizer: Any, max_prompt_tokens: int) -> tuple[list[PreferencePair], dict[str, int]]:
    """Read the pairs that can be used.

    Args:
        source: as for ``load_preferences``, the prompt is what both dialogues share.
        tokenizer: of the base model; prompts are measured as it encodes them.
        max_prompt_tokens: longest prompt, chat template included (tokens).

    Returns:
        The pairs in file order, and the count of dropped ones by reason (equal or empty responses, early divergence,
        over length).

    Raises:
        DataError: the source cannot be read, a column is missing, or no pair is left.
    """
    preferences = load_preferences(source)
    kept = [p for p in preferences.pairs if len(encode_prompt(tokenizer, p.prompt)) <= max_prompt_tokens]
    if not kept:
        raise DataError(
            f"{source}: all {len(preferences.pairs)} prompts are longer than {max_prompt_tokens} tokens; raise "
            "--max_prompt_tokens"
        )
    over_length = len(preferences.pairs) - len(kept)
    return kept, preferences.dropped | {f"with a prompt over {max_prompt_tokens} tokens": over_length}


def first_turn(pair: PreferencePair) -> str:
    """Return what a dialogue is split by: its first human turn, lower case, runs of white space as one space."""
    turns = [turn["content"] for turn in as_messages(pair.prompt) if turn["role"] == "user"]
    return " ".join((turns[0] if turns else as_text(pair.prompt)).lower().split())


def split(
    pairs: Sequence[PreferencePair], sizes: Sizes | None = None, seed: int = SEED
) -> tuple[dict[str, list[dict[str, str]]], int]:
    """Cut pairs into the recipe's files; a first turn is in one file only.

    Args:
        pairs: usable pairs.
        sizes: of the files; None: the recipe's.
        seed: of the order of first turns.

    Returns:
        Rows by file name, and the number of pairs that are in no file of pairs, as their dialogue is a prompt.

    Raises:
        DataError: too few first turns for the sizes.
    """
    sizes = sizes or Sizes()
    by_turn: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_turn.setdefault(first_turn(pair), []).append(pair)
    turns = sorted(by_turn)
    random.Random(seed).shuffle(turns)
    num_prompts = sizes.validation_prompts + sizes.test_prompts
    half = (len(turns) - num_prompts) // 2
    held = max(1, round(sizes.validation_share * half))
    if half <= held:
        raise DataError(
            f"{len(turns)} different first turns are too few: {num_prompts} become prompts, and both models need "
            "pairs for training and validation; give a larger file, or raise --max_prompt_tokens"
        )
    prompts, part_a, part_b = turns[:num_prompts], turns[num_prompts : num_prompts + half], turns[num_prompts + half :]
    files = {
        "preferences_reward.jsonl": _pairs(by_turn, part_a[held:]),
        "preferences_reward_validation.jsonl": _pairs(by_turn, part_a[:held]),
        "preferences_held_out.jsonl": _pairs(by_turn, part_b[held:]),
        "preferences_held_out_validation.jsonl": _pairs(by_turn, part_b[:held]),
        "prompts_validation.jsonl": _prompts(by_turn, prompts[: sizes.validation_prompts]),
        "prompts_test.jsonl": _prompts(by_turn, prompts[sizes.validation_prompts :]),
    }
    return files, sum(len(by_turn[turn]) for turn in prompts)


def _pairs(by_turn: dict[str, list[PreferencePair]], turns: list[str]) -> list[dict[str, str]]:
    return [
        {"prompt": as_text(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}
        for turn in turns
        for pair in by_turn[turn]
    ]


def _prompts(by_turn: dict[str, list[PreferencePair]], turns: list[str]) -> list[dict[str, str]]:
    """One prompt a first turn: that of its first pair."""
    return [{"prompt": as_text(by_turn[turn][0].prompt)} for turn in turns]


if __name__ == "__main__":
    sys.exit(run_main(main))

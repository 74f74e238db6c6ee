"""Make preference pairs that a list of good words cannot tell apart, from the sentiment recipe's samples.

    python -m recipes.smollm2_context.make_data

``relevance``  a text written to the prompt against one written to another prompt of the same form. Every text is chosen
               as often as it is rejected, so no word is good by itself.
``order``      a text against the same text with its words shuffled: both have the same words.

Texts are base model samples from ``recipes/smollm2_sentiment/data/preferences_*.jsonl``; splits are that recipe's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vgf_llm.runs.files import check_writable, read_jsonl, write_text_atomic

SOURCE = Path("recipes/smollm2_sentiment/data")
OUTPUT = Path("outputs/smollm2_context/data")
SEED, TEXTS_PER_PROMPT = 20260414, 8
Rows = list[dict[str, str]]


def texts_by_prompt(path: Path, rng: random.Random) -> dict[str, list[str]]:
    """Return up to ``TEXTS_PER_PROMPT`` distinct texts to each prompt of a file of pairs."""
    found: dict[str, set[str]] = {}
    for row in read_jsonl(path):
        found.setdefault(str(row["prompt"]), set()).update((str(row["chosen"]), str(row["rejected"])))
    return {
        prompt: rng.sample(sorted(texts), min(TEXTS_PER_PROMPT, len(texts))) for prompt, texts in sorted(found.items())
    }


def relevance_pairs(texts: dict[str, list[str]], rng: random.Random) -> Rows:
    """Pair each text with one of the same rank that was written to another prompt of the same form."""
    forms: dict[str, list[str]] = {}
    for prompt in texts:
        forms.setdefault(" ".join(prompt.split()[:3]), []).append(prompt)
    rows: Rows = []
    for prompts in forms.values():
        if len(prompts) < 2:
            continue
        for rank in range(TEXTS_PER_PROMPT):
            having = [prompt for prompt in prompts if rank < len(texts[prompt])]
            shift = rng.randrange(1, len(having)) if len(having) > 1 else 0
            for place, prompt in enumerate(having if shift else []):
                other = having[(place + shift) % len(having)]
                rows.append({"prompt": prompt, "chosen": texts[prompt][rank], "rejected": texts[other][rank]})
    rng.shuffle(rows)
    return rows


def order_pairs(texts: dict[str, list[str]], rng: random.Random) -> Rows:
    """Pair each text with its own words in another order."""
    rows: Rows = []
    for prompt, own in texts.items():
        for text in own:
            words = re.split(r"\s+", text.strip())
            shuffled = rng.sample(words, len(words))
            if shuffled != words:
                rows.append({"prompt": prompt, "chosen": text, "rejected": " ".join(shuffled)})
    rng.shuffle(rows)
    return rows


TASKS = {"relevance": relevance_pairs, "order": order_pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``<task>_train.jsonl`` and ``<task>_validation.jsonl`` for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder with preferences_*.jsonl")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the data files")
    arguments = parser.parse_args(argv)
    check_writable(str(arguments.output))
    for task, pairs in TASKS.items():
        for split in ("train", "validation"):
            rng = random.Random(SEED)
            rows = pairs(texts_by_prompt(arguments.source / f"preferences_{split}.jsonl", rng), rng)
            path = arguments.output / f"{task}_{split}.jsonl"
            write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(f"{path}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make this recipe's data: small additions with their sums, in three files whose problems are disjoint.

    python -m recipes.arithmetic.make_data

Every pair of numbers from 1 to 12 stands in both orders, and both are in the same file. The pairs are shuffled by a
fixed seed and cut, so that no test problem was trained on in either order.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from vgf_llm.console.screen import say
from vgf_llm.runs.files import check_writable, write_text_atomic

HERE = Path(__file__).parent
LARGEST, SEED = 12, 20260414
PAIRS = {"train": 52, "validation": 6, "test": 20}


def make_problems() -> dict[str, list[dict[str, str]]]:
    """Return rows of ``prompt`` and ``answer`` by split."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(a, LARGEST + 1)]
    random.Random(SEED).shuffle(pairs)
    splits, start = {}, 0
    for name, size in PAIRS.items():
        orders = [order for a, b in pairs[start : start + size] for order in dict.fromkeys([(a, b), (b, a)])]
        splits[name] = [
            {"prompt": f"What is {a} + {b}? Answer with the number alone.", "answer": str(a + b)} for a, b in orders
        ]
        start += size
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(HERE / "data"), help="folder of the files")
    output = check_writable(parser.parse_args(argv).output)
    for name, rows in make_problems().items():
        write_text_atomic(output / f"problems_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        say(f"{output / f'problems_{name}.jsonl'}: {len(rows)} problems")


if __name__ == "__main__":
    main()

"""Make this recipe's data with the project's own means: prompts, samples of the base model, preference pairs.

    python -m recipes.smollm2_sentiment.make_data

Topics are shuffled once and cut into disjoint train, validation and test prompts. The embedded base model writes a few
responses to every train and validation prompt; the VADER lexicon labels them; pairs whose labels differ by at least
``MIN_MARGIN`` become preferences. Test prompts are never sampled here. Samples are appended prompt by prompt, so a
killed run goes on where it stopped; once all is made, each finished file replaces its old one whole.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from reward_models.functions import vader_compound
from vgf_llm.console.progress import track
from vgf_llm.data.prompts import encode_prompt
from vgf_llm.models.loading import eos_token_ids, load_causal_lm, load_tokenizer
from vgf_llm.runs.files import append_jsonl, check_writable, read_jsonl, write_text_atomic
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.sampler import ReferenceSampler

HERE = Path(__file__).parent
TEMPLATES = (
    "Write one sentence about {}.",
    "Describe {} in one sentence.",
    "Tell me something about {} in one sentence.",
    "Write one sentence about how you feel about {}.",
)
NUM_VALIDATION, NUM_TEST = 30, 80
SAMPLES_PER_PROMPT, PAIRS_PER_PROMPT, MIN_MARGIN = 12, 8, 0.15
SEED, PROMPTS_PER_BATCH = 20260414, 4


def make_prompts() -> dict[str, list[str]]:
    """Return the prompts of each split; a topic appears in one split only."""
    topics = [topic.strip() for line in (HERE / "topics.txt").read_text().splitlines() for topic in line.split(";")]
    random.Random(SEED).shuffle(topics)
    prompts = [TEMPLATES[index % len(TEMPLATES)].format(topic) for index, topic in enumerate(topics)]
    test, rest = prompts[:NUM_TEST], prompts[NUM_TEST:]
    return {"test": test, "validation": rest[:NUM_VALIDATION], "train": rest[NUM_VALIDATION:]}


def sample_responses(prompts: list[str], samples_file: Path) -> dict[str, list[str]]:
    """Sample the base model on every prompt that ``samples_file`` does not hold yet; return all samples by prompt."""
    done = {row["prompt"]: row["responses"] for row in read_jsonl(samples_file)} if samples_file.exists() else {}
    todo = [(index, prompt) for index, prompt in enumerate(prompts) if prompt not in done]
    tokenizer, model = load_tokenizer(), load_causal_lm()
    reference = TorchReference(model, SamplingSettings(), eos_token_ids(model, tokenizer), tokenizer.pad_token_id)
    batches = [todo[start : start + PROMPTS_PER_BATCH] for start in range(0, len(todo), PROMPTS_PER_BATCH)]
    for batch in track(batches, f"sampling {samples_file.stem}"):
        seeds_BN = row_seeds(SEED, [index for index, _ in batch], SAMPLES_PER_PROMPT)
        ids = [encode_prompt(tokenizer, prompt) for _, prompt in batch]
        texts = ReferenceSampler(reference).sample(ids, seeds_BN).texts(tokenizer)
        rows = [{"prompt": prompt, "responses": found} for (_, prompt), found in zip(batch, texts, strict=True)]
        append_jsonl(samples_file, rows)
        done |= {row["prompt"]: row["responses"] for row in rows}
    return done


def make_pairs(prompt: str, responses: list[str], rng: random.Random) -> list[dict[str, object]]:
    """Label responses by the lexicon and return up to ``PAIRS_PER_PROMPT`` random pairs that differ enough."""
    texts = sorted({text.strip() for text in responses if text.strip()})
    gold = dict(zip(texts, vader_compound([prompt] * len(texts), texts), strict=True))
    pairs = [(a, b) if gold[a] > gold[b] else (b, a) for a, b in itertools.combinations(texts, 2)]
    pairs = [(a, b) for a, b in pairs if gold[a] - gold[b] >= MIN_MARGIN]
    chosen = rng.sample(pairs, min(PAIRS_PER_PROMPT, len(pairs)))
    return [{"prompt": prompt, "chosen": a, "rejected": b, "margin": round(gold[a] - gold[b], 4)} for a, b in chosen]


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path.name}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> None:
    """Write prompts_*.jsonl and preferences_*.jsonl into ``--output`` (default: this recipe's data folder)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "data", help="folder for the data files")
    parser.add_argument("--work", type=Path, default=Path("outputs/smollm2_sentiment_data"), help="folder for samples")
    arguments = parser.parse_args(argv)
    check_writable(arguments.output)
    check_writable(arguments.work)
    splits = make_prompts()
    files: dict[str, list[dict[str, object]]] = {
        f"prompts_{split}.jsonl": [{"prompt": prompt} for prompt in prompts] for split, prompts in splits.items()
    }
    for split in ("validation", "train"):
        samples = sample_responses(splits[split], arguments.work / f"samples_{split}.jsonl")
        rng = random.Random(SEED)
        files[f"preferences_{split}.jsonl"] = [
            pair for prompt in splits[split] for pair in make_pairs(prompt, samples[prompt], rng)
        ]
    for name, rows in files.items():
        write_rows(arguments.output / name, rows)


if __name__ == "__main__":
    main()

"""Checks of the value behind the scores: gradient fidelity, scores in bfloat16, and our reading of a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reward_models.assess import pad_responses
from reward_models.checking.line import Line, Verdict, judged, skipped
from reward_models.checking.subject import Subject, ends_of, response_ids
from reward_models.fidelity import gradient_fidelity, score_gradient
from vgf_llm.data.endings import padding_id
from vgf_llm.data.prompts import PreferencePair

_RESPONSES, _SUBSTITUTIONS, _CANDIDATES = 6, 24, 8
_LEAST_FIDELITY = 0.1
_MOST_FLIPS = 0.1  # of the pairs


def _encoded(subject: Subject, pairs: Sequence[PreferencePair]) -> tuple[list[list[int]], Tensor, Tensor]:
    assert subject.value is not None
    triples = [response_ids(subject, pair) for pair in pairs]
    pad_id = padding_id(subject.tokenizer, len(subject.value.embedding_table_VD))
    tokens_BNT, mask_BNT = pad_responses([[chosen, rejected] for _, chosen, rejected in triples], pad_id)
    device = subject.value.device
    return [prompt for prompt, _, _ in triples], tokens_BNT.to(device), mask_BNT.to(device)


@torch.no_grad()
def check_read_here(subject: Subject, pairs: Sequence[PreferencePair], native: Tensor, unit: float) -> Line:
    """Compare the value that moves responses with the model's own scores of the rendered conversations.

    Args:
        subject: A decoder.
        pairs: The first few.
        native: Its own scores of all chosen, then of all rejected responses of these pairs.
        unit: Standard deviation of scores.
    """
    if subject.value is None:
        return skipped("read here", subject.why_no_value)
    prompts, tokens_BNT, mask_BNT = _encoded(subject, pairs)
    found_BN = subject.value.score(subject.value.prefix(prompts), tokens_BNT, mask_BNT).double().cpu()
    apart = float((torch.cat([found_BN[:, 0], found_BN[:, 1]]) - native).abs().max()) / unit
    advice = (
        "prompt and response apart have other tokens than the conversation that the template writes; look at what "
        "the template does with the answer (it may strip or change it)"
    )
    value = f"largest difference {apart:.2g} standard deviations"
    return judged("read here", value, "at most 0.01", "pass" if apart <= 0.01 else "fail", advice)


def check_gradient(subject: Subject, pairs: Sequence[PreferencePair], seed: int = 0) -> Line:
    """Measure how well the input gradient ranks one-token changes; candidates are tokens of the responses."""
    value = subject.value
    if value is None:
        return skipped("gradient", subject.why_no_value)
    prompts, tokens_BNT, mask_BNT = _encoded(subject, pairs[:_RESPONSES])
    tokens_BNT, mask_BNT = tokens_BNT[:, :1], mask_BNT[:, :1]
    _, gradient_BNTD = score_gradient(value, value.prefix(prompts), mask_BNT)(value.embed(tokens_BNT).detach())
    if not torch.isfinite(gradient_BNTD).all() or not gradient_BNTD.any():
        seen = "NaN or infinite" if not torch.isfinite(gradient_BNTD).all() else "zero everywhere"
        return Line(
            "gradient", seen, "finite and not zero", "fail", "the value cannot move responses; look at its head"
        )
    pool = tokens_BNT[mask_BNT].unique()
    pool = pool[~torch.isin(pool, torch.tensor(ends_of(subject), device=pool.device))]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(pool), (*tokens_BNT.shape, _CANDIDATES), generator=generator).to(pool.device)
    try:
        found = gradient_fidelity(
            value,
            prompts,
            tokens_BNT,
            mask_BNT,
            pool[picks],
            substitutions=_SUBSTITUTIONS,
            seed=seed,
            eos_ids=ends_of(subject),
        )
    except ValueError:
        return Line("gradient", "no token changes the score", "", "fail", "the score does not read the response")
    seen = f"Spearman {found.spearman:.2f} (95% {found.low:.2f} to {found.high:.2f}, {found.n} responses)"
    advice = (
        "the gradient hardly predicts what a token change does: fit a secant head (`vgf-llm secant --base gradient`)"
    )
    return judged(
        "gradient",
        seen,
        f"at least {_LEAST_FIDELITY:g}",
        "pass" if found.spearman >= _LEAST_FIDELITY else "warn",
        advice,
    )


def check_dtype(subject: Subject, pairs: Sequence[PreferencePair], unit: float) -> Line:
    """Score pairs in bfloat16; leaves the subject in bfloat16, so that it has to be the last check."""
    rows = subject.rows(pairs)
    before = subject.scores(rows)
    network = subject.model if subject.value is None else subject.value.body
    network.to(torch.bfloat16)
    if subject.kind == "decoder" and hasattr(subject.model, "score"):
        subject.model.score.to(torch.bfloat16)
    after = subject.scores(rows)
    if not torch.isfinite(after).all():
        return Line("dtype", "NaN or infinite in bfloat16", "finite", "fail", "run it with --dtype float32")
    apart = float((after - before).abs().max()) / unit
    half = len(pairs)
    flips = float(((before[:half] > before[half:]) != (after[:half] > after[half:])).double().mean())
    value = f"bfloat16 moves scores by up to {apart:.2g} standard deviations and swaps {flips:.0%} of the pairs"
    verdict: Verdict = "warn" if flips > _MOST_FLIPS or apart > 0.5 else "pass"
    return judged("dtype", value, f"0.5 and {_MOST_FLIPS:.0%}", verdict, "run it with --dtype float32")

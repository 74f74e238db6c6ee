"""Proof that an engine runs the weights that are trained: both are asked about the same tokens.

    d = mean_t | log p_engine(y_t | x, y_<t) - log p_trainer(y_t | x, y_<t) |

over the tokens of a few responses that the engine has just sampled, untruncated and at temperature 1. The engine's
side came with the tokens; the trainer's is one forward. Two implementations of one model differ by rounding, so d has a
bound by the coarser of the two dtypes; weights that were never pushed, an adapter that was not loaded, keys cached
under older weights or a server of another model are beyond it. In bfloat16 a single small step is not: rounding hides
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vgf_llm.engines.engine import EngineRequest, EngineText
from vgf_llm.errors import SyncError
from vgf_llm.text.responses import Responses
from vgf_llm.training.batch import policy_rows
from vgf_llm.training.policy_models import response_logps

SYNC_BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # nats per token
_ROWS = 4  # responses that are looked at


@torch.no_grad()
def sync_distance(
    model: nn.Module, requests: Sequence[EngineRequest], texts: Sequence[EngineText], pad_id: int
) -> tuple[float, int]:
    """Return d in nats per token, and the number of tokens it is the mean of.

    Args:
        model: A causal language model, the trainer's.
        requests: What the engine was asked for, at least one.
        texts: What it wrote, with log-probabilities.
        pad_id: For padding.
    """
    chosen = range(0, len(texts), max(1, len(texts) // _ROWS))[:_ROWS]
    device = next(model.parameters()).device
    length = max(len(texts[row].tokens) for row in chosen)
    tokens_RT = torch.full((len(chosen), length), pad_id, device=device)
    mask_RT, engine_RT = torch.zeros_like(tokens_RT, dtype=torch.bool), torch.zeros((len(chosen), length))
    for place, row in enumerate(chosen):
        here = slice(0, len(texts[row].tokens))
        written = texts[row].written
        if written is None:
            raise ValueError("sync_distance needs texts with log-probabilities of what was written")
        tokens_RT[place, here], mask_RT[place, here] = torch.tensor(texts[row].tokens, device=device), True
        engine_RT[place, here] = written.own_T
    responses = Responses(
        [requests[row].prompt for row in chosen], tokens_RT.unsqueeze(1), mask_RT.unsqueeze(1), (), pad_id
    )
    rows = policy_rows(responses, torch.ones_like(mask_RT[:, :1]))
    logps_RT = response_logps(model, **rows.policy_inputs)
    apart_RT: Tensor = (logps_RT - engine_RT.to(device)).abs()
    return float(apart_RT[mask_RT].mean()), int(mask_RT.sum())


def sync_bound(model: nn.Module, engine_dtype: str) -> float:
    """Return the bound on d, nats per token, of a model compared with an engine in some dtype."""
    mine = next(model.parameters()).dtype
    return max(SYNC_BOUNDS[mine], SYNC_BOUNDS[getattr(torch, engine_dtype)])


def require_sync(distance: float, tokens: int, bound: float, step: int, engine: str, dtype: str) -> None:
    """Stop a run whose engine writes under other weights than those that are trained.

    Raises:
        SyncError: d is above the bound, or not a number.
    """
    if distance <= bound:
        return
    raise SyncError(
        f"step {step}: the log-probabilities of {tokens} tokens that the {engine} wrote are {distance:.4g} nats "
        f"from the trainer's in the mean, bound {bound:g} (sync_check): it does not run the weights that are trained, "
        f"and nothing was learned from these tokens. A server must serve this base model in {dtype}, to this run "
        "alone; go on from the last checkpoint with resume: true"
    )

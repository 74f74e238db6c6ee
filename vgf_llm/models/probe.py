"""Runs a loaded model on a few ids, to see whether its hidden states mean what flow and decoders need."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from vgf_llm.models.architecture import (
    check_structure,
    decoder_of,
    difference,
    evaluating,
    input_table,
    is_whole,
    refusal,
    text_config,
    tolerance,
)
from vgf_llm.models.prefix import compute_prefix, forward_with_prefix, positions_from_mask


@torch.no_grad()
def check_decoder(model: PreTrainedModel, name: str) -> None:
    """Refuse a loaded model whose hidden states do not mean what flow and decoders need.

    Two short rows are run as ids, as embeddings, and continued from the keys and values of a prompt. A model whose
    weights are not all here is not run.

    Args:
        model: A causal language model or its decoder, with its weights.
        name: What the user calls the model.

    Raises:
        ModelError: Naming the architecture and what differed.
    """
    check_structure(model, name)
    if not is_whole(model):
        return
    decoder, text = decoder_of(model), text_config(model.config)
    device = next(decoder.parameters()).device
    prompts, response_T = _probe_ids(input_table(decoder).shape[0])
    longest = max(map(len, prompts))
    pads, total = [longest - len(p) for p in prompts], longest + len(response_T)
    ids_RS = torch.tensor([[0] * pad + p + response_T for pad, p in zip(pads, prompts, strict=True)], device=device)
    mask_RS = torch.tensor([[0] * pad + [1] * (total - pad) for pad in pads], device=device)
    shared = {"attention_mask": mask_RS, "position_ids": positions_from_mask(mask_RS), "use_cache": False}
    try:
        with evaluating(decoder):
            whole_RSD = decoder(input_ids=ids_RS, **shared).last_hidden_state
            u_RSD = decoder.get_input_embeddings()(ids_RS)
            embedded_RSD = decoder(inputs_embeds=u_RSD, **shared).last_hidden_state
            off_RSD = decoder(inputs_embeds=(u_RSD + u_RSD.flip(1)) / 2, **shared).last_hidden_state
            prefix = compute_prefix(decoder, prompts, 0)
            continued_RTD = forward_with_prefix(decoder, prefix, u_RSD[:, longest:], mask_RS[:, longest:])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise refusal(text, name, f"it does not run from embeddings and a prompt's keys ({first_line})") from error
    if not torch.isfinite(whole_RSD[mask_RS.bool()]).all():
        return  # what broken weights give is not a matter of the architecture
    if difference(embedded_RSD[mask_RS.bool()], whole_RSD[mask_RS.bool()]) > tolerance(whole_RSD):
        raise refusal(text, name, "token ids and the embeddings of these ids give other hidden states")
    if difference(continued_RTD, whole_RSD[:, longest:]) > tolerance(whole_RSD):
        raise refusal(text, name, "a text continued from its prompt's keys and values is not the whole text")
    if torch.equal(off_RSD, embedded_RSD):
        raise refusal(text, name, "its hidden states do not depend on the embeddings that it is given")


def _probe_ids(rows: int) -> tuple[list[list[int]], list[int]]:
    """Return two prompts of 3 and 5 tokens and a response of 3, ids that are spread over the table."""
    ids = [1 + (index * max(1, (rows - 2) // 11)) % max(1, rows - 1) for index in range(11)]
    return [ids[:3], ids[3:8]], ids[8:]

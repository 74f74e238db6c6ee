"""The reference in this process: a frozen causal language model and the distribution of its responses.

It answers three questions and does nothing else: which logits stand before each token of given responses (one parallel
forward), how probable those responses are, and what it writes when somebody else chooses the token at each step.
Prompts are run once and shared by all of their responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from vgf_llm.models.architecture import decoder_of, vocabulary_rows
from vgf_llm.models.hidden import hidden_shown
from vgf_llm.models.prefix import PromptPrefix, compute_prefix
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.distribution import Shortlist, truncate
from vgf_llm.text.responses import Responses, is_any_of, mask_after_eos

ChooseToken = Callable[[Tensor, int], Tensor]
"""(logits_RV, position) -> token_R: picks the next token of every row."""

ChooseNextToken = Callable[[Tensor, Tensor], Tensor]
"""(logits_RV, position_R) -> token_R: picks the next token of rows that stand at different positions."""

_LOGITS_PER_FORWARD = 2**25  # numbers that a parallel forward may return at once: 28 rows of 24 tokens at V = 49152


@dataclass(frozen=True)
class TorchPrefix:
    """Prompts as the reference needs them: all but their last token as keys and values, and that token.

    Attributes:
        prefix: Keys and values of each prompt without its last token.
        last_token_B: int64, the token whose logits are those of the first response token.
        prompts: The prompts' ids.
    """

    prefix: PromptPrefix
    last_token_B: Tensor
    prompts: list[list[int]]

    def select(self, rows_R: Tensor) -> TorchPrefix:
        """Pick prompts by index (int64); they may repeat."""
        prompts = [self.prompts[row] for row in rows_R.tolist()]
        return TorchPrefix(self.prefix.select(rows_R), self.last_token_B[rows_R], prompts)


class TorchReference:
    """A frozen base model of transformers under a sampling distribution; see :class:`vgf_llm.text.protocols.Reference`.

    Args:
        model: Causal language model; only read.
        sampling: Temperature, truncation and length.
        eos_ids: Every id that ends a response.
        pad_id: Id for padding, which is told by masks; it may be one of ``eos_ids``.
        vocabulary: Tokens of the tokenizer; rows of the model's table from there on are padding of the table and have
            probability 0. None: every row is a token.

    Attributes:
        reserved_positions: Of the model's positions, those that no text may take.
    """

    reserved_positions = 0

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: SamplingSettings,
        eos_ids: Sequence[int],
        pad_id: int,
        vocabulary: int | None = None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.vocabulary = vocabulary
        self._last_prefix: TorchPrefix | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    def close(self) -> None:
        """Nothing runs outside this process; see :class:`vgf_llm.text.protocols.Reference`."""

    def prefix(self, prompts: list[list[int]]) -> TorchPrefix:
        """Run B prompts once; asked for the same prompts again, as sampler and decoder do, it gives the same prefix."""
        if self._last_prefix is None or self._last_prefix.prompts != prompts:
            last_token_B = torch.tensor([prompt[-1] for prompt in prompts], device=self.device)
            prefix = compute_prefix(decoder_of(self.model), prompts, self.pad_id)
            self._last_prefix = TorchPrefix(prefix.without_last(), last_token_B, prompts)
        return self._last_prefix

    def shortlists(
        self, prefix: TorchPrefix, responses: Responses, sampling: SamplingSettings | None = None
    ) -> Shortlist:
        """Return the distribution at every position of the responses, with the response's own token on the list.

        Args:
            prefix: The prompts of ``responses``.
            responses: N responses to each of the B prompts.
            sampling: Another distribution than the reference's own, for instance a wider top-k.

        Returns:
            A shortlist of shape [B*N, T, K + 1].
        """
        sampling = sampling or self.sampling
        ids, logps = [], []
        for logits_RTV, tokens_RT, mask_RT in self._forwards(prefix, responses):
            logits_RTV = logits_RTV[..., : self.vocabulary]
            own_RT = tokens_RT.masked_fill(~mask_RT, -1)
            shortlist = truncate(logits_RTV, sampling).including(own_RT, logits_RTV, sampling.temperature)
            ids.append(shortlist.ids)
            logps.append(shortlist.logps)
        return Shortlist(torch.cat(ids), torch.cat(logps))

    def logps(self, prefix: TorchPrefix, responses: Responses) -> Tensor:
        """Return the log-probability of every token under the untruncated model at temperature 1, [B, N, T].

        Padding is 0.
        """
        parts = []
        for logits_RTV, tokens_RT, mask_RT in self._forwards(prefix, responses):
            own_RT = logits_RTV.float().gather(-1, tokens_RT.unsqueeze(-1)).squeeze(-1)
            parts.append((own_RT - logits_RTV.float().logsumexp(-1)).masked_fill(~mask_RT, 0))
        return torch.cat(parts).view(responses.tokens_BNT.shape)

    @torch.no_grad()
    def _forwards(self, prefix: TorchPrefix, responses: Responses) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (logits_RTV, tokens_RT, mask_RT) for a few rows at a time: R*T*V numbers never stand together."""
        n = responses.tokens_BNT.shape[1]
        tokens_RT, mask_RT = responses.tokens_BNT.flatten(0, 1), responses.mask_BNT.flatten(0, 1)
        last_R = prefix.last_token_B.repeat_interleave(n)
        at_once = max(1, _LOGITS_PER_FORWARD // (tokens_RT.shape[1] * vocabulary_rows(self.model.config)))
        for rows in torch.arange(len(tokens_RT), device=tokens_RT.device).split(at_once):
            prompts = prefix.prefix.select(rows // n)
            inputs_RT = torch.cat([last_R[rows].unsqueeze(1), tokens_RT[rows, :-1]], 1)
            positions_T = torch.arange(inputs_RT.shape[1], device=inputs_RT.device)
            real_RT = torch.cat([torch.ones_like(mask_RT[rows, :1]), mask_RT[rows, :-1]], 1)
            logits_RTV = self.model(
                input_ids=inputs_RT,
                attention_mask=torch.cat([prompts.mask_BP, real_RT], 1).long(),
                position_ids=prompts.lengths_B.unsqueeze(1) + positions_T,
                past_key_values=prompts.cache(),
                use_cache=True,
            ).logits
            yield logits_RTV, tokens_RT[rows], mask_RT[rows]

    @torch.no_grad()
    def write(self, prefix: TorchPrefix, num_particles: int, choose: ChooseToken) -> Responses:
        """Write responses token by token; ``choose`` picks each token from the reference's logits.

        Args:
            prefix: B prompts.
            num_particles: N responses per prompt; rows are ordered ``b * N + n``.
            choose: Maps (logits_RV, position) to the next token of every row.

        Returns:
            Responses of at most ``sampling.max_new_tokens`` tokens, ended by the first EOS.
        """
        rows_R = torch.arange(len(prefix.prompts), device=self.device).repeat_interleave(num_particles)
        tokens_RT, _ = self.extend(prefix.select(rows_R), range(self.sampling.max_new_tokens), choose)
        mask_RT = mask_after_eos(tokens_RT, self.eos_ids)
        shape = (-1, num_particles, tokens_RT.shape[1])
        tokens_RT = tokens_RT.masked_fill(~mask_RT, self.pad_id)
        return Responses(prefix.prompts, tokens_RT.view(shape), mask_RT.view(shape), self.eos_ids, self.pad_id)

    @torch.no_grad()
    def extend(
        self, rows: TorchPrefix, positions: range, choose: ChooseToken, done_R: Tensor | None = None
    ) -> tuple[Tensor, TorchPrefix]:
        """Write more tokens after rows; stops early where all have ended.

        Args:
            rows: R texts, a prompt and what has been written after it; left as they are.
            positions: Places in the response that the tokens go to.
            choose: Maps (logits_RV, position) to the next token of every row. One with a ``see_hidden`` is shown what
                the output layer reads [R, D] before each call.
            done_R: bool, rows that have ended before; none when not given.

        Returns:
            The tokens [R, at most len(positions)], padding after an EOS, and the rows with them.
        """
        cache, mask_RS, token_R = rows.prefix.cache(), rows.prefix.mask_BP.long(), rows.last_token_B
        done_R = torch.zeros_like(token_R, dtype=torch.bool) if done_R is None else done_R
        lengths_R = rows.prefix.lengths_B
        written: list[Tensor] = []
        with hidden_shown(self.model, _last_hidden(choose)):
            for position in positions:
                mask_RS = torch.cat([mask_RS, _column(token_R)], 1)
                logits_RV = self.model(
                    input_ids=token_R.unsqueeze(1),
                    attention_mask=mask_RS,
                    position_ids=(lengths_R + len(written)).unsqueeze(1),
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1, : self.vocabulary]
                token_R = choose(logits_RV, position).masked_fill(done_R, self.pad_id)
                written.append(token_R)
                done_R = done_R | is_any_of(token_R, self.eos_ids)
                if bool(done_R.all()):
                    break
        prefix = PromptPrefix.of(cache, mask_RS.bool())
        return torch.stack(written, 1), TorchPrefix(prefix, token_R, rows.prompts)

    @torch.no_grad()
    def rewrite(self, prefix: TorchPrefix, responses: Responses, keep_BN: Tensor, choose: ChooseNextToken) -> Responses:
        """Keep the first tokens of each response and write the rest anew.

        One parallel forward over what is kept, then one token at a time. In between, the rows are moved to the right
        end of the cache, as prompts are: sliding windows and alibi count columns, masked ones too.

        Args:
            prefix: The prompts of ``responses``.
            responses: B x N responses.
            keep_BN: int64, tokens kept of each, from 0 to its length - 1.
            choose: Maps (logits_RV, position_R) to the next token of every row, where ``position_R`` is the place in
                the response that the token goes to.

        Returns:
            Responses of at most ``sampling.max_new_tokens`` tokens, ended by the first EOS.
        """
        n, longest = responses.tokens_BNT.shape[1], self.sampling.max_new_tokens
        keep_R, tokens_RT = keep_BN.flatten(), responses.tokens_BNT.flatten(0, 1)
        kept = int(keep_R.max())
        rows = prefix.prefix.expand(n)
        cache = rows.cache()
        inputs_RT = torch.cat([prefix.last_token_B.repeat_interleave(n).unsqueeze(1), tokens_RT[:, :kept]], 1)
        columns_T = torch.arange(kept + 1, device=keep_R.device)
        mask_RS = torch.cat([rows.mask_BP, columns_T <= keep_R.unsqueeze(1)], 1).long()
        logits_RTV = self.model(
            input_ids=inputs_RT,
            attention_mask=mask_RS,
            position_ids=rows.lengths_B.unsqueeze(1) + columns_T,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.arange(int(keep_R.min()), kept + 1, device=keep_R.device),
        ).logits
        logits_RV = logits_RTV[torch.arange(len(keep_R), device=keep_R.device), keep_R - keep_R.min()]
        logits_RV = logits_RV[:, : self.vocabulary]
        result_RT = torch.nn.functional.pad(tokens_RT[:, :kept], (0, longest - kept), value=self.pad_id)
        result_RT = result_RT.masked_fill(
            torch.arange(longest, device=keep_R.device) >= keep_R.unsqueeze(1), self.pad_id
        )
        cache, mask_RS = _right_aligned(cache, mask_RS, kept - keep_R)
        position_R, done_R = keep_R.clone(), torch.zeros_like(keep_R, dtype=torch.bool)
        while True:
            token_R = choose(logits_RV, position_R).masked_fill(done_R, self.pad_id)
            where_R = position_R.clamp(max=longest - 1).unsqueeze(1)
            result_RT.scatter_(
                1, where_R, torch.where(done_R.unsqueeze(1), result_RT.gather(1, where_R), token_R[:, None])
            )
            position_R = position_R + 1
            done_R = done_R | is_any_of(token_R, self.eos_ids) | (position_R >= longest)
            if bool(done_R.all()):
                break
            mask_RS = torch.cat([mask_RS, _column(token_R)], 1)
            logits_RV = self.model(
                input_ids=token_R.unsqueeze(1),
                attention_mask=mask_RS,
                position_ids=(rows.lengths_B + position_R).unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1, : self.vocabulary]
        mask_RT = mask_after_eos(result_RT, self.eos_ids)
        shape = (-1, n, longest)
        result_RT = result_RT.masked_fill(~mask_RT, self.pad_id)
        return Responses(prefix.prompts, result_RT.view(shape), mask_RT.view(shape), self.eos_ids, self.pad_id)


def _last_hidden(choose: Any) -> Callable[[Tensor], None] | None:
    """Return what shows a picker the hidden states [R, D] of the last position; None where it has no ``see_hidden``."""
    see = getattr(choose, "see_hidden", None)
    return None if see is None else lambda hidden_RTD: see(hidden_RTD[:, -1])


def _right_aligned(cache: DynamicCache, mask_RS: Tensor, gaps_R: Tensor) -> tuple[DynamicCache, Tensor]:
    """Move each row's tokens right by the masked columns that stand at its end."""
    if not bool(gaps_R.any()):
        return cache, mask_RS
    aligned = PromptPrefix.of(cache, mask_RS.bool()).rolled(gaps_R)
    return aligned.cache(), aligned.mask_BP.long()


def _column(token_R: Tensor) -> Tensor:
    return torch.ones_like(token_R).unsqueeze(1)

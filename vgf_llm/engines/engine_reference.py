"""The reference when an engine runs it: the same questions as :class:`vgf_llm.text.Reference`, answered by requests.

Decoders ask a reference for distributions and likelihoods of given texts and let it write with a picker. Here the first
two are requests for the log-probabilities of a prompt, and writing hands the picker's plans to the engine, which picks
by the same functions (:mod:`vgf_llm.text.choosing`). The picker then follows what was picked with the distributions
that came back, so its state (nats spent, distributions met) is what it would be here, and an engine that did not do as
planned is noticed.

Prompts and what is kept of a response are found in the engine's prefix cache; reading a text for its likelihoods is not
(vLLM has no log-probabilities of tokens that it does not run).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vgf_llm.engines.engine import Engine, EngineError, EngineRequest, EngineText, TopLogps, reported
from vgf_llm.errors import ConfigError
from vgf_llm.models.architecture import vocabulary_rows
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.choosing import TokenPicker
from vgf_llm.text.distribution import Shortlist, normalised
from vgf_llm.text.responses import Responses

MOST_SPARE = 8  # rows of a table's padding that may be among the most probable of an engine's list
_STRAYS = 0.01  # tokens picked otherwise than planned that rounding may explain: a near tie in a hundred


@dataclass(frozen=True)
class EnginePrefix:
    """R texts as an engine needs them: a prompt and what has been written after it.

    Attributes:
        prompts: The prompts' ids.
        written: Response tokens so far, one list a text.
    """

    prompts: list[list[int]]
    written: list[list[int]]

    def select(self, rows_R: Tensor) -> EnginePrefix:
        """Pick texts by index (int64); they may repeat."""
        rows = rows_R.tolist()
        return EnginePrefix([self.prompts[row] for row in rows], [self.written[row] for row in rows])


def check_truncated(sampling: SamplingSettings) -> None:
    """Refuse a distribution that an engine cannot report: it lists some tokens per place, not all of them.

    To be called before an engine is started, which takes minutes; :class:`EngineReference` calls it too.

    Raises:
        ConfigError: If ``top_k`` is 0.
    """
    if not sampling.top_k:
        raise ConfigError(
            "top_k must be at least 1 with backend vllm, got 0: an engine reports the top k of a distribution"
        )


class EngineReference:
    """A frozen base model in an engine, under a sampling distribution.

    Args:
        engine: Runs the model.
        model: The model's shape, without weights that anyone reads (:func:`vgf_llm.models.loading.load_skeleton`).
        sampling: Temperature, truncation and length.
        eos_ids: Every id that ends a response.
        pad_id: Id for padding, which is told by masks; it may be one of ``eos_ids``.
        device: Where responses and distributions are to live: the value's device.
        adapter: LoRA that the model is to answer with, by what the engine knows it as.
        stop: Strings that end what is written; a text keeps the token that completes one. Read by what writes a
            response from its start (sampling, the decoder ``prior``), where the engine sees all of it.
        vocabulary: As for :class:`vgf_llm.text.TorchReference`.

    Attributes:
        reserved_positions: Of the model's positions, those that no text may take: one, as an engine that reads a text
            writes a token after it.

    Raises:
        ConfigError: If the distribution is not truncated (:func:`check_truncated`).
    """

    reserved_positions = 1

    def __init__(
        self,
        engine: Engine,
        model: PreTrainedModel,
        sampling: SamplingSettings,
        eos_ids: Sequence[int],
        pad_id: int,
        device: torch.device | str = "cpu",
        adapter: str | None = None,
        stop: Sequence[str] = (),
        vocabulary: int | None = None,
    ) -> None:
        check_truncated(sampling)
        self.engine = engine
        self.model = model
        self.sampling = sampling
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.device = torch.device(device)
        self.adapter = adapter
        self.stop = tuple(stop)
        self.vocabulary = vocabulary

    @property
    def columns(self) -> int:
        """Tokens of a distribution."""
        return self._columns(self.sampling)

    @property
    def barred(self) -> range:
        """Rows of the model's table that are no tokens."""
        rows = vocabulary_rows(self.model.config)
        return range(rows if self.vocabulary is None else self.vocabulary, rows)

    def _columns(self, sampling: SamplingSettings) -> int:
        return min(sampling.top_k, self.vocabulary or vocabulary_rows(self.model.config))

    def _asked(self, columns: int) -> int:
        """Return how many tokens to ask the engine for, so that ``columns`` are left without the table's padding."""
        return columns + min(len(self.barred), MOST_SPARE)

    def _known(self, ids: Tensor, logps: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Return ids and log-probabilities [..., columns] of what is a token, most probable first."""
        if self.vocabulary is None:
            return ids, logps
        stray = ids >= self.vocabulary
        order = stray.long().argsort(dim=-1, stable=True)[..., :columns]
        logps = logps.masked_fill(stray, -torch.inf).gather(-1, order)
        return ids.masked_fill(stray, 0).gather(-1, order), logps

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def prefix(self, prompts: list[list[int]]) -> EnginePrefix:
        """Return B prompts with nothing written after them."""
        return EnginePrefix(prompts, [[] for _ in prompts])

    def shortlists(
        self, prefix: EnginePrefix, responses: Responses, sampling: SamplingSettings | None = None
    ) -> Shortlist:
        """Return the distribution at every position, [B*N, T, K + 1]; see :meth:`vgf_llm.text.Reference.shortlists`."""
        sampling = sampling or self.sampling
        columns, length = self._columns(sampling), responses.tokens_BNT.shape[-1]
        ids, logps = [], []
        for read, (_, tokens) in zip(
            self._read(prefix, responses, self._asked(columns)), self._texts(prefix, responses), strict=True
        ):
            ids_TK, logps_TK = self._known(read.ids_TK, read.logps_TK, columns)
            distribution = normalised(ids_TK, logps_TK / sampling.temperature, sampling.top_p)
            gap_T = (read.own_T - logps_TK[:, 0]) / sampling.temperature
            distribution = distribution.including_gap(torch.tensor(tokens), gap_T).padded(length)
            ids.append(distribution.ids)
            logps.append(distribution.logps)
        return Shortlist(torch.stack(ids).to(self.device), torch.stack(logps).to(self.device))

    def logps(self, prefix: EnginePrefix, responses: Responses) -> Tensor:
        """Return the log-probability of every token, [B, N, T]; see :meth:`vgf_llm.text.Reference.logps`."""
        length = responses.tokens_BNT.shape[-1]
        rows = [pad(read.own_T, (0, length - len(read.own_T))) for read in self._read(prefix, responses, 0)]
        return torch.stack(rows).view(responses.tokens_BNT.shape).to(self.device)

    def write(self, prefix: EnginePrefix, num_particles: int, choose: TokenPicker) -> Responses:
        """Write N responses per prompt as ``choose`` picks; see :meth:`vgf_llm.text.Reference.write`."""
        rows_R = torch.arange(len(prefix.prompts)).repeat_interleave(num_particles)
        rows, nothing_R = prefix.select(rows_R), torch.zeros(len(rows_R), dtype=torch.int64)
        tokens_RT, inside_RT = self._write(rows, nothing_R, self.sampling.max_new_tokens, choose, None, same_place=True)
        shape = (-1, num_particles, tokens_RT.shape[1])
        return Responses(prefix.prompts, tokens_RT.view(shape), inside_RT.view(shape), self.eos_ids, self.pad_id)

    def extend(
        self, rows: EnginePrefix, positions: range, choose: TokenPicker, done_R: Tensor | None = None
    ) -> tuple[Tensor, EnginePrefix]:
        """Write more tokens after rows; see :meth:`vgf_llm.text.Reference.extend`."""
        start_R = torch.full((len(rows.prompts),), positions.start)
        tokens_RT, inside_RT = self._write(rows, start_R, len(positions), choose, done_R, same_place=True)
        new = [tokens[inside].tolist() for tokens, inside in zip(tokens_RT, inside_RT, strict=True)]
        return tokens_RT, EnginePrefix(rows.prompts, [old + more for old, more in zip(rows.written, new, strict=True)])

    def rewrite(self, prefix: EnginePrefix, responses: Responses, keep_BN: Tensor, choose: TokenPicker) -> Responses:
        """Keep the first tokens of each response and write the rest; see :meth:`vgf_llm.text.Reference.rewrite`."""
        longest, keep_R = self.sampling.max_new_tokens, keep_BN.flatten().cpu()
        kept = [
            EnginePrefix([prompt], [tokens[:keep]])
            for (prompt, tokens), keep in zip(self._texts(prefix, responses), keep_R.tolist(), strict=True)
        ]
        rows = EnginePrefix([one.prompts[0] for one in kept], [one.written[0] for one in kept])
        tokens_RT, inside_RT = self._write(rows, keep_R, longest, choose, None, same_place=False)
        result_RT = torch.full((len(keep_R), longest), self.pad_id, device=self.device)
        mask_RT = torch.zeros_like(result_RT, dtype=torch.bool)
        for row, written in enumerate(rows.written):
            text = written + tokens_RT[row][inside_RT[row]].tolist()
            result_RT[row, : len(text)] = torch.tensor(text, device=self.device)
            mask_RT[row, : len(text)] = True
        shape = (*keep_BN.shape, longest)
        return Responses(prefix.prompts, result_RT.view(shape), mask_RT.view(shape), self.eos_ids, self.pad_id)

    def _texts(self, prefix: EnginePrefix, responses: Responses) -> list[tuple[list[int], list[int]]]:
        """Return (prompt, response) of every row."""
        n = responses.tokens_BNT.shape[1]
        rows = zip(responses.tokens_BNT.flatten(0, 1).cpu(), responses.mask_BNT.flatten(0, 1).cpu(), strict=True)
        return [(prefix.prompts[row // n], tokens[mask].tolist()) for row, (tokens, mask) in enumerate(rows)]

    def _read(self, prefix: EnginePrefix, responses: Responses, columns: int) -> list[TopLogps]:
        """Return the log-probabilities along every response, up to its own length."""
        texts = self._texts(prefix, responses)
        # One token is written and thrown away: an engine does not only read.
        requests = [
            EngineRequest(prompt + tokens, 1, prompt_logprobs=columns, adapter=self.adapter) for prompt, tokens in texts
        ]
        found = []
        for (_, tokens), text in zip(texts, self.engine.run(requests), strict=True):
            prompt = reported(text.prompt, self.engine.name)
            along = slice(len(prompt.own_T) - len(tokens), None)
            found.append(TopLogps(prompt.own_T[along], prompt.ids_TK[along], prompt.logps_TK[along]))
        return found

    def _write(
        self,
        rows: EnginePrefix,
        start_R: Tensor,
        most_tokens: int,
        choose: TokenPicker,
        done_R: Tensor | None,
        *,
        same_place: bool,
    ) -> tuple[Tensor, Tensor]:
        """Let the engine write after rows and the picker follow.

        Args:
            rows: R texts.
            start_R: Place in the response of the first token that is written.
            most_tokens: The place after the last one (``same_place``: counted from the start).
            choose: Picks the tokens.
            done_R: Rows that have ended before and are not written.
            same_place: Whether all rows start at one place, as pickers that take a single position want it.

        Returns:
            Tokens [R, T], padded, and bool [R, T], what was written.
        """
        done = [False] * len(rows.prompts) if done_R is None else done_R.tolist()
        room_R = torch.full_like(start_R, most_tokens) if same_place else most_tokens - start_R
        plans = choose.plans(start_R, most_tokens)
        if self.vocabulary is not None:
            plans = [replace(plan, rule={**plan.rule, "vocabulary": self.vocabulary}) for plan in plans]
        requests = {
            row: EngineRequest(
                rows.prompts[row] + rows.written[row],
                int(room_R[row]),
                plan=plans[row],
                eos_ids=self.eos_ids,
                stop=self.stop,
                logprobs=self._asked(self.columns),
                adapter=self.adapter,
            )
            for row, is_done in enumerate(done)
            if not is_done
        }
        written = self.engine.run(list(requests.values()))
        tokens_RT, inside_RT, distribution = self._laid_out(dict(zip(requests, written, strict=True)), len(done))
        self._follow(choose, distribution, tokens_RT, inside_RT, start_R.to(self.device), same_place=same_place)
        return tokens_RT, inside_RT

    def _laid_out(self, texts: dict[int, EngineText], number: int) -> tuple[Tensor, Tensor, Shortlist]:
        """Return tokens [R, T], bool [R, T] and distributions [R, T, K] of R rows, given the texts of some of them."""
        length = max((len(text.tokens) for text in texts.values()), default=1)
        tokens_RT = torch.full((number, length), self.pad_id)
        inside_RT = torch.zeros_like(tokens_RT, dtype=torch.bool)
        asked = self._asked(self.columns)
        ids_RTK = torch.zeros((number, length, asked), dtype=torch.int64)
        raw_RTK = torch.zeros((number, length, asked))
        for row, text in texts.items():
            here = slice(0, len(text.tokens))
            tokens_RT[row, here], inside_RT[row, here] = torch.tensor(text.tokens), True
            written = reported(text.written, self.engine.name)
            ids_RTK[row, here], raw_RTK[row, here] = written.ids_TK, written.logps_TK
        ids_RTK, raw_RTK = self._known(ids_RTK, raw_RTK, self.columns)
        distribution = normalised(ids_RTK, raw_RTK / self.sampling.temperature, self.sampling.top_p)
        distribution = Shortlist(distribution.ids.to(self.device), distribution.logps.to(self.device))
        return tokens_RT.to(self.device), inside_RT.to(self.device), distribution

    def _follow(
        self,
        choose: TokenPicker,
        distribution: Shortlist,
        tokens_RT: Tensor,
        inside_RT: Tensor,
        start_R: Tensor,
        *,
        same_place: bool,
    ) -> None:
        """Bring the picker to where it would be had it picked the tokens itself, and see that it would have."""
        strays = torch.zeros((), dtype=torch.int64, device=self.device)
        for offset in range(tokens_RT.shape[1]):
            position = int(start_R[0]) + offset if same_place else start_R + offset
            here = Shortlist(distribution.ids[:, offset], distribution.logps[:, offset])
            own_R = choose.follow(here, position, tokens_RT[:, offset], inside_RT[:, offset])
            strays += ((own_R != tokens_RT[:, offset]) & inside_RT[:, offset]).sum()
        tokens = int(inside_RT.sum())
        if int(strays) > 1 + _STRAYS * tokens:
            raise EngineError(
                f"the {self.engine.name} wrote {int(strays)} of {tokens} tokens otherwise than planned; it must run "
                "vgf_llm.engines.vllm_processor:PlanProcessor as a logits processor, with the table of this value "
                "model and the same version of vgf_llm"
            )

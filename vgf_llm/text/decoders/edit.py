"""``edit``: single tokens are changed where displacement and reference agree, and a change is kept by an exact test.

Nothing is regrown, so improvements add up over the rounds. With Delta = eps grad R / alpha of one flow step, a round
draws a position t of each response uniformly and a token v != y_t from

    q_y(v | t) ∝ p(v | y_<t) exp(<Delta_t, e_v - e_{y_t}>)          v in the reference's top k, not EOS,

and keeps y' = y with y_t := v if two tests in a row are passed, the second of which alone needs the reference:

    a_1 = min{1, [p(v | y_<t) / p(y_t | y_<t)] [q_y'(y_t | t) / q_y(v | t)] exp((R(y') - R(y)) / alpha)}
    a_2 = min{1, prod_{s > t} p(y_s | y'_<s) / p(y_s | y_<s)}.

Both sides of a_1 see the context y_<t alone, so it needs no forward of the reference, and the two together are
Metropolis-Hastings with delayed acceptance (Christen and Fox 2005): the stationary distribution is p(y | x) exp(R(y) /
alpha) over the responses of y's length, p the sampling distribution. The proposal is Gibbs-with-gradients (Grathwohl et
al. 2021), with the language model's conditional in place of half a difference of log densities. EOS is neither replaced
nor put in.

What is exact is so in exact arithmetic, for a direction that depends on the response alone (no kernel between
particles). In bfloat16 the log-probability of a response has an error of about 0.1 nats, which the tests see.

Cost a response and round, for P_ref and P_val parameters and T tokens: the flow at y' (4 P_val T FLOPs with the value's
own gradient, 2 P_val T with a secant head), and 2 P_ref T where the first test was passed; the first round 2 P_ref T
more where the sampler did not keep the distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import combine_seeds, gumbel_noise
from vgf_llm.text.path import Path, chosen, edit_scores, is_on_list, path_of, with_token
from vgf_llm.text.protocols import Decoded, Move, Prefix, Reference, Work, check_no_kernel
from vgf_llm.text.responses import Responses

_POSITION, _TOKEN, _FIRST_TEST, _SECOND_TEST = 0, 1, 2, 3


class EditDecoder:
    """Single-token edits under Metropolis-Hastings.

    Args:
        reference: The frozen base model and its distribution.
        table_VD: Input embeddings that the particles live in.
    """

    def __init__(self, reference: Reference, table_VD: Tensor) -> None:
        self.reference = reference
        self.table_VD = table_VD

    def prepare(self, prompts: list[list[int]]) -> Prefix:
        """Run the prompts through the reference once."""
        return self.reference.prefix(prompts)

    @torch.no_grad()
    def decode(self, context: Prefix, move: Move) -> Decoded:
        """Propose one edit of each response, test it and keep it or not."""
        check_no_kernel("edit", move.budget)
        responses, path, work = move.responses, move.state, Work.none(len(move.responses.prompts))
        if path is None:
            path, work = path_of(self.reference, context, responses)
        seeds_BN = move.seeds_BN.to(responses.tokens_BNT.device)
        t_BN = _uniform_position(responses, seeds_BN)
        forward_BNK = _at(edit_scores(self.table_VD, path, responses, move.displacement_BNTD), t_BN).log_softmax(-1)
        ids_BNK = _at(path.distribution.ids, t_BN)
        noise_RK = gumbel_noise(combine_seeds(seeds_BN.flatten(), _TOKEN), 0, ids_BNK.flatten(0, 1))
        new_BN1 = (forward_BNK + noise_RK.view(ids_BNK.shape)).argmax(-1, keepdim=True)
        edited = with_token(responses, t_BN, ids_BNK.gather(-1, new_BN1).squeeze(-1))
        there = move.flow(edited)
        work += Work.of(responses.lengths_BN, value=move.flow_passes)

        # The way back: the same context and distribution at t, the displacement of y', and v as the token that stands
        # there.
        logp_new_BN = _at(path.distribution.logps, t_BN).gather(-1, new_BN1).squeeze(-1)
        own_BNT = path.own_BNT.scatter(-1, t_BN.unsqueeze(-1), logp_new_BN.unsqueeze(-1))
        back = edit_scores(self.table_VD, Path(path.distribution, own_BNT), edited, there.displacement_BNTD)
        backward_BNK = _at(back, t_BN).log_softmax(-1)
        is_old_BNK = (ids_BNK == _at(responses.tokens_BNT, t_BN).unsqueeze(-1)) & ~torch.isinf(backward_BNK)
        log_a1_BN = (
            (logp_new_BN - _at(path.own_BNT, t_BN))
            + backward_BNK.masked_fill(~is_old_BNK, -torch.inf).amax(-1)
            - forward_BNK.gather(-1, new_BN1).squeeze(-1)
            + (there.values_BN - move.moved.values_BN) / move.budget.temperature
        )  # NaN where no edit is possible, and then the test fails
        passed_BN = _log_uniform(seeds_BN, _FIRST_TEST) < log_a1_BN
        new_path = self._path_where(context, edited, path, passed_BN)
        work += Work.of(responses.lengths_BN * passed_BN, reference=1)
        after_BNT = torch.arange(own_BNT.shape[-1], device=t_BN.device) > t_BN.unsqueeze(-1)
        log_a2_BN = (new_path.own_BNT - path.own_BNT).masked_fill(~after_BNT, 0).sum(-1)
        kept_BN = passed_BN & (_log_uniform(seeds_BN, _SECOND_TEST) < log_a2_BN)
        moved = move.moved.where(kept_BN, there)
        return Decoded(
            responses=chosen(kept_BN, edited, responses),
            nats_BN=torch.full(kept_BN.shape, torch.nan, device=kept_BN.device),
            work=work,
            values_BN=moved.values_BN,
            moved=moved,
            state=path.where(kept_BN, new_path),
        )

    def _path_where(self, context: Prefix, edited: Responses, path: Path, wanted_BN: Tensor) -> Path:
        """Return the path of the edited responses that are wanted, the old one elsewhere."""
        rows_X = wanted_BN.flatten().nonzero().squeeze(-1)
        if len(rows_X) == 0:
            return path
        n, shape = wanted_BN.shape[1], path.distribution.ids.shape
        some = Responses(
            [edited.prompts[row // n] for row in rows_X.tolist()],
            edited.tokens_BNT.flatten(0, 1)[rows_X].unsqueeze(1),
            edited.mask_BNT.flatten(0, 1)[rows_X].unsqueeze(1),
            edited.eos_ids,
            edited.pad_id,
        )
        found, _ = path_of(self.reference, context.select(rows_X // n), some)
        own_X1T = found.own_BNT.masked_fill(~is_on_list(found.distribution, some).unsqueeze(-1), -torch.inf)
        ids_RTK, logps_RTK = path.distribution.ids.flatten(0, 1).clone(), path.distribution.logps.flatten(0, 1).clone()
        own_RT = path.own_BNT.flatten(0, 1).clone()
        ids_RTK[rows_X], logps_RTK[rows_X], own_RT[rows_X] = (
            found.distribution.ids[:, 0],
            found.distribution.logps[:, 0],
            own_X1T[:, 0],
        )
        return Path(Shortlist(ids_RTK.view(shape), logps_RTK.view(shape)), own_RT.view(shape[:-1]))


def _uniform_position(responses: Responses, seeds_BN: Tensor) -> Tensor:
    """Draw a movable position of each response uniformly; 0 where there is none."""
    t_length = responses.tokens_BNT.shape[-1]
    columns_RT = torch.arange(t_length, device=seeds_BN.device).expand(seeds_BN.numel(), -1)
    noise_RT = gumbel_noise(combine_seeds(seeds_BN.flatten(), _POSITION), 0, columns_RT)
    return noise_RT.view(responses.tokens_BNT.shape).masked_fill(~responses.movable_BNT, -torch.inf).argmax(-1)


def _at(values: Tensor, position_BN: Tensor) -> Tensor:
    """Return what stands at one position of each response: [B, N, T, ...] -> [B, N, ...]."""
    index = position_BN.reshape(*position_BN.shape, *[1] * (values.dim() - 2))
    return values.gather(2, index.expand(-1, -1, 1, *values.shape[3:])).squeeze(2)


def _log_uniform(seeds_BN: Tensor, stream: int) -> Tensor:
    """Return the logarithm of a uniform number for each response."""
    noise_R1 = gumbel_noise(combine_seeds(seeds_BN.flatten(), stream), 0, torch.zeros_like(seeds_BN.flatten())[:, None])
    return -torch.exp(-noise_R1).view(seeds_BN.shape)

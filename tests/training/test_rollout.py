"""Rows, pairs, rewards and figures of a rollout, on numbers small enough to check by hand."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import build_llama, build_tokenizer
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.text.responses import Responses
from vgf_llm.training.batch import policy_rows
from vgf_llm.training.metrics import MetricSums, kl_estimate, nll_a_token, nothing_learns
from vgf_llm.training.policy_models import response_logps
from vgf_llm.training.rewards import NamedReward, Rewards, load_rewards


def two_prompts() -> Responses:
    tokens = torch.tensor([[[6, 7, 2], [8, 2, 0]], [[9, 10, 11], [2, 0, 0]]])
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]]).bool()
    return Responses([[1, 5], [5]], tokens, mask, (2,), 0)


def test_rows_are_padded_left_and_right_and_cut_to_the_longest_kept():
    rows = policy_rows(two_prompts(), torch.tensor([[False, True], [False, True]]))
    assert rows.input_ids_RS.tolist() == [[1, 5, 8, 2], [0, 5, 2, 0]]
    assert rows.attention_mask_RS.tolist() == [[1, 1, 1, 1], [0, 1, 1, 0]]
    assert rows.mask_RT.tolist() == [[True, True], [True, False]]
    assert rows.value_inputs["response_mask"].tolist() == [[False, False, True, True], [False, False, True, False]]


def test_log_probabilities_of_rows_are_those_of_each_response_alone():
    model, responses = build_llama(), two_prompts()
    rows = policy_rows(responses, torch.ones(2, 2, dtype=torch.bool))
    logps_RT = response_logps(model, **rows.policy_inputs)
    for row, (b, n) in enumerate((b, n) for b in range(2) for n in range(2)):
        kept = responses.tokens_BNT[b, n][responses.mask_BNT[b, n]].tolist()
        ids = torch.tensor([responses.prompts[b] + kept])
        alone = model(ids).logits[0].log_softmax(-1)
        start = len(responses.prompts[b])
        wanted = torch.stack([alone[start + t - 1, token] for t, token in enumerate(kept)])
        torch.testing.assert_close(logps_RT[row, : len(kept)], wanted, atol=1e-5, rtol=1e-5)


def test_rewards_are_weighted_added_and_each_logged():
    def ones(prompts, responses):
        return [1.0] * len(responses)

    def words(prompts, responses):
        return [float(len(text.split())) for text in responses]

    members = [NamedReward("ones", 2.0, ones, "ones"), NamedReward("words", -1.0, words, "words")]
    scores = Rewards(members, build_tokenizer(), gold=words)(["x", "y"], two_prompts())
    assert scores["reward_words"].tolist() == scores["gold"].tolist() == [[2.0, 1.0], [3.0, 0.0]]
    assert scores["reward"].tolist() == [[0.0, 1.0], [-1.0, 2.0]]


def test_a_reward_that_is_not_finite_or_not_there_is_named():
    def broken(prompts, responses):
        return [float("nan")] * len(responses)

    with pytest.raises(ModelError, match="broken returned nan"):
        Rewards([NamedReward("broken", 1.0, broken, "b")], build_tokenizer())(["x", "y"], two_prompts())
    with pytest.raises(ConfigError, match="'outputs/nowhere' is not a folder"):
        load_rewards(["outputs/nowhere"], [], build_tokenizer())


def test_metrics_are_means_over_everything_added_and_start_anew():
    class One:
        num_processes = 1

    sums = MetricSums()
    sums.add("a", torch.tensor([1.0, 2.0, float("nan")]))
    sums.add("a", 6.0)
    sums.add("tokens", 10, 1)
    assert sums.means(One()) == {"a": 3.0, "tokens": 10.0}
    assert sums.means(One()) == {}


def test_likelihood_and_kl_by_hand():
    logps = torch.tensor([[-1.0, -3.0, -9.0]])
    assert nll_a_token(logps, torch.tensor([[True, True, False]])).tolist() == [2.0]
    assert kl_estimate(torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[[-2.0, -2.5]]])).tolist() == [[1.5]]


def test_what_cannot_be_learned_from_is_said():
    fine = {"zero_variance_share": 0.5, "eos/original": 0.1, "eos/transported": 0.0, "changed_tokens": 1.0}
    assert nothing_learns(fine) == []
    assert len(nothing_learns(fine | {"zero_variance_share": 1.0, "changed_tokens": 0.0, "eos/original": 0.0})) == 3

"""Lookahead against plain forwards: text and candidate as one sequence, a row at a time."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from reward_models.lookahead import Lookahead
from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_neox
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.text.distribution import Shortlist

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 4], [9, 4], [12, 13, 14, 5]]
STEPS, CANDIDATES = 6, 4


def build_windowed():
    """Two layers with a sliding window shorter than the texts."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.2,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def read_alone(value, prompt, text):
    """What the heads read at the last token of prompt and text, by one forward of the whole."""
    u = value.embed(torch.tensor([prompt + text]))
    hidden = value.body(inputs_embeds=u, use_cache=False).last_hidden_state
    read = value.head(hidden[:, -1]).squeeze()
    if value.skip_head is not None:
        skip = value.skip_head(u[:, -1] / value.table_scale).squeeze()
        read = read + (skip if value.config.pooling == "mean" else skip / len(text))
    return float(read)


@pytest.mark.parametrize("build", [build_llama, build_neox, build_windowed])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_bonus_is_the_centred_read_at_each_candidate(build, pooling):
    value = RewardModel.from_base(build(), num_layers=2, pooling=pooling, input_skip=True)
    torch.nn.init.normal_(value.skip_head.weight, std=0.3)
    value.freeze()
    generator = torch.Generator().manual_seed(1)
    bonus = Lookahead(value, CANDIDATES, min_probability=0.05).begin(PROMPTS, 2)
    rows = [prompt for prompt in PROMPTS for _ in range(2)]
    texts: list[list[int]] = [[] for _ in rows]
    last_R = None
    for step in range(STEPS):
        ids_RK = torch.stack([torch.randperm(40, generator=generator)[:7] + 5 for _ in rows])
        logits_RK = torch.randn(len(rows), 7, generator=generator).mul(2).sort(-1, descending=True).values
        logps_RK = logits_RK.log_softmax(-1)
        logps_RK[0, 0] = -torch.inf  # an EOS, say
        found_RK = bonus(Shortlist(ids_RK, logps_RK), None, last_R)
        for row, prompt in enumerate(rows):
            order = logps_RK[row].argsort(descending=True)[:CANDIDATES]
            run = [int(k) for k in order if float(logps_RK[row, k].exp()) >= 0.05]
            ended = last_R is not None and int(last_R[row]) < 0
            expected = torch.zeros(7)
            if len(run) > 1 and not ended:
                reads = torch.tensor([read_alone(value, prompt, [*texts[row], int(ids_RK[row, k])]) for k in run])
                p = logps_RK[row, run].exp()
                expected[run] = reads - (p * reads).sum() / p.sum()
            torch.testing.assert_close(found_RK[row], expected, atol=2e-5, rtol=1e-4)
        columns = torch.randint(1, 7, (len(rows),), generator=generator)  # some among the candidates, some not
        last_R = ids_RK.gather(-1, columns[:, None]).squeeze(-1)
        if step >= 3:
            last_R[1] = -1  # this row has ended
        for row, token in enumerate(last_R.tolist()):
            texts[row].append(max(token, 0))


def test_texts_longer_than_the_room_of_the_cache():
    value = RewardModel.from_base(build_llama(), num_layers=1, pooling="last").freeze()
    bonus = Lookahead(value, 3, min_probability=0.0).begin([[5, 6]], 1)
    ids_RK, logps_RK = torch.tensor([[7, 8, 9]]), torch.tensor([[0.5, 0.3, 0.2]]).log()
    text, last_R = [], None
    for step in range(80):
        found_RK = bonus(Shortlist(ids_RK, logps_RK), None, last_R)
        last_R = ids_RK[:, step % 3]
        if step < 79:
            text.append(int(last_R))
    reads = torch.tensor([read_alone(value, [5, 6], [*text, token]) for token in (7, 8, 9)])
    expected_K = reads - (logps_RK[0].exp() * reads).sum()
    torch.testing.assert_close(found_RK[0], expected_K, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_bonus_is_what_a_candidate_adds_to_the_score(pooling):
    """Under mean pooling t times the score, under last the score itself, of text and candidate together."""
    value = RewardModel.from_base(build_llama(), num_layers=2, pooling=pooling, input_skip=True)
    torch.nn.init.normal_(value.skip_head.weight, std=0.3)
    value.freeze()
    bonus, ids_RK = Lookahead(value, 3, min_probability=0.0).begin([[5, 6]], 1), torch.tensor([[7, 8, 9]])
    uniform, last_R = Shortlist(ids_RK, torch.full((1, 3), 1 / 3).log()), None
    for token in (7, 10, 9, 11):
        found_K = bonus(uniform, None, last_R)[0]
        last_R = torch.tensor([token])
    texts_NT = torch.tensor([[7, 10, 9, candidate] for candidate in (7, 8, 9)])
    scores_N = value.score(value.prefix([[5, 6]]), texts_NT[None], torch.ones(1, 3, 4).bool())[0]
    expected_K = (scores_N - scores_N.mean()) * (4 if pooling == "mean" else 1)
    torch.testing.assert_close(found_K, expected_K, atol=2e-5, rtol=1e-4)


def test_a_classifier_with_a_closing_is_refused():
    value = RewardModel.from_base(build_llama(), num_layers=1, pooling="last").freeze()
    value.config.closing = [4]
    with pytest.raises(ConfigError, match="read after its template's closing"):
        Lookahead(value)


def test_an_attention_of_its_own_is_refused(monkeypatch):
    value = RewardModel.from_base(build_llama(), num_layers=1, pooling="last").freeze()
    for layer in value.body.layers:
        attention = layer.self_attn
        monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    bonus = Lookahead(value, 3).begin([[5, 6]], 1)
    with pytest.raises(ModelError, match="attention of its own"):
        bonus(Shortlist(torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.5]]).log()), None, None)

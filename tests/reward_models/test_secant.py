"""The secant head learns what a value does between tokens, leaves EOS and padding alone, and knows its own model."""

from __future__ import annotations

import json

import pytest
import torch

from reward_models.fidelity import compare_changes, exact_changes
from reward_models.folder import clear_earlier_run
from reward_models.loading import load_reward_model, save_reward_model
from reward_models.modelling import RewardModel
from reward_models.secant import (
    SecantHead,
    load_secant_head,
    save_secant_head,
    secant_features,
    secant_gradient,
)
from reward_models.secant_fit import (
    Sampled,
    compare_with_gradient,
    constant_direction,
    fit_secant_head,
    score_substitutions,
    secant_targets,
)
from reward_models.secant_settings import SecantTraining
from reward_models.train_secant import main
from vgf_llm.cli import run_main
from vgf_llm.errors import ModelError
from vgf_llm.flow import TransportBudget
from vgf_llm.text.particles import move_particles
from vgf_llm.text.responses import Responses

PROMPTS = [[1, 10, 11], [1, 20, 21, 22, 23]]
EOS, PAD = 2, 0
QUICK = SecantTraining(base="none", steps=400, batch_size=128, hidden=64, learning_rate=3.0e-3, dropout=0.0)


def value_model(lm, pooling="mean", input_skip=True, linear=False):
    """A frozen one-layer reward model with random heads; `linear`: the body's head is at zero, the skip is all."""
    model = RewardModel.from_base(lm, num_layers=1, pooling=pooling, input_skip=input_skip)
    with torch.no_grad():
        if input_skip:
            model.skip_head.weight.normal_()
        if linear:
            model.head.weight.zero_()
    return model.freeze()


def random_responses(prompts=PROMPTS, n=6, length=6, seed=0):
    """Responses of random words; every second one of a prompt ends early, in EOS and padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 50, (len(prompts), n, length), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    tokens[:, ::2, length - 2] = EOS
    tokens[:, ::2, length - 1] = PAD
    mask[:, ::2, length - 1] = False
    shortlist = torch.randint(0, 50, (*tokens.shape, 12), generator=generator)
    return Sampled(Responses(prompts, tokens, mask, (EOS,), PAD), shortlist)


def direction(head, value, responses):
    """Values and directions of a head at the responses."""
    u = value.embed(responses.tokens_BNT).detach()
    return secant_gradient(head)(value, value.prefix(responses.prompts), responses)(u)


def test_an_unfitted_head_on_the_skip_is_the_skips_own_gradient(any_lm):
    """With the body's head at zero the value is linear: its gradient, the skip and the fresh head agree."""
    value, responses = value_model(any_lm, linear=True), random_responses().responses
    u = value.embed(responses.tokens_BNT).detach().requires_grad_(True)
    values = value.score(value.prefix(PROMPTS), u, responses.mask_BNT)
    (gradient,) = torch.autograd.grad(values.sum(), u)
    for base in ("skip", "gradient"):
        found_values, found = direction(SecantHead(32, base=base), value, responses)
        torch.testing.assert_close(found_values, values.detach())
        torch.testing.assert_close(found, gradient * responses.movable_BNT.unsqueeze(-1))
    assert not direction(SecantHead(32, base="none"), value, responses)[1].any()


def test_skip_gradient_is_zero_without_a_skip(tiny_lm):
    mask = random_responses().responses.mask_BNT
    assert not value_model(tiny_lm, input_skip=False).skip_gradient(mask).any()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_it_recovers_a_linear_value_without_being_told(tiny_lm, pooling):
    """Base "none": the direction of the skip must come out of the regression alone."""
    value = value_model(tiny_lm, pooling, linear=True)
    fitted_on, unseen = random_responses(n=16), random_responses(seed=1)
    changes = score_substitutions(value, fitted_on, 40, 0, "scoring")
    head, _ = fit_secant_head(secant_targets(value, fitted_on.responses, changes, "none"), QUICK, "none")
    _, found = compare_with_gradient(value, head, unseen.responses, score_substitutions(value, unseen, 40, 1, "score"))
    assert found.spearman > 0.95 and found.top8_gain > 0.95 * found.best8_gain


def test_it_beats_the_gradient_of_a_value_that_bends(tiny_lm):
    """Responses of the fit are measured with other substitutions: what a head learns about a text carries over."""
    value = value_model(tiny_lm, "last")
    with torch.no_grad():
        value.head.weight.mul_(10)
    sampled = random_responses(n=16)
    changes = score_substitutions(value, sampled, 50, 0, "scoring")
    targets = secant_targets(value, sampled.responses, changes, "skip")
    head, _ = fit_secant_head(targets, QUICK, "skip")
    plain, fitted = compare_with_gradient(
        value, head, sampled.responses, score_substitutions(value, sampled, 30, 9, "score")
    )
    assert plain.spearman < 0.9 and fitted.spearman > plain.spearman + 0.05


def test_one_direction_is_the_skips_where_the_value_is_linear(tiny_lm):
    """R = <v, mean(u)> / rms: the targets are T * exact = <v, step / rms>, so ridge regression gives v back."""
    value, sampled = value_model(tiny_lm, linear=True), random_responses(n=16)
    targets = secant_targets(value, sampled.responses, score_substitutions(value, sampled, 60, 0, "scoring"), "none")
    found, wanted = constant_direction(targets), value.skip_head.weight[0]
    predicted, exact = targets.step_XD @ found, targets.step_XD @ wanted
    assert torch.corrcoef(torch.stack([predicted, exact]))[0, 1] > 0.999
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.9


def test_targets_are_what_the_base_leaves_over(tiny_lm):
    """A linear value minus its own skip is nothing; minus nothing it is exact * T."""
    value, sampled = value_model(tiny_lm, linear=True), random_responses()
    changes = score_substitutions(value, sampled, 20, 0, "scoring")
    left = secant_targets(value, sampled.responses, changes, "skip").target_X
    assert left.abs().max() < 1e-4
    whole = secant_targets(value, sampled.responses, changes, "none").target_X
    lengths = sampled.responses.lengths_BN
    expected = torch.cat([change.exact_S * lengths[change.b, change.n] for change in changes])
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)


def test_eos_and_padding_have_no_direction_and_no_substitution(tiny_lm):
    value, sampled = value_model(tiny_lm), random_responses()
    head = SecantHead(32, base="skip")
    torch.nn.init.normal_(head.second.weight)
    _, found = direction(head, value, sampled.responses)
    assert not found[~sampled.responses.movable_BNT].any() and found[sampled.responses.movable_BNT].all(-1).any()
    for change in score_substitutions(value, sampled, 1000, 0, "scoring"):
        assert sampled.responses.movable_BNT[change.b, change.n, change.t_S].all()
        assert (change.v_S != EOS).all() and change.exact_S.isfinite().all()


def test_padding_does_not_reach_the_features(tiny_lm):
    value, responses = value_model(tiny_lm), random_responses().responses
    prefix, u = value.prefix(PROMPTS), value.embed(responses.tokens_BNT)

    def features(embeddings):
        _, hidden, pooled = value.score_with_hidden(prefix, embeddings, responses.mask_BNT)
        return secant_features(hidden, pooled, embeddings, responses.mask_BNT)[responses.mask_BNT]

    other = torch.where(responses.mask_BNT.unsqueeze(-1), u, u + 5)
    torch.testing.assert_close(features(u), features(other), atol=1e-5, rtol=1e-5)


def test_a_flow_takes_its_velocity_from_the_head(tiny_lm):
    value, responses = value_model(tiny_lm), random_responses().responses
    head = SecantHead(32, base="skip")
    torch.nn.init.normal_(head.second.weight)
    prefix = value.prefix(PROMPTS)
    moved = move_particles(
        value, prefix, responses, TransportBudget(steps=1, step_size=0.5), gradient=secant_gradient(head)
    )
    torch.testing.assert_close(moved.delta, 0.5 * direction(head, value, responses)[1], atol=1e-5, rtol=1e-4)


def test_exact_changes_are_differences_of_scores(tiny_lm):
    value, sampled = value_model(tiny_lm), random_responses(n=2)
    responses = sampled.responses
    change = score_substitutions(value, sampled, 5, 0, "scoring")[3]
    ids = responses.tokens_BNT[change.b].clone()
    before = value.score(value.prefix([PROMPTS[change.b]]), ids[None], responses.mask_BNT[change.b][None])
    ids[change.n, change.t_S[0]] = change.v_S[0]
    after = value.score(value.prefix([PROMPTS[change.b]]), ids[None], responses.mask_BNT[change.b][None])
    torch.testing.assert_close((after - before)[0, change.n], change.exact_S[0], atol=1e-5, rtol=0)


def test_compare_changes_needs_more_than_eight_substitutions(tiny_lm):
    value, responses = value_model(tiny_lm), random_responses().responses
    shortlist = torch.full((*responses.tokens_BNT.shape, 2), 7)
    changes = exact_changes(value, PROMPTS, responses.tokens_BNT, responses.mask_BNT, shortlist, substitutions=8)
    with pytest.raises(ValueError, match="more than 8"):
        compare_changes(value, responses.tokens_BNT, changes, torch.zeros(*responses.tokens_BNT.shape, 32))


def test_save_and_load(tiny_lm, tmp_path):
    value, responses = value_model(tiny_lm), random_responses().responses
    save_reward_model(value, tmp_path)
    head = SecantHead(32, hidden=16, base="skip")
    torch.nn.init.normal_(head.second.weight)
    head.unit.fill_(3.0)
    save_secant_head(head, tmp_path, pairs=7)
    again = load_secant_head(tmp_path, load_reward_model(tmp_path))
    assert torch.equal(direction(again, value, responses)[1], direction(head, value, responses)[1])
    assert json.loads((tmp_path / "secant.json").read_text())["pairs"] == 7
    for dtype in (torch.bfloat16, torch.float16):
        assert load_secant_head(tmp_path, load_reward_model(tmp_path, dtype=dtype)).hidden == 16


def test_what_does_not_belong_together_is_refused(tiny_lm, tmp_path):
    value = value_model(tiny_lm)
    with pytest.raises(ModelError, match=r"has no secant\.json"):
        load_secant_head(tmp_path, value)
    save_reward_model(value, tmp_path)
    save_secant_head(SecantHead(32), tmp_path)
    with torch.no_grad():
        value.head.bias.add_(1.0)
    save_reward_model(value, tmp_path)
    with pytest.raises(ModelError, match="fitted to other weights"):
        load_secant_head(tmp_path, value)
    save_secant_head(SecantHead(48), tmp_path)
    with pytest.raises(ModelError, match="48 wide, the reward model 32"):
        load_secant_head(tmp_path, value)
    save_secant_head(SecantHead(32), tmp_path)
    (tmp_path / "secant.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"secant\.safetensors' cannot be read"):
        load_secant_head(tmp_path, value)
    (tmp_path / "secant.json").write_text("{}")
    with pytest.raises(ModelError, match=r"secant\.json' cannot be read"):
        load_secant_head(tmp_path, value)
    responses = random_responses().responses
    with pytest.raises(ModelError, match="not of a object"):
        secant_gradient(SecantHead(32))(object(), None, responses)


def test_settings_name_the_key():
    for key, seen in (("steps", 0), ("learning_rate", 0.0), ("dropout", 1.0), ("base", "other"), ("substitutions", 0)):
        with pytest.raises(ValueError, match=key):
            SecantTraining(**{key: seen})
    with pytest.raises(ValueError, match="base must be one of"):
        SecantHead(8, base="other")


@pytest.fixture
def command(tmp_path, tiny_lm, tiny_tokenizer):
    """A reward model, prompts, and the flags of a quick fit to them."""
    for part in ("base", "value"):
        tiny_tokenizer.save_pretrained(tmp_path / part)
    tiny_lm.save_pretrained(tmp_path / "base")
    save_reward_model(value_model(tiny_lm), tmp_path / "value")
    for name, words in (("fit", ["dog", "cat", "sea"]), ("unseen", ["rain", "tea"])):
        rows = "".join(json.dumps({"prompt": f"write about the {word}"}) + "\n" for word in words)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    values = {
        "reward_model": tmp_path / "value",
        "model_name_or_path": tmp_path / "base",
        "prompts": tmp_path / "fit.jsonl",
        "validation_prompts": tmp_path / "unseen.jsonl",
        "max_new_tokens": 5,
        "top_k": 20,
        "substitutions": 10,
        "validation_substitutions": 20,
        "steps": 5,
        "hidden": 8,
    }
    return lambda **changes: [str(part) for key, value in (values | changes).items() for part in (f"--{key}", value)]


def test_the_command_writes_a_head_beside_the_model(command, tmp_path, capsys, tiny_tokenizer):
    assert main(command()) == 0
    out, told = capsys.readouterr()
    figures = json.loads(out)
    assert "input gradient" in told and "secant head" in told and figures["pairs"] > 0
    facts = json.loads((tmp_path / "value" / "secant.json").read_text())
    assert facts["base"] == "skip" and set(facts["fidelity"]) == {"before", "after"}
    value = load_reward_model(tmp_path / "value", tokenizer=tiny_tokenizer)
    assert load_secant_head(tmp_path / "value", value).hidden == 8


def test_a_head_serves_the_weights_of_outputs_that_it_was_fitted_to(command, tmp_path, tiny_lm, tiny_tokenizer, capsys):
    model = RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean", input_skip=True, objectives=["good", "long"])
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.skip_head.weight)
    save_reward_model(model, tmp_path / "value")
    assert run_main(main, command()) == 2
    assert "reward_outputs: " in capsys.readouterr().err
    assert main(command(reward_outputs="{good: 1.0, long: -0.2}")) == 0
    folder = tmp_path / "value"
    facts = json.loads((folder / "secant.json").read_text())
    assert facts["reward_outputs"] == {"good": 1.0, "long": -0.2}
    load_secant_head(folder, load_reward_model(folder, outputs={"0": 1.0, "1": -0.2}))
    other = load_reward_model(folder, outputs={"good": 1.0})
    with pytest.raises(ModelError, match=r"fitted to reward_outputs \{'good': 1.0, 'long': -0.2\}, and those in"):
        load_secant_head(folder, other)
    del facts["reward_outputs"]  # as earlier versions wrote it, for a classifier
    (folder / "secant.json").write_text(json.dumps(facts))
    load_secant_head(folder, other)


def test_the_command_says_what_is_wrong(command, tmp_path, capsys, tiny_lm, tiny_tokenizer):
    assert run_main(main, command(validation_prompts=tmp_path / "fit.jsonl")) == 2
    assert "prompt 0 is in" in capsys.readouterr().err
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    save_reward_model(value_model(tiny_lm, input_skip=False), tmp_path / "plain")
    assert run_main(main, command(reward_model=tmp_path / "plain")) == 2
    assert "has no input skip" in capsys.readouterr().err
    assert run_main(main, command(steps=0)) == 2
    assert "steps" in capsys.readouterr().err


def test_training_again_takes_the_old_head_away(tiny_lm, tmp_path):
    value = value_model(tiny_lm)
    save_reward_model(value, tmp_path)
    save_secant_head(SecantHead(32), tmp_path)
    clear_earlier_run(tmp_path)
    assert not list(tmp_path.glob("secant*"))

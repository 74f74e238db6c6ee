"""The input skip: one score on every path, a linear share of the gradient, its own learning rate, saved under LoRA."""

import torch

from reward_models.loading import add_lora, load_reward_model, save_reward_model
from reward_models.modelling import RewardModel
from reward_models.settings import RewardTraining
from reward_models.trainer import RewardTrainer
from vgf_llm.runs.hf_arguments import training_arguments

PROMPTS = [[1, 10, 11], [1, 20, 21, 22, 23]]
TOKENS = torch.tensor([[[30, 31, 2, 0], [32, 33, 34, 2]], [[35, 2, 0, 0], [36, 37, 38, 39]]])
MASK = TOKENS != 0


def skip_model(lm, pooling="mean"):
    model = RewardModel.from_base(lm, num_layers=1, pooling=pooling, input_skip=True)
    with torch.no_grad():
        model.skip_head.weight.normal_()
    return model


def test_score_with_the_prefix_equals_the_whole_sequence_for_both_poolings(any_lm):
    for pooling in ("mean", "last"):
        model = skip_model(any_lm, pooling).freeze()
        scores = model.score(model.prefix(PROMPTS), TOKENS, MASK)
        for b, prompt in enumerate(PROMPTS):
            for n in range(2):
                response = TOKENS[b, n][MASK[b, n]].tolist()
                ids = torch.tensor([[*prompt, *response]])
                response_mask = torch.tensor([[0] * len(prompt) + [1] * len(response)])
                alone = model(ids, torch.ones_like(ids), response_mask=response_mask)
                torch.testing.assert_close(alone[0], scores[b, n], atol=1e-5, rtol=0)


def test_its_gradient_is_its_weight_over_the_length_and_the_table_scale(any_lm):
    """With the body's head at zero, r = <v, mean(u)> / rms(table): the gradient at each of T tokens is v / (T rms)."""
    model = skip_model(any_lm).freeze()
    with torch.no_grad():
        model.head.weight.zero_()
    u = model.embed(TOKENS).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.score(model.prefix(PROMPTS), u, MASK).sum(), u)
    rms = model.embedding_table_VD.square().mean().sqrt()
    expected = model.skip_head.weight[0] / rms / MASK.sum(-1)[..., None, None] * MASK[..., None]
    torch.testing.assert_close(gradient, expected.expand_as(gradient), atol=1e-6, rtol=1e-4)


def test_it_starts_without_effect_and_survives_saving(any_lm, tmp_path):
    plain = RewardModel.from_base(any_lm, num_layers=1, pooling="mean").freeze()
    fresh = RewardModel.from_base(any_lm, num_layers=1, pooling="mean", input_skip=True).freeze()
    prefix = plain.prefix(PROMPTS)
    assert torch.equal(plain.score(prefix, TOKENS, MASK), fresh.score(prefix, TOKENS, MASK))
    model = skip_model(any_lm)
    model.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path)
    assert torch.equal(again.score(prefix, TOKENS, MASK), model.freeze().score(prefix, TOKENS, MASK))


def test_lora_saves_both_heads(tiny_lm, tmp_path):
    base = tmp_path / "base"
    tiny_lm.save_pretrained(base)
    adapted = add_lora(RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean", input_skip=True), r=2, alpha=4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    assert any("skip_head" in name for name, p in adapted.named_parameters() if p.requires_grad)
    inner = adapted.get_base_model().eval()
    expected = inner.score(inner.prefix(PROMPTS), TOKENS, MASK)
    save_reward_model(adapted, tmp_path / "lora")
    again = load_reward_model(tmp_path / "lora", base=tiny_lm)
    torch.testing.assert_close(again.score(again.prefix(PROMPTS), TOKENS, MASK), expected, atol=1e-5, rtol=0)


def test_heads_have_a_learning_rate_of_their_own(tiny_lm, tmp_path):
    model = RewardModel.from_base(tiny_lm, num_layers=1, pooling="mean", input_skip=True)
    settings = RewardTraining(learning_rate=1e-5, head_learning_rate=1e-2, weight_decay=0.1)
    trainer = RewardTrainer(model=model, args=training_arguments(settings, tmp_path), settings=settings)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable)
    for name, parameter in trainable.items():
        expected = 1e-2 if name.startswith(("head.", "skip_head.")) else 1e-5
        assert rates[id(parameter)] == expected, name

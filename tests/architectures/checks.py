"""What must hold of every supported architecture, each against plain transformers with eager attention and no cache.

A check takes the same :class:`Case` and raises AssertionError with the difference that it found. The order is that of
the columns in docs/models.md.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reward_models.loading import add_lora, load_adapter, load_reward_model, save_reward_model
from reward_models.modelling import RewardModel
from reward_models.secant import SecantHead, save_secant_head
from tests.architectures.zoo import EOS_IDS, LAYERS, PAD_ID, Architecture
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.answering.pipeline import load_gradient
from vgf_llm.evaluation.controls import flipped_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.models.architecture import decoder_layers, decoder_of, layer_outputs, max_positions, vocabulary_rows
from vgf_llm.models.loading import load_causal_lm
from vgf_llm.models.prefix import positions_from_mask
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import Responses, TorchReference, row_seeds
from vgf_llm.text.decoders.make import make_decoder
from vgf_llm.text.particles import exact_gradient
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.training.policy_models import add_policy_lora, response_logps
from vgf_llm.training.settings import PolicySettings

TOLERANCE = 1e-4
NEW_TOKENS = 12
LENGTHS = (5, 14, 21)  # of the prompts: below, above and far above the windows of 8


@dataclass
class Case:
    """One architecture: its folder, what vgf_llm makes of it, and plain transformers next to it."""

    architecture: Architecture
    folder: Path

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The model as transformers loads it, with the attention that applies all there is."""
        attention = self.architecture.plain
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation=attention)
        return model.eval().requires_grad_(False)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The model as vgf_llm loads it."""
        return load_causal_lm(str(self.folder))

    @cached_property
    def value(self) -> RewardModel:
        """A reward model cut from it, with an input skip."""
        value = RewardModel.from_base(self.base, pooling="mean", input_skip=True, seed=1)
        with torch.no_grad():
            value.skip_head.weight.normal_(generator=torch.Generator().manual_seed(2))
        return value.freeze()

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Three prompts without special tokens."""
        ids = torch.randint(8, vocabulary_rows(self.base.config) - 8, (sum(LENGTHS),), generator=_seeded(3)).tolist()
        ends = torch.tensor(LENGTHS).cumsum(0).tolist()
        return [ids[end - length : end] for length, end in zip(LENGTHS, ends, strict=True)]

    @cached_property
    def tokens_BNT(self) -> Tensor:
        """Two responses of six tokens to each prompt."""
        return torch.randint(8, vocabulary_rows(self.base.config) - 8, (len(LENGTHS), 2, 6), generator=_seeded(4))

    @cached_property
    def mask_BNT(self) -> Tensor:
        """Responses of six and of four tokens."""
        mask_BNT = torch.ones_like(self.tokens_BNT, dtype=torch.bool)
        mask_BNT[:, 1, 4:] = False
        return mask_BNT

    @cached_property
    def reference(self) -> TorchReference:
        """The base under a distribution that is close to greedy sampling of 8 tokens."""
        return TorchReference(self.base, SamplingSettings(top_k=8, max_new_tokens=NEW_TOKENS), EOS_IDS, PAD_ID)

    @cached_property
    def short(self) -> TorchReference:
        """The same distribution for responses of half the length."""
        return TorchReference(self.base, SamplingSettings(top_k=8, max_new_tokens=NEW_TOKENS // 2), EOS_IDS, PAD_ID)

    def text(self, b: int, n: int) -> tuple[list[int], list[int]]:
        """Prompt and response of one row, without padding."""
        return self.prompts[b], self.tokens_BNT[b, n][self.mask_BNT[b, n]].tolist()

    def padded(self, left: bool) -> tuple[Tensor, Tensor, Tensor]:
        """All six rows as ids, attention mask and response mask [R, S], padded on one side."""
        rows = [self.text(b, n) for b in range(len(LENGTHS)) for n in range(2)]
        longest = max(len(p) + len(r) for p, r in rows)
        ids, mask, response = [], [], []
        for p, r in rows:
            pad = longest - len(p) - len(r)
            before, after = (pad, 0) if left else (0, pad)
            ids.append([PAD_ID] * before + p + r + [PAD_ID] * after)
            mask.append([0] * before + [1] * (len(p) + len(r)) + [0] * after)
            response.append([0] * (before + len(p)) + [1] * len(r) + [0] * after)
        return torch.tensor(ids), torch.tensor(mask), torch.tensor(response)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Refuse a largest difference above 1e-4, in units of the largest expected value where that is above one."""
    assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    assert apart <= TOLERANCE, f"{what}: largest difference {apart:.3g}"


def body(case: Case) -> None:
    """Hidden states and logits are those of plain transformers, one row at a time."""
    for p, r in (case.text(b, 0) for b in range(len(LENGTHS))):
        ids = torch.tensor([p + r])
        expected = decoder_of(case.plain)(input_ids=ids, use_cache=False).last_hidden_state
        close(case.value.body(input_ids=ids, use_cache=False).last_hidden_state, expected, "body")
        close(
            case.base(input_ids=ids, use_cache=False).logits,
            case.plain(input_ids=ids, use_cache=False).logits,
            "logits",
        )


@torch.no_grad()
def embeddings(case: Case) -> None:
    """Ids and rows of the table give the same score; the table is what `embed` returns, bit for bit, in every dtype."""
    ids, mask, response = case.padded(left=True)
    scores = case.value(ids, mask, response_mask=response)
    rows = case.value(None, mask, inputs_embeds=case.value.embedding_table_VD[ids], response_mask=response)
    assert torch.equal(scores, rows)
    close(
        case.base(
            inputs_embeds=case.value.embed(ids), attention_mask=mask, position_ids=positions_from_mask(mask)
        ).logits,
        case.base(input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask)).logits,
        "logits from embeddings",
    )
    half = copy.deepcopy(case.value.get_input_embeddings()).bfloat16()
    held = case.value.get_input_embeddings()
    case.value.set_input_embeddings(half)
    try:
        every = torch.arange(half.weight.shape[0])
        assert torch.equal(case.value.embedding_table_VD, case.value.embed(every))
    finally:
        case.value.set_input_embeddings(held)


@torch.no_grad()
def padding(case: Case) -> None:
    """A row's score is the same alone, padded on the left and padded on the right."""
    both = [case.value(ids, mask, response_mask=response) for ids, mask, response in map(case.padded, (True, False))]
    alone = []
    for b in range(len(LENGTHS)):
        for n in range(2):
            p, r = case.text(b, n)
            alone.append(case.value(torch.tensor([p + r]), response_mask=torch.tensor([[0] * len(p) + [1] * len(r)])))
    close(both[0], torch.cat(alone), "left padding")
    close(both[1], torch.cat(alone), "right padding")


@torch.no_grad()
def prefix(case: Case) -> None:
    """Scores from cached prompts are those of whole texts, from ids and from embeddings, in a batch and alone."""
    ids, mask, response = case.padded(left=True)
    expected_BN = case.value(ids, mask, response_mask=response).view(len(LENGTHS), 2)
    cached = case.value.prefix(case.prompts)
    close(case.value.score(cached, case.tokens_BNT, case.mask_BNT), expected_BN, "score")
    close(
        case.value.score(cached, case.value.embed(case.tokens_BNT), case.mask_BNT), expected_BN, "score of embeddings"
    )
    alone = case.value.prefix(case.prompts[1:2])
    close(case.value.score(alone, case.tokens_BNT[1:2], case.mask_BNT[1:2]), expected_BN[1:2], "score alone")


def gradient(case: Case) -> None:
    """The gradient with a cached prompt is that of the whole text, also at particles that are off the table."""
    ids, mask, response = case.padded(left=True)
    noise = 0.1 * torch.randn(*case.tokens_BNT.shape, case.value.embedding_width, generator=_seeded(5))
    u_BNTD = (case.value.embed(case.tokens_BNT) + noise).detach().requires_grad_()
    score_BN = case.value.score(case.value.prefix(case.prompts), u_BNTD, case.mask_BNT)
    (found,) = torch.autograd.grad(score_BN.sum(), u_BNTD)
    whole = case.value.embed(ids).detach()
    whole[response.bool()] = u_BNTD.detach()[case.mask_BNT]
    whole.requires_grad_()
    whole_R = case.value(None, mask, inputs_embeds=whole, response_mask=response)
    close(score_BN.detach().flatten(), whole_R.detach(), "score off the table")
    (expected,) = torch.autograd.grad(whole_R.sum(), whole)
    close(found[case.mask_BNT], expected[response.bool()], "gradient")


@torch.no_grad()
def cut(case: Case) -> None:
    """Two of three layers: the base's first two, then its final norm."""
    short = RewardModel.from_base(case.base, num_layers=LAYERS - 1, input_skip=True)
    assert short.config.num_layers == LAYERS - 1 and len(decoder_layers(short.body)[1]) == LAYERS - 1
    ids = torch.tensor([case.prompts[2]])
    expected = layer_outputs(decoder_of(case.plain), LAYERS - 2, input_ids=ids, use_cache=False)
    close(layer_outputs(short.body, LAYERS - 2, input_ids=ids, use_cache=False), expected, "second layer")
    expected = without_last_layer(decoder_of(case.plain), ids)
    close(short.body(input_ids=ids, use_cache=False).last_hidden_state, expected, "cut body")
    close(short.score(short.prefix(case.prompts), case.tokens_BNT, case.mask_BNT), _whole(short, case), "score")


def without_last_layer(decoder: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return what a decoder gives out where its last layer passes its input on."""
    last = decoder_layers(decoder)[1][-1]

    def pass_on(_module: torch.nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = last.register_forward_hook(pass_on, with_kwargs=True)
    try:
        return decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        handle.remove()


def _whole(value: RewardModel, case: Case) -> Tensor:
    ids, mask, response = case.padded(left=False)
    with torch.no_grad():
        return value(ids, mask, response_mask=response).view(len(LENGTHS), 2)


def saved(case: Case) -> None:
    """A model that is saved and loaded scores the same."""
    with tempfile.TemporaryDirectory() as folder:
        save_reward_model(case.value, folder)
        loaded = load_reward_model(folder)
    close(_whole(loaded, case), _whole(case.value, case), "score")


def lora(case: Case) -> None:
    """A LoRA with the default targets: shared, saved, loaded with the base and from its folder, merged."""
    plain = _whole(RewardModel.from_base(case.base, seed=1), case)
    shared = RewardModel.from_base(case.base, share=True, seed=1)
    close(_whole(shared, case), plain, "shared body")
    adapted = add_lora(shared, r=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=_seeded(6))
    expected = _whole(adapted.get_base_model(), case)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        save_reward_model(adapted, folder)
        close(_whole(load_adapter(folder, case.base).get_base_model(), case), expected, "with the base")
        close(_whole(load_reward_model(folder), case), expected, "merged, from disk")


def policy(case: Case) -> None:
    """A policy's LoRA with the default targets gets gradients everywhere; saved, it is loaded as a base and merged."""
    adapted = add_policy_lora(load_causal_lm(str(case.folder)), PolicySettings(lora_r=2, lora_alpha=4.0)).train()
    ids, mask, _ = case.padded(left=True)
    response_logps(adapted, ids, mask, length=6).sum().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    assert trained and not without, f"no gradient: {without[:3]}"
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=_seeded(8)))
        expected = response_logps(adapted.eval(), ids, mask, length=6)
        plain = response_logps(case.base, ids, mask, length=6)
        assert not torch.allclose(expected, plain, atol=1e-3)
        adapted.save_pretrained(folder)
        close(response_logps(load_causal_lm(folder), ids, mask, length=6), expected, "merged, from disk")


def likelihood(case: Case) -> None:
    """Log-probabilities of responses are those of plain transformers, one whole text at a time."""
    responses = Responses(case.prompts, case.tokens_BNT, case.mask_BNT, EOS_IDS, PAD_ID)
    found = case.reference.logps(case.reference.prefix(case.prompts), responses)
    for b in range(len(LENGTHS)):
        for n in range(2):
            p, r = case.text(b, n)
            logps = case.plain(input_ids=torch.tensor([p + r]), use_cache=False).logits[0].log_softmax(-1)
            expected = logps[len(p) - 1 : -1].gather(-1, torch.tensor(r)[:, None])[:, 0]
            close(found[b, n, : len(r)], expected, "log-probability")


def greedy(case: Case) -> None:
    """Greedy tokens are those of plain transformers without a cache."""
    written = case.reference.write(case.reference.prefix(case.prompts), 1, lambda logits, _: logits.argmax(-1))
    for b, prompt in enumerate(case.prompts):
        found = written.tokens_BNT[b, 0][written.mask_BNT[b, 0]].tolist()
        assert found == continued(case.plain, prompt, NEW_TOKENS), f"prompt {b}"


def continued(model: PreTrainedModel, ids: list[int], new_tokens: int) -> list[int]:
    """Return the greedy continuation up to and with an EOS, every step a whole forward."""
    written: list[int] = []
    while len(written) < new_tokens and not (written and written[-1] in EOS_IDS):
        written.append(int(model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax()))
    return written


def rewrite(case: Case) -> None:
    """After any number of kept tokens the rest is the greedy continuation of prompt and kept tokens."""
    tokens_BNT = torch.randint(8, vocabulary_rows(case.base.config) - 8, (3, 2, NEW_TOKENS), generator=_seeded(7))
    mask_BNT = torch.ones_like(tokens_BNT, dtype=torch.bool)
    keep_BN = torch.tensor([[0, 9], [3, 7], [1, 10]])
    responses = Responses(case.prompts, tokens_BNT, mask_BNT, EOS_IDS, PAD_ID)
    found = case.reference.rewrite(
        case.reference.prefix(case.prompts), responses, keep_BN, lambda logits, _: logits.argmax(-1)
    )
    for b, prompt in enumerate(case.prompts):
        for n in range(2):
            kept = tokens_BNT[b, n, : keep_BN[b, n]].tolist()
            rest = continued(case.plain, prompt + kept, NEW_TOKENS - len(kept))
            assert found.tokens_BNT[b, n][found.mask_BNT[b, n]].tolist() == kept + rest, f"row {b}, {n}"


def zero_budget(case: Case) -> None:
    """No budget and a budget of 0 nats give the originals back, token for token."""
    seeds = row_seeds(0, [0, 1, 2], 2)
    decoder = make_decoder("prior", case.short, case.value)
    for budget in (TransportBudget.none(), TransportBudget(nats=0.0)):
        outcome = ImplicitPolicy(ReferenceSampler(case.short), case.value, decoder, budget)(case.prompts, seeds)
        assert torch.equal(outcome.transported.tokens_BNT, outcome.originals.tokens_BNT)
        assert torch.equal(outcome.transported.mask_BNT, outcome.originals.mask_BNT)


def moved(case: Case) -> None:
    """Eight nats through a value with an input skip raise it, and the flipped direction lowers it."""
    seeds = row_seeds(0, [0, 1, 2], 4)
    with torch.no_grad():
        value = copy.deepcopy(case.value)
        value.skip_head.weight.mul_(8.0)  # the linear part decides
    decoder, gains = make_decoder("prior", case.short, value), []
    for source in (exact_gradient, flipped_gradient()):
        budget = TransportBudget(nats=8.0, max_token_nats=4.0)
        policy = ImplicitPolicy(ReferenceSampler(case.short), value, decoder, budget, gradient=source)
        outcome = policy(case.prompts, seeds)
        gains.append(float((outcome.transported_values_BN - outcome.original_values_BN).mean()))
    assert gains[0] > 0 > gains[1], f"mean gains {gains}"


def secant(case: Case) -> None:
    """A secant head in the reward model's folder is read, and its directions are the input skip's before any fit."""
    with tempfile.TemporaryDirectory() as folder:
        save_reward_model(case.value, folder)
        save_secant_head(SecantHead(case.value.embedding_width, hidden=8), folder)
        source = load_gradient(folder, case.value)
    responses = Responses(case.prompts, case.tokens_BNT, case.mask_BNT, EOS_IDS, PAD_ID)
    values, direction = source(case.value, case.value.prefix(case.prompts), responses)(
        case.value.embed(case.tokens_BNT)
    )
    close(values, _whole(case.value, case), "value")
    close(direction, case.value.skip_gradient(case.mask_BNT), "direction")
    assert source.passes > 1


def limits(case: Case) -> None:
    """Rows of the table and positions are found, wherever the configuration keeps them."""
    assert vocabulary_rows(case.base.config) == case.base.get_input_embeddings().weight.shape[0]
    assert max_positions(case.base.config) in (None, 128), max_positions(case.base.config)


CHECKS: dict[str, Callable[[Case], None]] = {
    "limits": limits,
    "body": body,
    "ids": embeddings,
    "padding": padding,
    "prefix": prefix,
    "gradient": gradient,
    "cut": cut,
    "saved": saved,
    "LoRA": lora,
    "policy": policy,
    "logps": likelihood,
    "greedy": greedy,
    "rewrite": rewrite,
    "zero": zero_budget,
    "moved": moved,
    "secant": secant,
}

"""A text has one beginning and one end, the same in training, sampling and scoring."""

from __future__ import annotations

import pytest
import torch

from reward_models.logged import LoggedResponse, encode_logged
from reward_models.modelling import RewardModel
from reward_models.pairs import check_rows, encode_pairs
from tests.byte_tokenizers import CHATML, LLAMA2, byte_tokenizer
from tests.conftest import build_llama, build_tokenizer
from vgf_llm.answering.pipeline import encode_prompts, load_pipeline
from vgf_llm.data.encoding import encode_prompt, encode_response, encode_text, set_in_template, template_variables
from vgf_llm.data.endings import check_ids, closed, closing_id, eos_ids_of, padding_id, remember_eos_ids
from vgf_llm.data.prompts import PreferencePair
from vgf_llm.errors import DataError, ModelError
from vgf_llm.models.loading import eos_token_ids, fingerprint, load_tokenizer
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.text import row_seeds
from vgf_llm.text.decoders.make import make_decoder
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.sampler import ReferenceSampler

END, START, TURN_END, PAD, BOS, EOS = range(6)


def last(tokenizer, text="Sure."):
    return encode_response(tokenizer, text, eos=True)[-1]


def test_a_response_is_closed_as_the_template_closes_the_turn():
    """ChatML ends a turn with <|im_end|>, whatever the tokenizer calls its EOS."""
    tokenizer = byte_tokenizer(eos="<|endoftext|>", pad="<pad>")
    assert last(tokenizer) == closing_id(tokenizer) == TURN_END
    remember_eos_ids(tokenizer, [END, TURN_END])
    assert last(tokenizer) == TURN_END and eos_ids_of(tokenizer) == (END, TURN_END)
    remember_eos_ids(tokenizer, [END])  # sampling never stops at <|im_end|>, so nothing trained may end there
    assert last(tokenizer) == END
    assert last(byte_tokenizer(eos="<|endoftext|>", pad="<pad>", template=None)) == END
    assert last(byte_tokenizer(eos="</s>", pad="<pad>", bos="<s>", template=LLAMA2)) == EOS


def test_the_closing_follows_a_template_that_is_changed():
    tokenizer = byte_tokenizer(eos="<|endoftext|>", pad="<pad>")
    assert closing_id(tokenizer) == TURN_END
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    assert closing_id(tokenizer) == EOS
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert closing_id(tokenizer) == END


def test_training_rows_of_every_kind_end_alike():
    tokenizer = byte_tokenizer(eos="<|endoftext|>", pad="<pad>")
    (pair,), _ = encode_pairs(tokenizer, [PreferencePair("Hi", "Yes.", "No.<|im_end|>\n")], 64)
    (row,), _ = encode_logged(tokenizer, [LoggedResponse("Hi", "Yes.", 1.0)], 64)
    assert pair.chosen == row.response == encode_response(tokenizer, "Yes.", eos=True)
    assert pair.chosen[-1] == pair.rejected[-1] == TURN_END and pair.rejected.count(TURN_END) == 1


@pytest.mark.parametrize("text", ["Sure.<|im_end|>", "Sure.<|im_end|>\n", "Sure.<|im_end|><|endoftext|>", "Sure."])
def test_a_response_has_one_end(text):
    tokenizer = byte_tokenizer()
    assert encode_response(tokenizer, text, eos=True) == [*encode_response(tokenizer, "Sure.", eos=False), TURN_END]


def test_an_end_with_text_after_it_is_part_of_the_text():
    tokenizer = byte_tokenizer()
    ids = encode_response(tokenizer, "a<|im_end|>b", eos=False)
    assert TURN_END in ids and closed(tokenizer, ids) == [*ids, TURN_END]


def test_a_tokenizer_without_eos_closes_nothing():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        closed(tokenizer, [7])


@pytest.mark.parametrize("adds", ["bos", "bos eos", "eos", ""])
@pytest.mark.parametrize("text", ["Hi", "<s>Hi", "Hi</s>", "<s>Hi</s>"])
def test_a_text_has_one_bos_and_keeps_its_own_eos(adds, text):
    tokenizer = byte_tokenizer(eos="</s>", pad="<pad>", bos="<s>", template=None, adds=adds)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = plain if "bos" not in adds or text.startswith("<s>") else [BOS, *plain]
    assert encode_text(tokenizer, text) == encode_prompt(tokenizer, text) == expected


def test_a_prompt_that_the_template_wrote_is_not_written_again():
    tokenizer = byte_tokenizer()
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    expected = encode_prompt(tokenizer, "Hi")
    assert encode_prompt(tokenizer, whole) == encode_prompt(tokenizer, whole.rstrip()) == expected
    quoted = encode_prompt(tokenizer, "explain <|im_start|>assistant to me")
    assert quoted[0] == START and quoted.count(START) == 3


# Sampling ----------------------------------------------------------------------------------------------------------


def flat(rows: int):
    """A model of equal logits: every row of its table is as likely as any other."""
    model = build_llama(tied=False)
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_every_eos_ends_a_text_also_where_it_is_the_padding_token():
    """Qwen's arrangement: EOS <|im_end|> and <|endoftext|>, padding <|endoftext|>."""
    tokenizer, model = byte_tokenizer(), flat(24)
    model.generation_config.eos_token_id = [TURN_END, END]
    ends = eos_token_ids(model, tokenizer)
    assert ends == (END, TURN_END) and tokenizer.pad_token_id == END
    reference = TorchReference(model, SamplingSettings(max_new_tokens=12, top_k=0, top_p=1.0), ends, END)
    drawn = ReferenceSampler(reference).sample([[7, 8], [9]], row_seeds(0, [0, 1], 64))
    ended = 0
    for tokens, mask in zip(drawn.tokens_BNT.flatten(0, 1), drawn.mask_BNT.flatten(0, 1), strict=True):
        text = tokens[mask].tolist()
        assert not set(text[:-1]) & {END, TURN_END}
        ended += text[-1] == END
    assert ended > 10
    again = drawn.with_tokens(drawn.tokens_BNT)
    assert torch.equal(again.mask_BNT, drawn.mask_BNT) and torch.equal(
        drawn.take(torch.tensor([[3], [5]])).mask_BNT, drawn.mask_BNT[[0, 1], [3, 5]].unsqueeze(1)
    )


def test_rows_of_a_padded_table_are_never_drawn():
    model = flat(64)
    sampling = SamplingSettings(max_new_tokens=8, top_k=0, top_p=1.0)
    reference = TorchReference(model, sampling, (2,), 0, vocabulary=20)
    drawn = ReferenceSampler(reference).sample([[7, 8], [9]], row_seeds(0, [0, 1], 32))
    assert int(drawn.tokens_BNT.max()) == 19
    distribution = reference.shortlists(reference.prefix(drawn.prompts), drawn)
    assert int(distribution.ids.max()) == 19 and distribution.logps.exp().sum(-1).allclose(torch.ones(()))
    written = reference.rewrite(
        reference.prefix(drawn.prompts),
        drawn,
        torch.zeros(2, 32, dtype=torch.int64),
        lambda logits_RV, _: logits_RV.argmax(-1).clamp(min=logits_RV.shape[1] - 1),
    )
    assert int(written.tokens_BNT.max()) == 19


# Whole commands ----------------------------------------------------------------------------------------------------


def saved(folder, tokenizer, base_rows: int, value_rows: int) -> ModelSettings:
    base = build_llama(tied=False)
    base.resize_token_embeddings(base_rows)
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    cut = build_llama(tied=False)
    cut.resize_token_embeddings(value_rows)
    value = RewardModel.from_base(cut)
    torch.nn.init.normal_(value.head.weight)
    for name, model in (("base", base), ("value", value)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ModelSettings(model_name_or_path=str(folder / "base"), reward_model=str(folder / "value"))


@pytest.mark.parametrize("decoder", ["prior", "block", "edit", "edit_greedy", "pivot", "nearest"])
def test_a_base_with_more_rows_than_the_reward_model(tmp_path, decoder):
    from vgf_llm.answering.implicit_policy import ImplicitPolicy
    from vgf_llm.flow.budget import TransportBudget

    tokenizer = build_tokenizer()
    models = saved(tmp_path, tokenizer, len(tokenizer) + 64, len(tokenizer))
    sampling = SamplingSettings(max_new_tokens=8, top_k=200, top_p=1.0)
    pipeline = load_pipeline(models, sampling)
    assert pipeline.reference.vocabulary == len(tokenizer)
    budget = TransportBudget(steps=2, kernel="none")
    policy = ImplicitPolicy(
        ReferenceSampler(pipeline.reference),
        pipeline.value,
        make_decoder(decoder, pipeline.reference, pipeline.value),
        budget,
        gradient=pipeline.gradient,
    )
    outcome = policy(encode_prompts(pipeline, ["a dog", "tea"]), row_seeds(0, [0, 1], 4))
    for part in (outcome.originals, outcome.transported, outcome.selected):
        assert int(part.tokens_BNT.max()) < len(tokenizer)


def test_nearest_never_picks_padding_of_the_table(tmp_path):
    tokenizer = build_tokenizer()
    models = saved(tmp_path, tokenizer, len(tokenizer) + 64, len(tokenizer) + 64)
    pipeline = load_pipeline(models, SamplingSettings(max_new_tokens=4))
    decoder = make_decoder("nearest", pipeline.reference, pipeline.value)
    assert decoder.vocabulary == len(tokenizer) and len(decoder.table_VD) == len(tokenizer) + 64


def test_a_tokenizer_with_a_token_more_than_rows(tmp_path):
    """Gemma 3 1B: one image token that no text has."""
    tokenizer = build_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    models = saved(tmp_path, tokenizer, rows, rows)
    pipeline = load_pipeline(models, SamplingSettings(max_new_tokens=4))
    assert pipeline.reference.vocabulary == rows
    assert len(encode_prompts(pipeline, ["a dog"])) == 1
    with pytest.raises(DataError, match=f"prompt 1 holds the token '<image>' .id {rows}., and the model's table has"):
        encode_prompts(pipeline, ["a dog", "a <image>"])
    pairs, _ = encode_pairs(tokenizer, [PreferencePair("a", "dog", "<image> cat")], 64)
    check_rows(tokenizer, pairs, rows + 1)
    with pytest.raises(DataError, match="the rejected of encoded row 0 holds the token '<image>'"):
        check_rows(tokenizer, pairs, rows)
    with pytest.raises(ModelError, match="train the reward model on this base model"):
        load_pipeline(saved(tmp_path / "short", tokenizer, rows, rows - 8), SamplingSettings())


def test_padding_may_lie_beyond_the_table():
    tokenizer = build_tokenizer()
    assert padding_id(tokenizer, 60) == tokenizer.pad_token_id
    tokenizer.add_tokens(["<fill>"], special_tokens=True)
    tokenizer.pad_token = "<fill>"
    assert padding_id(tokenizer, len(tokenizer) - 1) == 0
    check_ids(tokenizer, [], 3, "nothing")


def test_a_loaded_tokenizer_knows_the_generation_configs_ends(tmp_path):
    tokenizer, model = byte_tokenizer(eos="<|endoftext|>", pad="<pad>"), flat(320)
    model.generation_config.eos_token_id = [END, TURN_END]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert eos_ids_of(loaded) == eos_token_ids(model, tokenizer) == (END, TURN_END)
    assert last(loaded) == TURN_END
    (tmp_path / "generation_config.json").unlink()
    assert last(load_tokenizer(str(tmp_path))) == TURN_END


@pytest.mark.parametrize("decoder", ["prior", "block", "edit", "edit_greedy", "pivot", "nearest"])
def test_what_fills_padding_changes_nothing_not_even_an_eos(decoder):
    """Masks tell padding: the same texts, values and moves whether filled with 0, an EOS or a word."""
    from vgf_llm.answering.implicit_policy import ImplicitPolicy
    from vgf_llm.flow.budget import TransportBudget

    torch.manual_seed(3)
    base = build_llama()
    value = RewardModel.from_base(base).eval()
    torch.nn.init.normal_(value.head.weight)
    found = []
    for pad_id in (2, 5) if decoder == "nearest" else (0, 2, 5, 9):  # nearest never writes the padding token
        reference = TorchReference(
            base, SamplingSettings(max_new_tokens=10, top_k=30, temperature=2.0), (2, 5, 11), pad_id
        )
        policy = ImplicitPolicy(
            ReferenceSampler(reference),
            value,
            make_decoder(decoder, reference, value),
            TransportBudget(steps=3, kernel="none", rounds=2, nats=4.0),
            draws=2,
        )
        found.append(policy([[7, 8], [9, 10, 12]], row_seeds(0, [0, 1], 6)))
    first = found[0]
    assert first.transported.eos_BNT.any() and not first.transported.mask_BNT.all()
    for other in found[1:]:
        for name in ("originals", "transported", "selected"):
            one, same = getattr(first, name), getattr(other, name)
            assert torch.equal(one.mask_BNT, same.mask_BNT)
            assert torch.equal(one.tokens_BNT[one.mask_BNT], same.tokens_BNT[same.mask_BNT])
        torch.testing.assert_close(first.selected_values_B, other.selected_values_B)


THINKING = "\n" + CHATML.replace(
    "<|im_start|>assistant\n", "<|im_start|>assistant\n' }}{% if not (thinking is defined and thinking) %}{{ 'No.\n"
).replace("{% endif %}", "{% endif %}{% endif %}")


def test_variables_of_a_template_are_fixed_in_it():
    tokenizer = byte_tokenizer(template=THINKING)
    whole = {
        thinking: tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False, thinking=thinking
        )
        for thinking in (True, False)
    }
    assert whole[False] == whole[True] + "No.\n"
    for thinking, expected in whole.items():
        tokenizer = byte_tokenizer(template=THINKING)
        set_in_template(tokenizer, {"thinking": thinking})
        assert tokenizer.decode(encode_prompt(tokenizer, "Hi")) == expected
        assert closing_id(tokenizer) == TURN_END
    plain, other = byte_tokenizer(template=THINKING), byte_tokenizer(template=THINKING)
    set_in_template(plain, {})
    set_in_template(other, {"thinking": None})
    assert fingerprint(plain) == fingerprint(byte_tokenizer(template=THINKING)) != fingerprint(other)
    for broken, said in (
        ({"thinkng": True}, "no variable 'thinkng'"),
        ({"messages": []}, "no variable 'messages'"),
        ({"thinking": {1, 2}}, "thinking must be a JSON value"),
    ):
        with pytest.raises(ModelError, match=said):
            set_in_template(byte_tokenizer(template=THINKING), broken)
    with pytest.raises(ModelError, match="no single chat template"):
        set_in_template(byte_tokenizer(template=None), {"thinking": True})


def test_variables_are_read_back_from_a_template_also_a_saved_one(tmp_path):
    variables = {"thinking": None, "tone": ['100% "so" {{ x }} %}', {"deep": [1, -2.5, True]}]}
    tokenizer = byte_tokenizer(template="{% if tone is defined %}{{ tone }}{% endif %}" + THINKING)
    assert template_variables(tokenizer) == template_variables(None) == {}
    set_in_template(tokenizer, variables)
    tokenizer.save_pretrained(tmp_path)
    assert template_variables(tokenizer) == template_variables(load_tokenizer(str(tmp_path))) == variables


def test_variables_that_are_set_again_take_new_values_and_keep_their_letters():
    body = "{% if tone is defined %}{{ tone }}{% endif %}" + THINKING
    tokenizer, at_once = byte_tokenizer(template=body), byte_tokenizer(template=body)
    set_in_template(tokenizer, {"tone": "stern", "thinking": False})
    set_in_template(tokenizer, {"tone": "höflich 😀"})
    set_in_template(at_once, {"tone": "höflich 😀", "thinking": False})
    assert tokenizer.chat_template == at_once.chat_template
    assert template_variables(tokenizer) == {"tone": "höflich 😀", "thinking": False}
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi")).startswith("höflich 😀")

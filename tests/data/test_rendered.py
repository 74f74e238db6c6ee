"""A prompt that a chat template has written already is not written into it again."""

from __future__ import annotations

import pytest

from tests.byte_tokenizers import CHATML, LLAMA2, byte_tokenizer
from vgf_llm.data.encoding import encode_prompt
from vgf_llm.errors import DataError

# What the templates of these families write, with the marks that the byte tokenizer has.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
ALWAYS_OPEN = LLAMA3.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN = "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}" + CHATML
FAMILIES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "open": ALWAYS_OPEN, "phi3": PHI3, "qwen": QWEN}
ASKED = [{"role": "user", "content": "Hi."}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "No."}]
AGAIN = [*ANSWERED, {"role": "user", "content": "Why?"}]


def tokenizer_of(family):
    return byte_tokenizer(eos="</s>", pad="<pad>", bos="<s>", template=FAMILIES[family], adds="bos")


def written(tokenizer, messages, open_turn):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [ASKED, AGAIN])
@pytest.mark.parametrize("open_turn", [True, False])
def test_a_templated_prompt_is_encoded_as_its_messages(family, messages, open_turn):
    tokenizer = tokenizer_of(family)
    text = written(tokenizer, messages, open_turn)
    expected = encode_prompt(tokenizer, messages)
    for shape in (text, text.rstrip(), text.removeprefix("<s>"), "\n" + text):
        assert encode_prompt(tokenizer, shape) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_has_begun_is_kept(family):
    tokenizer = tokenizer_of(family)
    text = written(tokenizer, AGAIN, True) + "Because"
    assert encode_prompt(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["chatml", "llama3", "phi3", "qwen"])
def test_a_templated_prompt_that_is_answered_is_refused(family):
    tokenizer = tokenizer_of(family)
    with pytest.raises(DataError, match="ends in the assistant's answer; end it before the answer, or give messages"):
        encode_prompt(tokenizer, written(tokenizer, ANSWERED, False))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_quotes_the_marks_is_a_users_message(family):
    tokenizer = tokenizer_of(family)
    text = "Explain <|im_start|> and </s> to me."
    assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, [{"role": "user", "content": text}])


def test_a_system_turn_that_the_template_leaves_out_is_refused():
    only_users = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    tokenizer = byte_tokenizer(template=only_users)
    assert encode_prompt(tokenizer, ASKED)
    with pytest.raises(DataError, match="the chat template leaves out the system turn 'Be brief.'; write it into"):
        encode_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, *ASKED])

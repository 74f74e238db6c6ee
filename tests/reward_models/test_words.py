"""Words, phrases and sentences of many scripts, counted and compared by hand."""

from __future__ import annotations

import unicodedata

import pytest

from reward_models.words import ends_in_question, holds, sentences_of, words_of
from tests.reward_models.test_constraints import kept
from vgf_llm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don’t DON'T don‘t donʼt", ["don't"] * 4),
        ("well-known well‑known", ["well-known"] * 2),
        ("3.5 of 1,000; 10:30 v2", ["3.5", "of", "1,000", "10:30", "v2"]),
        ("e.g. the U.S. and so.on", ["e.g", "the", "u.s", "and", "so", "on"]),
        ("snake_case, and/or (both)", ["snake", "case", "and", "or", "both"]),
        ("Café cafe\u0301 ＣＡＦＥ́", ["café"] * 3),
        ("Straße STRASSE so\u00adft", ["strasse", "strasse", "soft"]),
        ("Привет, как дела? Ёж", ["привет", "как", "дела", "ёж"]),
        ("مرحبا، كيف حالك؟ مـــرحبا", ["مرحبا", "كيف", "حالك", "مرحبا"]),
        ("می‌خواهم بروم", ["میخواهم", "بروم"]),
        ("नमस्ते दुनिया, हिन्दी।", ["नमस्ते", "दुनिया", "हिन्दी"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("我爱北京。AI技术3.5", [*"我爱北京", "ai", *"技术", "3.5"]),
        ("コーヒーを飲む", list("コーヒーを飲む")),
        ("ภาษาไทย", ["ภ", "า", "ษ", "า", "ไ", "ท", "ย"]),
        ("... -- ☺️ 👩‍👧 ' ", []),
    ],
)
def test_words_of_a_text(text, words):
    assert words_of(text) == words


def test_a_phrase_may_be_looked_for_from_a_word_on():
    text = "(C++ is fun!)"
    assert holds(text, "(C++") and holds(text, "c++") and holds(text, "is fun", 1) and holds(text, "fun!)", 2)
    assert not holds(text, "c++", 1) and not holds(text, "is fun", 2) and not holds(text, "fun?")
    assert holds("deep. dark", "deep dark") and not holds("東。京", "東京")


@pytest.mark.parametrize(
    ("banned", "broken", "whole"),
    [
        ("don't", "I don’t know", "I do not, t"),
        ("New York", "to NEW\n  york!", "renew York, New Yorker"),
        ("rock & roll", "Rock &  roll", "rock and roll; rock, roll"),
        ("C++", "We like C++.", "We like C and c+."),
        ("🙂", "well 🙂", "well ☹"),
        ("sea", "The Sea.", "the season, sea-salt"),
        ("кот", "Это КОТ.", "котлета"),
        ("कमल", "यह कमल है।", "कमला"),
        ("قلم", "هذا قلم؟", "قلمي"),
        ("東京", "私は東京に", "京東"),
        ("สวย", "เธอสวยมาก", "เธอสูง"),
        ("Ελλάδας", "ΕΛΛΑΔΑΣ Ελλάδας", "Ελλάδα"),
    ],
)
def test_banned_words_and_phrases_of_any_script(banned, broken, whole):
    assert kept("without_words", [broken, whole], banned=[banned]) == [0, 1]


def test_a_word_in_the_second_half_of_any_script():
    """Six characters, of which 东西 are the last two and 我想 the first; a phrase has to stand there as a whole."""
    assert kept("word_in_second_half", ["我想买那东西"], word="东西") == [1]
    assert kept("word_in_second_half", ["我想买那东西"], word="我想") == [0]
    assert kept("word_in_second_half", ["one two New York"], word="new york") == [1]
    assert kept("word_in_second_half", ["one New York two"], word="new york") == [0]
    assert kept("word_in_second_half", ["Well, I don’t"], word="don't") == [1]


def test_letters_of_any_script():
    assert kept("without_letter", ["cafe", "caf\u00e9", "cafe\u0301"], letter="e") == [0, 1, 1]
    assert kept("without_letter", ["cafe", "caf\u00e9", "CAFE\u0301"], letter="\u00e9") == [1, 0, 0]
    assert kept("without_letter", ["Ещё", "нет ежа"], letter="Ё") == [0, 1]
    assert kept("without_letter", ["कि", "गि"], letter="क") == [0, 1]
    assert kept("without_letter", ["ΟΔΟΣ", "dog b"], letter="ς a") == [0, 1]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("今天天气好。明天呢？不知道！", ["今天天气好。", "明天呢？", "不知道！"]),
        ("「はい。」と彼は言った。本当？！", ["「はい。」と彼は言った。", "本当？！"]),
        ("他说：“你好。”她笑了。", ["他说：“你好。”", "她笑了。"]),
        ("كيف حالك؟ أنا بخير. حسنا", ["كيف حالك؟", "أنا بخير.", "حسنا"]),
        ("यह घर है। वह कौन है? हाँ", ["यह घर है।", "वह कौन है?", "हाँ"]),
        ("Really?! Yes... Fine", ["Really?!", "Yes...", "Fine"]),
        ("Well... maybe. Wait… what?", ["Well... maybe.", "Wait… what?"]),
        ('"Stop!" he said. "Go." She went.', ['"Stop!" he said.', '"Go."', "She went."]),
        ("Dr. No met Mrs. Lee vs. Kim.", ["Dr. No met Mrs. Lee vs. Kim."]),
        ("Take fruit, e.g. Pears, i.e. food. See", ["Take fruit, e.g. Pears, i.e. food.", "See"]),
        ("At 5 p.m. we left. It was 6 p.m. Then home.", ["At 5 p.m. we left.", "It was 6 p.m.", "Then home."]),
        ("No. It is No. 5, etc. and 3.5 more.", ["No.", "It is No. 5, etc. and 3.5 more."]),
        ("1. Mix.\n2. Bake it.", ["1. Mix.", "2. Bake it."]),
        ("**1.** Do this.\n**2. And that.**", ["**1.** Do this.", "**2. And that.**"]),
        ("1\\. Do\n2\\. Rest.", ["1\\. Do\n2\\. Rest."]),
        ("a. Mix it.\n  b. Bake it.", ["a. Mix it.", "b. Bake it."]),
        ("Step 1. Do it.\n## Step 2. Rest.", ["Step 1. Do it.", "## Step 2. Rest."]),
        ("On Jan. 5 we met. It was Dec. Then snow.", ["On Jan. 5 we met.", "It was Dec.", "Then snow."]),
        ("Great!😀 Use `x.` It is so.[1] Fine.👍🏽", ["Great!😀", "Use `x.`", "It is so.[1]", "Fine.👍🏽"]),
        ("It was plan B. Then home.", ["It was plan B.", "Then home."]),
        ("It began in 1999. Then 7.\nEnd", ["It began in 1999.", "Then 7.", "End"]),
        ("it is so. so it is.", ["it is so.", "so it is."]),
        ("สวัสดี วันนี้ร้อน", ["สวัสดี วันนี้ร้อน"]),
    ],
)
def test_sentences_of_many_scripts(text, sentences):
    assert sentences_of(text) == sentences
    assert kept("sentences_exactly", [text], number=len(sentences)) == [1]


@pytest.mark.parametrize(
    "text",
    [
        "Is it?", "好吗？", "好吗？」", "كيف؟", "“Is it?”", "(Is it?)\n", "**Is it?**", "«Vraiment ?»", "Really?!",
        "What!?", "Is it? \u200b", "Is it? 😀", "Is it?❤️", "Is it? :)", "Is it? ;-D", "Is it `so?`", "Is it?[1]",
    ],
)  # fmt: skip
def test_questions(text):
    assert ends_in_question(text) and kept("ends_with_question", [text, text + " No."]) == [1, 0]


def test_a_text_and_its_decomposed_form_are_the_same():
    text = "Crème brûlée, ผู้ใหญ่, 한국어. がぎ。Ça va?"
    other = unicodedata.normalize("NFD", text)
    assert other != text and words_of(other) == words_of(text) and len(sentences_of(other)) == 3


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("without_words", {"banned": ["sea", " "]}),
        ("word_in_second_half", {"word": ""}),
        ("without_letter", {"letter": "\u200d"}),
    ],
)
def test_a_blank_limit_is_refused(name, limits):
    with pytest.raises(ConfigError, match=f"{name}: .* is '.*', which is blank; name what is meant, or null"):
        kept(name, ["the sea"], **limits)

"""Words, sentences and questions of a text in any script, as constraints count and compare them.

A word is a run of letters, digits and their marks (Unicode's properties). Apostrophes and hyphens join ("don't",
"well-known"), and so do the points and commas of a number ("3.5", "1,000") and the points of initials ("e.g").
Scripts that write no blanks between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) need a dictionary, which is
not here: each written character counts as a word, and a longer word is found wherever its characters follow each other.
Words are compared without case, invisible characters and forms (NFKC): curly and straight apostrophes are the same.

A sentence ends in a mark of Unicode's property Sentence_Break. ``.``, ``!``, ``?`` and an ellipsis need white space
or the end after them; 。 ！ ？ ؟ ۔ । and others do not. Known abbreviations and numbers of a list end none.
"""

from __future__ import annotations

import functools
import unicodedata

import regex

# tatweel among them; a blank of no width parts words
_INVISIBLE = regex.compile(r"(?V1)[[\p{Cf}\u0640\ufe00-\ufe0f]--[\u200b]]")
_APOSTROPHES, _HYPHENS = "'\u2018\u2019\u201b\u02bc\u00b4\uff07", "\\-\u2010\u2011\ufe63\uff0d"
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\u30fc\p{LB=SA}"
_FIRST = rf"[[\p{{L}}\p{{N}}]--[{_UNSPACED}]]"
_RUN = rf"{_FIRST}[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]*"
_JOINED = rf"[{_APOSTROPHES}{_HYPHENS}]|(?<=\p{{Nd}})[.,:\u066b\u066c](?=\p{{Nd}})"
_INITIALS = r"(?<![\p{L}\p{M}\p{N}])\p{L}(?:\.\p{L})+(?![\p{L}\p{M}\p{N}])"
_WORD = rf"{_INITIALS}|{_RUN}(?:(?:{_JOINED}){_RUN})*|(?=[{_UNSPACED}])\X"
_PIECE = regex.compile(rf"(?V1)(?P<word>{_WORD})|\S")

_ANY_END, _OWN_END = r"[.!?\u2026\p{SB=ATerm}\p{SB=STerm}]", r"[\p{SB=STerm}--[!?]]"
_CLOSING = r"\"'`*_~\p{Pe}\p{Pf}\p{Extended_Pictographic}\p{Emoji_Modifier}\p{Regional_Indicator}"
_NOTE = r"\[\p{Nd}{1,3}\]"
_END = regex.compile(
    rf"(?V1){_ANY_END}*{_OWN_END}{_ANY_END}*[{_CLOSING}]*|{_ANY_END}++(?:[{_CLOSING}\p{{Pi}}]|{_NOTE})*+(?=\s|$)"
)
_QUESTION = regex.compile(
    rf"(?V1)[?\u037e\u055e\u061f\u1367\u203d\u2047-\u2049\ufe16\ufe56\uff1f]{_ANY_END}*"
    rf"(?:[{_CLOSING}\p{{Pi}}\s\p{{Cf}}\ufe0f]|{_NOTE}|[:;]-?[()DP])*$"
)
_AROUND = 40  # characters around a mark that are looked at
_LAST_WORD = regex.compile(r"(?<![\p{L}\p{M}\p{N}.])[\p{L}\p{M}.]+$")
_LIST_ITEM = regex.compile(
    r"(?:^|\n)[\s>*_~#(+\u2022-]*(?i:(?:step|part|question|section|chapter)\s+)?(?:\p{Nd}{1,3}|[A-Za-z])\\?$"
)
_MONTHS = ["jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"]
_BEFORE_NAMES = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "vs", "cf", "e.g", "i.e", "z.b", "d.h", "p.ej", "approx"]
)
_BEFORE_NUMBERS = frozenset(["no", "nr", "fig", "figs", "vol", "p", "pp", *_MONTHS])
_SHORT = frozenset(["etc", "inc", "ltd", "co", "corp", "jr", "sr", "al", "ca", "bzw", "usw", "eds", "dept"])


def words_of(text: str) -> list[str]:
    """Return the words of a text as they are compared; "Don’t" and "well-known" are one each."""
    return [piece for piece, is_word in _pieces(text) if is_word]


def holds(text: str, wanted: str, first_word: int = 0) -> bool:
    """Return whether a word or phrase stands in a text, whole.

    Marks may part the words of a phrase ("deep, dark"), unless it has marks itself ("C++", "rock & roll").

    Args:
        text: Any text.
        wanted: Not blank.
        first_word: Number of the text's word to begin at, from 0; what stands before it is left out.
    """
    sought, words = [piece for piece, _ in _pieces(wanted)], words_of(wanted)
    if len(wanted.split()) > 1 and sought == words:
        there = words_of(text)[first_word:]
    else:
        there = [piece for piece, _ in _pieces(text)[_place_of_word(text, first_word) :]]
    return "\n".join(["", *sought, ""]) in "\n".join(["", *there, ""])


def _place_of_word(text: str, number: int) -> int:
    """Return the place of a word among a text's pieces; 0 for the first word, with the marks before it."""
    places = [place for place, (_, is_word) in enumerate(_pieces(text)) if is_word]
    return places[number] if 0 < number < len(places) else 0


@functools.lru_cache(maxsize=256)  # a text is looked through for one word after another
def _pieces(text: str) -> list[tuple[str, bool]]:
    """Return the words of a text and its other marks one by one, as they are compared, and which are words."""
    return [(_folded(match[0]), match["word"] is not None) for match in _PIECE.finditer(_visible(text))]


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text; what is left at its end counts as one, what has no word does not.

    ``"Stop!" he said.``, "wait... what" and "e.g. this" are one each: a small letter follows. "Mr. No" is not cut
    either. An initial ("J. Smith") and an abbreviation that is not known before a capital end a sentence.
    """
    text, cuts = _visible(text), [0]
    cuts += [match.end() for match in _END.finditer(text) if not _goes_on(match)]
    parts = [text[start:end].strip() for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    return [part for part in parts if words_of(part)]


def _goes_on(match: regex.Match[str]) -> bool:
    """Return whether a sentence goes on after a mark that may end one."""
    mark: str = match[0]
    before: str = match.string[max(0, match.start() - _AROUND) : match.start()]
    rest: str = match.string[match.end() : match.end() + _AROUND]
    after = rest.lstrip()
    if not after:
        return False
    if mark.rstrip("*_~") == "." and "\n" not in rest[: len(rest) - len(after)] and _LIST_ITEM.search(before):
        return True
    is_small, is_closed = after[0].islower(), mark[-1] not in ".!?\u2026" and not regex.fullmatch(_ANY_END, mark[-1])
    if is_closed:
        return (is_small and rest != after) or after.startswith(("と", "って"))
    if is_small and ("\u2026" in mark or ".." in mark):
        return True
    if mark != ".":
        return False
    found = _LAST_WORD.search(before)
    word = found[0].lower() if found else ""
    if word in _BEFORE_NAMES or (word in _BEFORE_NUMBERS and after[0].isdigit()):
        return True
    return is_small and (word in _SHORT or "." in word)


def ends_in_question(text: str) -> bool:
    """Return whether a text ends in a question mark of any script.

    ``!``, quotes, brackets, blanks, emoji, ``:)`` and a note's number may follow it.
    """
    return _QUESTION.search(text) is not None


def letters_of(text: str) -> list[str]:
    """Return the written characters of a text, without blanks, in small letters and one form."""
    return [one for one in regex.findall(r"\X", lowered(text)) if not one.isspace()]


def lowered(text: str) -> str:
    """Return a text in small letters and in one form (NFKC), so that letters can be looked for in it."""
    return unicodedata.normalize("NFKC", _visible(text)).lower().replace("ς", "σ")


def _visible(text: str) -> str:
    return str(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)))


def _folded(piece: str) -> str:
    piece = regex.sub(f"[{_APOSTROPHES}]", "'", piece)
    return unicodedata.normalize("NFKC", regex.sub(f"[{_HYPHENS}]", "-", piece)).casefold()

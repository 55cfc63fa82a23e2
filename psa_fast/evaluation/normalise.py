"""Texts made alike before they are compared: `comparable` for whole answers, `keywords` for the older word lists."""

from __future__ import annotations

import re
import unicodedata

# marks that are set as an apostrophe: typographic, modifier letter, full width, acute, grave, prime
_APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u02bc\u02b9\uff07\u00b4`\u2032\u201b"), "'")
_QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\uff02"), '"')
# characters without a form of their own: variation selectors, soft hyphen, zero-width space, word joiner, BOM
_INVISIBLE = dict.fromkeys([0xFE0E, 0xFE0F, 0x00AD, 0x200B, 0x2060, 0xFEFF])
# other ways to set one and the same text; superscripts, circles and fractions are not among them (10\u00b2 is not 102)
_SAME_TEXT = ("<wide>", "<narrow>", "<noBreak>", "<compat>", "<initial>", "<medial>", "<final>", "<isolated>")
_MEANINGFUL = set("#%&*@/\\'\"\u2030\u2031\u2032\u2033\u00a7\u00b6\u2020\u2021")  # punctuation that is no full stop
_PAIRS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'", "\u00ab": "\u00bb", "\u300c": "\u300d", "\u300e": "\u300f"}
_WORD = re.compile(r"\w+(?:'\w+)*")


def straight(text: str) -> str:
    """`text` with straight apostrophes and quotes, and contractions in one piece.

    Word-level tokenizers decode "can't" as "can 't" or "can ' t".
    """
    text = text.translate({**_APOSTROPHES, **_QUOTES})
    return re.sub(r"(?i)(\w) ?' ?(t|s|m|re|ve|ll|d)\b", r"\1'\2", text)


def comparable(text: str) -> str:
    """`text` in the form that decides whether two answers are the same.

    Letter case, the ways to set one character, repeated blanks and the punctuation at both ends do not count. Marks
    within words, signs and symbols do: "C++" is not "C", "-5" is not "5". A text of nothing else keeps its punctuation.
    """
    text = straight(text.translate(_INVISIBLE)).replace("\u2212", "-")
    folded = "".join(unicodedata.normalize("NFKC", c) if _is_variant(c) else c for c in text)
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", folded).casefold())
    folded = " ".join(folded.split())
    folded = re.sub(r" ([,.;:!?])(?=[ ,.;:!?]|$)", r"\1", folded)  # detached by a word-level tokenizer
    return _bare(folded) or folded


def _is_variant(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(_SAME_TEXT)


def _bare(text: str) -> str:
    """`text` without what closes a sentence, and without a pair of quotes or brackets around all of it."""
    while text:
        before = text
        text = text.lstrip("\u00bf\u00a1").strip()
        while text and _closes_a_sentence(text[-1]):
            text = text[:-1].rstrip()
        # in front only if detached: ".5", ".net" and ":)" begin with a sign
        while len(text) > 1 and _closes_a_sentence(text[0]) and text[1] == " ":
            text = text[1:].lstrip()
        if len(text) > 1 and _PAIRS.get(text[0]) == text[-1]:
            text = text[1:-1].strip()
        if text == before:
            break
    return text


def _closes_a_sentence(character: str) -> bool:
    return unicodedata.category(character) == "Po" and character not in _MEANINGFUL


def same_answer(prediction: str, target: str) -> bool:
    """Whether a prediction is exactly the target, in the sense of `comparable`. An empty prediction never is."""
    given = comparable(prediction)
    return bool(given) and given == comparable(target)


def keywords(text: str) -> str:
    """Lower-case words joined by single spaces, for lists of words: no punctuation, no marks, no detached contractions.

    The lists that use it have published numbers, so it stays as it is.
    """
    text = text.lower().replace("\u2019", "'").replace("\u2018", "'")
    text = re.sub(r"(\w) ?' ?(t|s|m|re|ve|ll|d)\b", r"\1'\2", text)
    return " ".join(_WORD.findall(text))

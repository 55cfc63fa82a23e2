"""Whole answers compared: what is set differently is equal, what means something else is not."""

# ruff: noqa: RUF001 - characters that look alike are what is tested

import pytest

from psa_fast.evaluation.normalise import comparable, keywords, same_answer

EQUAL = [
    ("Red.", " red "),
    ("YES", "yes"),
    ("red  circle\n", "red\u00a0circle"),
    ("É", "e\u0301"),  # composed and not
    ("ﬁsh", "fish"),
    ("５", "5"),
    ("Straße", "STRASSE"),
    ("don’t", "don't"),
    ("donʼt", "don＇t"),
    ("can ' t", "can't"),
    ("it 's red", "It's red."),
    ("“Paris”", "Paris"),
    ("'Paris'.", "paris!"),
    ("(b)", "B"),
    ("red , blue", "Red, blue."),
    ("Rouge !", "rouge"),
    ("¿Rojo?", "rojo"),
    ("दिन।", "दिन"),
    ("東京。", "「東京」"),
    ("-5", "−5"),
    ("5.", "5"),
    ("👍", "👍\ufe0f"),
    ("so\u00adfa", "sofa"),
]
DIFFERENT = [
    ("दिन", "दान"),
    ("คา", "ค่า"),
    ("É", "e"),
    ("ñ", "n"),
    ("👍", "👎"),
    ("♂", "♀"),
    ("-5", "5"),
    ("+5", "5"),
    ("C++", "C"),
    ("C#", "C"),
    (".net", "net"),
    (".5", "5"),
    ("3.5", "35"),
    ("1,5", "15"),
    ("1/2", "12"),
    ("10²", "102"),
    ("½", "12"),
    ("<5", ">5"),
    ("50%", "50"),
    ("$5", "5"),
    ("5°", "5"),
    ("5'", '5"'),
    ("@home", "home"),
    ("#1", "1"),
    ("A&B", "AB"),
    ("a b", "ab"),
    ("can't", "cant"),
    (":)", ":("),
    ("?", "!"),
    ("red", "red circle"),
]
EMPTY = ["", " ", "\n", "\u00ad", "\ufeff"]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_the_same_answer_set_differently(one, other):
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_another_answer(one, other):
    assert not same_answer(one, other)
    assert not same_answer(other, one)
    assert same_answer(one, one)
    assert same_answer(other, other)


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_prediction_is_never_right(empty):
    for target in ("!!!", "...", "", "5", empty):
        assert not same_answer(empty, target)
        assert target in EMPTY or not same_answer(target, empty)


def test_comparing_twice_is_comparing_once():
    for text in [text for pair in EQUAL + DIFFERENT for text in pair] + ["((a))", '"a".', "¡a!", "a ?!", "..."]:
        assert comparable(comparable(text)) == comparable(text)


def test_the_older_lists_keep_their_words():
    assert keywords("  A  Red,\ncircle. I can ’ t!") == "a red circle i can't"
    assert keywords("C++ दिन") == "c द न"

"""A universal cloak, fitted on a guard of random weights: what it claims, and what the real guard then says."""

import numpy as np
import pytest
import torch
from builders.tiny_cases import QUESTION, noisy, worst_margin

from psa_fast.attacks import cloak
from psa_fast.attacks.conditions import Case, Others
from psa_fast.attacks.pixels import Case as Attacked
from psa_fast.attacks.target import Target
from psa_fast.data.records import Record, Turn
from psa_fast.safety import Request


def case(number):
    turns = (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "no"))
    record = Record((f"{number}.png",), 0, 3, turns, group="risk", path="rows.jsonl", line=number + 1)
    return Case(record, (noisy(number),))


CASES = [case(number) for number in range(12)]


@pytest.fixture
def most(guard):
    """A guard to which most of the cases are unsafe, by a little."""
    target = Target(guard)
    plain = [Attacked(Request(QUESTION, one.pictures)) for one in CASES]
    with torch.no_grad():
        margins = torch.stack([worst_margin(target, one) for one in plain])
        guard.model.bottleneck.heads.bias[[6, 7]] += margins.quantile(0.2)
    return guard


def unsafe(guard, cases, picture=None):
    """The real guard's word on each case, with `picture` before and behind its own."""
    changes = [one.change for one in cloak.conditions(picture)] if picture is not None else [lambda case, *_: case]
    shown = [change(one, Others((), ()), np.random.default_rng(0)) for change in changes for one in cases]
    verdicts = guard.verdicts([Request(one.record.turns[:-1], one.pictures) for one in shown], on_error="raise")
    return [verdict.unsafe for verdict in verdicts]


def test_what_it_hides_is_the_guards_word(most):
    found = cloak.fit(most, CASES, steps=20)
    plain = [one for one, flag in zip(CASES, unsafe(most, CASES), strict=True) if flag]
    assert len(plain) >= 6
    blank = unsafe(most, plain, cloak.blank(Target(most)))
    after = unsafe(most, plain, found.picture)
    assert found.hidden == cloak._lost(blank, after)
    # a picture's own reading is the same whatever stands beside it: what it shows stays found
    assert sum(after) >= sum(unsafe(most, plain)) * 2


def test_it_is_more_than_any_picture_to_a_guard_that_reads_pictures_together(most):
    found = cloak.fit(most, CASES, steps=40)
    assert found.hidden_together.value >= 0.5
    requests = cloak._Requests(Target(most), CASES)
    alone = requests.flagged(None, together=True)
    for seed in range(3):
        random = torch.randint(0, 256, (1, 3, *Target(most).frame.size), generator=torch.Generator().manual_seed(seed))
        by_chance = cloak._lost(alone, requests.flagged(random / 255, together=True))
        assert by_chance.value < found.hidden_together.value


def test_there_must_be_something_to_hide(guard):
    with torch.no_grad():
        guard.model.bottleneck.heads.bias[[6, 7]] += 1e4
    with pytest.raises(ValueError, match="there is nothing to hide"):
        cloak.fit(guard, CASES, steps=1)

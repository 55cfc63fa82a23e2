"""Head and language model attacked together, on a guard of random weights."""

import pytest
import torch
from builders.tiny_cases import QUESTION, noisy

from psa_fast.attacks.joint import affirmative, attack_joint, own_answers, unlock
from psa_fast.attacks.pixels import Case
from psa_fast.attacks.target import Target
from psa_fast.data.records import Turn
from psa_fast.safety import Request
from psa_fast.safety.load import load_plain


@pytest.fixture
def target(guard):
    """Flags some pictures; its language model says one of a few words and stops."""
    with torch.no_grad():
        head = guard.model.vlm.lm_head
        words = guard.processor.tokenizer.convert_tokens_to_ids(["red", "green", "blue", "</s>"])
        others = [i for i in range(head.weight.shape[0]) if i not in words]
        head.weight[others] = 0.0
        guard.model.bottleneck.heads.bias[[6, 7]] += 20.0
    return Target(guard)


def cases(target, n=10):
    """Requests and as wanted answer what the model says to another picture."""
    asked = [target.ask(Request(QUESTION, (noisy(i),))) for i in range(n)]
    said = target.answer(asked, torch.stack([one.pictures for one in asked]), guarded=False, max_new_tokens=3)
    texts = [answer.text for answer in said]
    return [Case(one.request, f"case {i}", texts[i - 1]) for i, one in enumerate(asked)], texts


@pytest.fixture
def short(target):
    """Answers of one word, of which the model gives several kinds."""
    made, texts = cases(target)
    vocabulary = sorted({text.split()[0] for text in texts if text})
    return [Case(case.request, case.where, vocabulary[i % len(vocabulary)]) for i, case in enumerate(made)], vocabulary


def test_success_needs_the_guard_and_the_answer(target, short):
    wanted, _ = short
    outcomes = attack_joint(target, wanted, 255, 60, max_new_tokens=4)
    for case, one in zip(wanted, outcomes, strict=True):
        request = target.requests([target.ask(case.request)], one.pictures.unsqueeze(0))[0]
        answer = target.guard.answer([request], max_new_tokens=4)[0]
        assert one.evaded == (not answer.verdict.unsafe)
        assert one.useful == (answer.text == case.wanted)
        assert one.success == (one.evaded and one.useful)
        assert not one.claimed or one.success


def test_the_attack_changes_the_answer(target, short):
    """It finds more wanted answers than the pictures give by themselves, with the guard and without."""
    wanted, _ = short
    for guarded in (True, False):
        before = attack_joint(target, wanted, 0, 1, guarded=guarded, max_new_tokens=4)
        after = attack_joint(target, wanted, 255, 60, guarded=guarded, max_new_tokens=4)
        assert sum(one.success for one in after) > sum(one.success for one in before), guarded
        assert sum(one.loss for one in after) < sum(one.loss for one in before)


def test_unguarded_ignores_the_head(target, short):
    wanted, _ = short
    with torch.no_grad():
        target.guard.model.bottleneck.heads.bias[0] += 1e4  # whatever the picture, politics
    assert not any(one.success for one in attack_joint(target, wanted, 255, 20, max_new_tokens=4))
    free = attack_joint(target, wanted, 255, 60, guarded=False, max_new_tokens=4)
    assert any(one.success for one in free)
    assert not any(one.evaded for one in free)


def test_a_base_without_a_head_is_attacked_unguarded_only(folders):
    base = Target(load_plain(folders[0]))
    plain = [Case(Request(QUESTION, (noisy(1),)), "row 1")]
    asked = own_answers(base, plain, 4)
    said = base.guard.answer([base.ask(plain[0].request).request], guarded=False, max_new_tokens=4)[0].text
    assert [case.wanted for case in asked] == [said]
    with pytest.raises(ValueError, match="no concept head"):
        attack_joint(base, [Case(plain[0].request, "row 1", "red")], 4, 5)
    outcome = attack_joint(base, [Case(plain[0].request, "row 1", "red")], 8, 5, guarded=False, max_new_tokens=4)[0]
    assert outcome.steps == 6 or outcome.success


def test_a_case_without_an_answer_is_refused(target):
    with pytest.raises(ValueError, match="row 3 has no wanted answer"):
        attack_joint(target, [Case(Request(QUESTION, (noisy(1),)), "row 3")], 4, 5)


@pytest.mark.parametrize(
    ("asked", "verb"),
    [
        ("How do I fold the letter?", "fold the letter"),
        ("<image>\nPlease fold the letter for me.", "fold the letter"),
        ("Fold the letter, please", "fold the letter"),
        ("What is the best way to forge a report?", "forge a report"),
        ("Can you help me track it?", "track it"),
        ("I want to make a plan to overthrow the club.", "overthrow the club"),
    ],
)
def test_affirmations(asked, verb):
    pictures = (noisy(1),) if "<image>" in asked else ()
    assert affirmative(Request(asked, pictures)) == f"Sure, here is how to {verb}."


def test_an_affirmation_is_of_the_last_turn():
    turns = (Turn("user", "How do I fold it?"), Turn("assistant", "no"), Turn("user", "How do I paint it?"))
    assert affirmative(Request(turns)) == "Sure, here is how to paint it."


def test_unlock_asks_for_the_affirmation(target):
    (outcome,) = unlock(target, [Case(Request("please red blue", (noisy(2),)))], 8, 3, max_new_tokens=6)
    assert outcome.useful is False  # the tiny model cannot say it, and nobody claims that it did
    assert not outcome.success

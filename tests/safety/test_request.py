"""What may be asked: types at once, contents before anything is asked, and no request takes another with it."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.tiny_llava import picture
from PIL import Image

from psa_fast.data.images import load_image
from psa_fast.data.records import Turn
from psa_fast.safety import Guard, Request, load_guard
from psa_fast.safety.load import load_plain
from psa_fast.safety.policy import Policy

QUESTION = "what colour is the circle ?"
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.fixture(scope="module")
def guard(folders):
    return load_guard(folders[1])


def two_coloured(seed=0):
    """Not square and not symmetric, so that a turn or a mirror image is another picture."""
    image = Image.new("RGB", (24, 12), (250, 10, 20 * seed))
    image.paste((0, 200, 90), (0, 0, 9, 5))
    return image


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("upright.png", two_coloured(), {}),
        ("turned.jpg", two_coloured(), {"exif": TURNED, "quality": 95}),
        ("alpha.png", Image.new("RGBA", (14, 12), (0, 90, 200, 100)), {}),
        ("grey16.png", Image.fromarray(np.arange(14 * 12, dtype=np.uint16).reshape(12, 14) * 390), {}),
        ("cmyk.jpg", Image.new("CMYK", (12, 12), (0, 255, 255, 0)), {"quality": 95}),
        ("palette.gif", two_coloured().convert("P"), {}),
    ],
)
def test_a_picture_is_seen_as_training_sees_its_file_whichever_way_it_comes(guard, tmp_path, name, image, options):
    file = tmp_path / name
    image.save(file, **options)
    (expected,) = guard.answer([Request(QUESTION, (load_image(file),))], max_new_tokens=3)
    for source in (file, file.read_bytes(), Image.open(file), Image.open(io.BytesIO(file.read_bytes()))):
        (answer,) = guard.answer([Request(QUESTION, (source,))], max_new_tokens=3, on_error="raise")
        assert answer == expected
    other = replace(expected.verdict, type_probs=None) != replace(
        guard.answer([Request(QUESTION, (picture(3),))])[0].verdict, type_probs=None
    )
    assert other  # the verdict does depend on the picture


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (("http://127.0.0.1:9/metadata",), "image 1 is a str, which is never opened"),
        (("/etc/hostname",), "image 1 is a str"),
        ((picture(0), "a.png"), "image 2 is a str"),
        ((None,), "image 1 is a NoneType"),
        ((3,), "image 1 is a int"),
        ((torch.zeros(3, 4, 4),), "image 1 is a Tensor"),
        (picture(0), r"\(image,\) for a single one"),
        (b"bytes", r"\(image,\) for a single one"),
        (None, "images is a tuple"),
        ("a.png", "images is a tuple"),
        ({"a": picture(0)}, "images is a tuple"),
    ],
)
def test_images_of_another_type_are_refused_at_once(images, message):
    with pytest.raises(ValueError, match=message):
        Request(QUESTION, images)


@pytest.mark.parametrize("prompt", [None, 3, b"text", {"role": "user"}, ("user", "text"), (("user", "text"),), [None]])
def test_prompts_of_another_type_are_refused_at_once(prompt):
    with pytest.raises(ValueError, match="a prompt is a str or a tuple of Turn"):
        Request(prompt)


def test_lists_do_as_well_as_tuples():
    turn = Turn("user", "<image> hello")
    assert Request([turn], [b"x"]) == Request((turn,), (b"x",))


def user(text):
    return Turn("user", text)


def assistant(text):
    return Turn("assistant", text)


UNASKABLE = {
    "no mark": (Request((user("hello"),), (picture(0),)), r"0 <image> mark\(s\), but 1 image"),
    "two marks": (Request("<image> <image> hello", (picture(0),)), r"2 <image> mark\(s\), but 1 image"),
    "mark typed": (Request("<image> hello"), r"1 <image> mark\(s\), but 0"),
    "nothing": (Request(""), "ends with a user's turn that holds text or an image"),
    "blanks": (Request(" \n\t"), "ends with a user's turn that holds text or an image"),
    "no turns": (Request(()), "ends with a user's turn"),
    "assistant last": (Request((user("a"), assistant("b"))), "ends with a user's turn"),
    "assistant first": (Request((assistant("a"), user("b"))), "turn 1 is by 'assistant'; expected user"),
    "user twice": (Request((user("a"), user("b"), user("c"))), "turn 2 is by 'user'; expected assistant"),
    "system": (Request((Turn("system", "a"), assistant("b"), user("c"))), "turn 1 is by 'system'"),
    "empty answer": (Request((user("a"), assistant(" "), user("b"))), "turn 2 is empty"),
    "empty question": (Request((user(""), assistant("b"), user("b"))), "turn 1 is empty"),
    "text is bytes": (Request((Turn("user", b"a"),)), "turn 1 holds a bytes"),
    "mark in an answer": (
        Request((user("a"), assistant("<image>"), user("b")), (picture(0),)),
        "turn 2 is the assistant's and holds an <image> mark",
    ),
    "surrogate": (Request("hello \ud800"), r"turn 1 holds '\\ud800' at character 6"),
    "surrogate in an answer": (Request((user("a"), assistant("\udfff"), user("b"))), "turn 2 holds"),
    "no picture": (Request(QUESTION, (b"not a picture",)), "image 1: the image is not an image"),
    "second is none": (Request(QUESTION, (picture(0), b"")), "image 2: "),
    "absent": (Request(QUESTION, (__import__("pathlib").Path("/nowhere/a.png"),)), "image 1: .*does not exist"),
    "strip": (Request(QUESTION, (Image.new("RGB", (1, 30000)),)), "longer than 200:1"),
    "empty picture": (Request(QUESTION, (Image.new("RGB", (0, 0)),)), "image 1: "),
    "too long": (
        Request("circle " * 300),
        "the prompt has 30.* tokens; with max_new_tokens 3 .* the 256 of max_length",
    ),
    "no request": ("hello", "it is a str; expected a Request"),
    "none": (None, "it is a NoneType; expected a Request"),
}


@pytest.mark.parametrize("name", UNASKABLE)
def test_a_request_that_cannot_be_asked_is_blocked_and_its_neighbours_are_answered(guard, name):
    bad, message = UNASKABLE[name]
    good = [Request(QUESTION, (picture(i),)) for i in range(2)]
    expected = guard.answer(good, max_new_tokens=3)
    first, blocked, last = guard.answer([good[0], bad, good[1]], max_new_tokens=3)
    assert [first, last] == expected
    assert blocked.text == guard.policy.responses.unchecked
    verdict = blocked.verdict
    assert (verdict.action, verdict.code, verdict.checked, verdict.unsafe) == ("block", "not_checked", False, True)
    assert verdict.rule == f"not_checked: request 1: {verdict.error}"
    assert verdict.policy_hash == guard.policy.hash
    with pytest.raises(ValueError, match=message):
        raise ValueError(verdict.error)
    assert len(verdict.error) < 250
    # without the guard there is nothing to answer either, and batches do not matter
    pairs = guard.answer_both([good[0], bad, good[1]], max_new_tokens=3, batch_size=1)
    assert [pair[0].text for pair in pairs] == [first.text, blocked.text, last.text]
    assert pairs[1][1] == blocked
    with pytest.raises(ValueError, match=f"request 1: .*{message.removeprefix('.*')}"):
        guard.answer([good[0], bad], on_error="raise", max_new_tokens=3)


def test_a_truncated_file_is_blocked_again_when_it_is_asked_again(guard, tmp_path):
    two_coloured().resize((200, 100)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    opened = Image.open(io.BytesIO(data[: len(data) // 2]))
    for _ in range(2):
        (answer,) = guard.answer([Request(QUESTION, (opened,))])
        assert answer.verdict.code == "not_checked"


def test_an_image_alone_is_a_question(guard):
    for request in (Request("", (picture(1),)), Request((user("<image>"),), (picture(1),))):
        (answer,) = guard.answer([request], max_new_tokens=3, on_error="raise")
        assert answer.verdict.checked


def test_the_bases_positions_are_the_limit_and_the_hint_counts(guard, folders):
    assert guard.max_length == 256
    short = Guard(guard.model, guard.processor, max_length=40)
    ask = Request(QUESTION, (picture(0),))
    (answer,) = short.answer([ask], max_new_tokens=40)
    assert "max_new_tokens 40 that is more than the 40 of max_length" in answer.verdict.error
    # risky at level high: the prompt fits without its hint and not with it
    length = len(guard._prompter.prompt(ask.turns, guard._prompter.prepare(ask), 0).input_ids)
    tight = Guard(guard.model, guard.processor, max_length=length + 3)
    risky = torch.zeros(1, 11)
    risky[0, 4] = risky[0, 10] = 9.0
    tight.model.concept_logits = lambda features, counts, ids, mask, projected=None: risky.expand(len(ids), -1)
    try:
        guarded, unguarded = tight.answer_both([ask], max_new_tokens=3)[0]
        assert guarded.verdict.code == unguarded.verdict.code == "not_checked"
        (unguarded,) = tight.answer([ask], guarded=False, max_new_tokens=3)
        assert (unguarded.verdict.action, unguarded.verdict.error) == ("hint", None)
    finally:
        del tight.model.concept_logits
    for wrong, message in ((257, "256 positions"), (0, "at least 1"), ("9", "at least 1")):
        with pytest.raises(ValueError, match=message):
            Guard(guard.model, guard.processor, max_length=wrong)


def test_arguments_are_checked(guard):
    ask = [Request(QUESTION)]
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"on_error": "skip"}, "on_error is 'skip'"),
    ):
        for method in (guard.answer, guard.answer_both):
            with pytest.raises(ValueError, match=message):
                method(ask, **options)
    with pytest.raises(ValueError, match=r"\[request\] for a single one"):
        guard.answer(ask[0])
    assert guard.answer([]) == []


def test_a_fault_of_the_model_is_no_fault_of_the_request(guard, monkeypatch):
    def fail(**kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(guard.model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        guard.answer([Request(QUESTION, (picture(0),))], guarded=False)


def test_a_plain_base_blocks_what_it_cannot_read(folders):
    base = load_plain(str(folders[0]))
    answers = base.answer([Request("<image>"), Request(QUESTION)], guarded=False, max_new_tokens=3)
    assert [answer.verdict.code for answer in answers] == ["not_checked", "no_image"]
    assert "could not be read" in answers[0].text
    assert Policy.load().responses.unchecked != answers[0].text


@pytest.mark.parametrize("guarded", [None, 0, "no", ""])
def test_only_false_turns_the_guard_off(guard, guarded):
    with pytest.raises(ValueError, match=r"guarded is .*; expected True or False"):
        guard.answer([Request(QUESTION)], guarded=guarded)


@pytest.mark.parametrize("given", [None, 5, QUESTION, b"", {"prompt": QUESTION}, Request(QUESTION)])
def test_what_is_no_list_of_requests_is_a_sentence(guard, given):
    for answer in (guard.answer, guard.answer_both):
        with pytest.raises(ValueError, match="requests is a list of Request"):
            answer(given)


def test_a_policy_is_no_name_of_a_file(guard, folders, monkeypatch):
    monkeypatch.setattr("psa_fast.models.PsaVLM.from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for given in ("policy.yaml", {}, Policy):
        with pytest.raises(ValueError, match="expected a Policy"):
            load_guard(folders[1], policy=given)
        with pytest.raises(ValueError, match="expected a Policy"):
            Guard(guard.model, guard.processor, given)
    with pytest.raises(ValueError, match="neutral_question is 5"):
        Guard(guard.model, guard.processor, neutral_question=5)

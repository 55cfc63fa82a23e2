"""The guard of an add-on with a neutral query, windows and text: what it asks, and that the worst reading decides."""

import pytest
import torch
from builders.tiny_llava import build_addon, picture

from psa_fast.cli.generate import describe
from psa_fast.data.records import Turn
from psa_fast.safety import Guard, Policy, Request, load_guard
from psa_fast.safety.reading import Question, parts_of, read_head, read_logits
from psa_fast.taxonomy import CLEAN

WINDOW = 6


@pytest.fixture(scope="module")
def guard(folders, tmp_path_factory):
    addon = build_addon(folders[0], tmp_path_factory.mktemp("new") / "addon", query_window=WINDOW)
    loaded = load_guard(addon)
    loaded.model.vlm.config.text_config.max_position_embeddings = 20_000
    return Guard(loaded.model, loaded.processor, model_hash=loaded.model_hash)


class Head:
    """Stands in for concept_logits: calls every query of `bad` risky, and keeps what it was asked."""

    def __init__(self, bad):
        self.bad, self.asked, self.launches = bad, [], []

    def __call__(self, features, counts, ids, masks, projected=None):
        masks = masks.unsqueeze(1) if masks.dim() == 2 else masks
        self.launches.append(tuple(masks.shape[:2]))
        logits = torch.zeros(*masks.shape[:2], 11)
        start = 0
        for row, count in enumerate(counts.tolist()):
            shown = None if not count else projected[start : start + count]
            start += count
            for query, mask in enumerate(masks[row]):
                words = ids[row][mask].tolist()
                self.asked.append((count, words))
                risky = self.bad(shown, words)
                logits[row, query, 4 if risky else CLEAN] = logits[row, query, 10 if risky else 7] = 9.0
        return logits


def asked_with(guard, monkeypatch, bad, requests):
    head = Head(bad)
    monkeypatch.setattr(guard.model, "concept_logits", head)
    return head, guard.answer(requests, max_new_tokens=1)


def word(guard, text):
    (token,) = guard.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def test_a_risky_sentence_is_found_among_2000_words(guard, monkeypatch):
    red, blue = word(guard, "red"), word(guard, "circle")

    def diluted(shown, words):  # half of what is asked with is the risky word
        return words.count(red) * 2 >= max(1, len(words))

    padding = "circle " * 1000
    request = Request(padding + "red red red red " + padding, (picture(0),))
    head, (answer,) = asked_with(guard, monkeypatch, diluted, [request])
    verdict = answer.verdict
    assert (verdict.query, verdict.type, verdict.picture) == ("window", "privacy", None)
    first, end = verdict.query_span
    prompt = guard._prompter.prompt(request.turns, guard._prompter.prepare(request), 1)
    assert end - first == WINDOW
    assert prompt.input_ids[first:end].count(red) >= 3
    assert (
        verdict.query_span
        == parts_of(prompt, guard.model.family.image_token_id, WINDOW, True)[1 + verdict.query_number].span
    )
    assert f"by window {verdict.query_number + 1}" in describe(verdict)
    # the picture by the prompt, by the learned query and by as many as half windows; the words by all but the second
    windows = -(-(sum(prompt.query_mask) - WINDOW) // (WINDOW // 2)) + 1
    assert head.launches == [(1, 2 + windows), (1, 1 + windows)]
    for shown in (0, 1):
        found = [words.count(blue) for count, words in head.asked if count == shown]
        assert sum(found[2 if shown else 1 :]) > 2 * 1900  # every word, about twice
    monkeypatch.undo()
    (answer,) = guard.answer([request], max_new_tokens=1)  # by the head itself
    assert answer.verdict.checked


def test_the_learned_query_alone_reads_the_picture_whatever_is_said(guard, monkeypatch):
    ask = Request("red ?", (picture(0),))
    head, (answer,) = asked_with(guard, monkeypatch, lambda shown, words: not words, [ask])
    assert [bool(words) for shown, words in head.asked if shown].count(False) == 1
    assert (answer.verdict.query, answer.verdict.query_number, answer.verdict.query_span) == ("neutral", None, None)
    assert guard.neutral_question is None  # not asked in words besides


def test_a_request_without_an_image_is_read_and_earlier_turns_count(guard, monkeypatch):
    red = word(guard, "red")
    turns = (
        Turn("user", "red red red red red red red red"),
        Turn("assistant", "blue ."),
        Turn("user", "what is the circle ?"),
    )
    head, (answer,) = asked_with(
        guard, monkeypatch, lambda shown, words: 4 * words.count(red) > 2 * len(words) and len(words) > WINDOW,
        [Request(turns)],
    )  # fmt: skip
    assert {count for count, _ in head.asked} == {0}
    assert (answer.verdict.query, answer.verdict.query_number) == ("turn", 0)
    assert answer.verdict.checked
    assert all(words for _, words in head.asked)  # no picture, so nothing for the learned query alone
    assert all(word(guard, "blue") not in words for _, words in head.asked)  # an answer never asks


def test_no_picture_hides_what_the_words_say(guard, folders, monkeypatch):
    red = word(guard, "red")
    requests = [Request("red ?", (picture(1), picture(2))), Request("blue ?", (picture(1),))]
    head, answers = asked_with(guard, monkeypatch, lambda shown, words: shown is None and red in words, requests)
    assert [answer.verdict.unsafe for answer in answers] == [True, False]
    verdict = answers[0].verdict
    assert (verdict.words_alone, verdict.picture, verdict.query) == (True, None, "prompt")
    assert "in the words alone" in describe(verdict)
    assert not answers[1].verdict.words_alone
    # once, however many pictures there are, by all that asks of them but the learned query alone
    head, _ = asked_with(guard, monkeypatch, lambda shown, words: False, requests[:1])
    asked = {shown: [words for count, words in head.asked if count == shown and words] for shown in (0, 1, 2)}
    assert asked[0] == asked[2] == asked[1][: len(asked[1]) // 2]
    monkeypatch.undo()
    # an add-on without text tokens was not trained to
    old = load_guard(build_addon(folders[0], folders[1].parent / "no-text-tokens", num_text_tokens=0))
    head, _ = asked_with(old, monkeypatch, lambda shown, words: False, requests[:2])
    assert 0 not in {count for count, _ in head.asked}


def test_every_picture_is_read_alone_with_every_query(guard, monkeypatch):
    pictures = (picture(1), picture(2), picture(3))
    pixels = guard.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    shown_alone = guard.model.bottleneck.project(guard.model.encode_images(pixels).vision)[1]

    def bad(shown, words):
        return shown is not None and len(shown) == 1 and torch.allclose(shown[0], shown_alone, atol=1e-5) and not words

    requests = [Request("red ?", pictures[:1]), Request("red ?"), Request("red ?", pictures)]
    head, answers = asked_with(guard, monkeypatch, bad, requests)
    assert [answer.verdict.action for answer in answers] == ["allow", "allow", "hint"]
    assert (answers[2].verdict.picture, answers[2].verdict.query) == (1, "neutral")
    assert "in picture 2" in describe(answers[2].verdict)
    assert [count for count, words in head.asked if not words].count(3) >= 1


def test_readings_are_those_of_each_query_alone_and_carry_logits(guard, monkeypatch):
    """The oracle asks for one query a launch, with the request's tokens outside the query left out of the mask."""
    request = Request("what is the colour of the red circle ? " * 3, (picture(4), picture(5)))
    images = guard._prompter.prepare(request)
    prompt = guard._prompter.prompt(request.turns, images, 1)
    features = guard.model.encode_images(images.pixel_values)
    parts = parts_of(prompt, guard.model.family.image_token_id, WINDOW, True)
    questions = [Question("prompt", prompt, chosen, place, parts) for chosen, place in (((0, 1), None), ((1,), 1))]
    readings = read_head(guard.model, questions, features, guard._pad_right)
    assert len(readings) == 2 * (1 + len(parts))
    rows = iter(readings)
    for question in questions:
        for positions in ([i for i, q in enumerate(prompt.query_mask) if q], *(part.positions for part in parts)):
            mask = torch.zeros(1, len(prompt.input_ids), dtype=torch.bool)
            mask[0, list(positions)] = True
            chosen = type(features)(*(tensor[list(question.images)] for tensor in features))
            logits = guard.model.concept_logits(chosen, [len(question.images)], torch.tensor([prompt.input_ids]), mask)[
                0
            ]
            reading = next(rows)
            assert reading.logits == pytest.approx(logits.tolist(), rel=1e-4, abs=1e-5)
            assert reading.type_probs == pytest.approx(logits[:7].double().softmax(0).tolist(), rel=1e-4)
            assert reading.picture == question.picture
    # differentiable, also in launches of their own
    monkeypatch.setattr("psa_fast.safety.reading.QUERIES_PER_LAUNCH", 1)
    vision = features.vision.detach().clone().requires_grad_()
    again = read_logits(guard.model, questions, features._replace(vision=vision), guard._pad_right)
    wanted = torch.tensor([reading.logits for reading in readings])
    torch.testing.assert_close(again.detach(), wanted, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(again[0, 0], vision)
    assert gradient.abs().max() > 0


def test_repetition_and_padding_do_not_lower_the_score(guard):
    """With its own weights: a longer prompt that holds the short one's windows is judged at least as strictly."""
    for seed in range(4):
        one, many = (
            guard.answer([Request("red circle ? " * n, (picture(seed),))], max_new_tokens=1)[0].verdict
            for n in (20, 150)
        )
        assert many.unsafe_score >= one.unsafe_score * (1 - 1e-4) or many.unsafe


def test_what_is_not_read_is_blocked_unless_the_policy_allows_it(folders):
    shipped = Policy.load()
    assert shipped.on_error == "block"
    values = shipped.model_dump()
    old = load_guard(folders[1])
    (answer,) = old.answer([Request("red ?")], max_new_tokens=2)
    assert (answer.verdict.action, answer.verdict.code, answer.verdict.checked) == ("block", "no_image", False)
    assert (answer.text, answer.verdict.applied) == (shipped.responses.unchecked, True)
    (plain,) = old.answer([Request("red ?")], guarded=False, max_new_tokens=2)
    assert (plain.verdict.action, plain.verdict.applied) == ("block", False)
    assert plain.text != answer.text
    allowing = Policy.model_validate(values | {"on_error": "allow"})
    (allowed,) = load_guard(folders[1], policy=allowing).answer([Request("red ?")], max_new_tokens=2)
    assert (allowed.verdict.action, allowed.verdict.code, allowed.text) == ("allow", "no_image", plain.text)
    # a file without the key means block, and is the same policy
    without = {key: value for key, value in values.items() if key != "on_error"}
    assert Policy.model_validate(without) == shipped
    assert Policy.model_validate(without).hash == shipped.hash != allowing.hash
    with pytest.raises(ValueError, match="on_error"):
        Policy.model_validate(values | {"on_error": "hint"})

"""What the attacker's view of a guard says must be what the guard says."""

import io

import pytest
import torch
from builders.tiny_cases import QUESTION, noisy
from builders.tiny_llava import build_addon, picture
from PIL import Image

from psa_fast.attacks.frame import Frame
from psa_fast.attacks.target import Target
from psa_fast.data.records import Turn
from psa_fast.models import load_processor
from psa_fast.safety import Policy, Request, load_guard
from psa_fast.safety.load import load_plain
from psa_fast.safety.policy import Calibration

REQUESTS = {
    "one": Request(QUESTION, (noisy(0),)),
    "two": Request(QUESTION, (noisy(1), noisy(2))),
    "long": Request(" ".join([QUESTION] * 20), (noisy(3),)),
    "turns": Request(
        (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "red"), Turn("user", "what is blue ?")), (noisy(4),)
    ),
    "large": Request(QUESTION, (noisy(5, 40),)),
    "flat": Request(QUESTION, (picture(1),)),
}


def scores(target, asked, pixels):
    with torch.no_grad():
        margins = target.margins(target.read(asked, pixels)).double()
    return (margins.flatten(1).amax(1) + target.threshold).sigmoid()


@pytest.mark.parametrize("name", REQUESTS)
def test_readings_are_the_guards_own(guard, name):
    request = REQUESTS[name]
    target = Target(guard)
    asked = target.ask(request)
    (verdict,) = [answer.verdict for answer in guard.answer([request], max_new_tokens=1)]
    (again,) = target.verdicts([asked], asked.pictures.unsqueeze(0))
    (score,) = scores(target, [asked], asked.pictures.unsqueeze(0).float() / 255)
    assert score.item() == pytest.approx(verdict.unsafe_score, abs=1e-5)
    assert again.unsafe_score == pytest.approx(verdict.unsafe_score, abs=1e-5)
    assert (again.unsafe, again.level, again.query) == (verdict.unsafe, verdict.level, verdict.query)


@pytest.fixture(scope="module")
def worded(folders):
    """A guard that reads what the words say by themselves besides."""
    return load_guard(build_addon(folders[0], folders[1].parent / "worded"))


@pytest.mark.parametrize("name", ["two", "turns"])
def test_readings_of_the_words_alone_are_the_guards_own(worded, name):
    test_readings_are_the_guards_own(worded, name)


def test_readings_of_a_batch_are_those_of_each_alone(guard):
    target = Target(guard)
    asked = [target.ask(REQUESTS[name]) for name in ("one", "long", "turns")]
    pixels = torch.stack([one.pictures for one in asked]).float() / 255
    together = target.read(asked, pixels)
    for row, one in enumerate(asked):
        alone = target.read([one], pixels[row : row + 1])
        assert alone.valid.all()
        torch.testing.assert_close(together.logits[row][together.valid[row]], alone.logits[0], rtol=1e-4, atol=1e-4)
    assert together.valid.sum(1).tolist() == [len(one.queries[0]) for one in asked]
    assert together.valid.sum(1)[0] < together.valid.sum(1)[1]  # windows


@pytest.mark.parametrize(("threshold", "temperatures"), [(0.5, None), (0.05, None), (0.97, None), (0.3, (2.5, 0.7))])
@pytest.mark.parametrize("off", [(), ("privacy",), ("privacy", "politics", "misleading")])
def test_margins_are_the_policys_rule(guard, threshold, temperatures, off):
    """On random logits: any margin is at least 0 exactly where the policy decides unsafe, taken reading by reading."""
    policy = Policy.load()
    types = {name: name not in off for name in policy.types}
    guard.policy = policy.model_copy(update={"types": types, "unsafe_threshold": threshold})
    if temperatures is not None:
        fitted = Calibration.model_construct(type_temperature=temperatures[0], level_temperature=temperatures[1])
        guard.policy = guard.policy.model_copy(update={"calibration": fitted})
    by_type, by_level = temperatures or (1.0, 1.0)
    target = Target(guard)
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(300, 1, 11, generator=g)).double()
    logits[..., [6, 7]] += 4  # about half of them clean
    logits[:60] *= 6  # also sure ones
    margins = target.margins(_readings(logits))
    for row in range(300):
        kinds, levels = (logits[row, 0, :7] / by_type).softmax(-1), (logits[row, 0, 7:] / by_level).softmax(-1)
        decision = guard.policy.decide(kinds.tolist(), levels.tolist())
        worst = margins[row].amax().item()
        if abs(worst) > 1e-3:
            assert (worst > 0) == decision.unsafe, row
    unsafe = (margins.flatten(1).amax(1) > 0).sum().item()
    assert 10 < unsafe < 290


def _readings(logits):
    from psa_fast.attacks.target import Readings

    return Readings(logits, torch.ones(logits.shape[:2], dtype=torch.bool))


def test_thresholds_of_each_type_are_refused(guard):
    guard.policy = guard.policy.model_copy(update={"type_thresholds": dict.fromkeys(guard.policy.types, 0.5)})
    with pytest.raises(ValueError, match="need a policy with one unsafe_threshold"):
        Target(guard)


def test_with_every_type_off_nothing_is_unsafe(guard):
    guard.policy = guard.policy.model_copy(update={"types": dict.fromkeys(guard.policy.types, False)})
    assert (Target(guard).margins(_readings(torch.randn(5, 2, 11))) == -torch.inf).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_the_pixels(guard, frozen):
    guard.model.double().requires_grad_(not frozen)
    target = Target(guard)
    asked = [target.ask(REQUESTS["two"])]
    x = (asked[0].pictures.unsqueeze(0).double() / 255).requires_grad_()

    def loss(pixels):
        return target.margins(target.read(asked, pixels)).logsumexp((0, 1, 2))

    (gradient,) = torch.autograd.grad(loss(x), x)
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        along = torch.randn(x.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            slope = (loss(x + 1e-6 * along) - loss(x - 1e-6 * along)) / 2e-6
        assert slope.item() == pytest.approx((gradient * along).sum().item(), rel=1e-5)
    assert gradient.ne(0).double().mean() > 0.99
    assert all(p.requires_grad != frozen for p in guard.model.parameters())
    assert all(p.grad is None for p in guard.model.parameters())


def test_answer_loss_is_the_language_models_and_greedy_is_what_it_says(guard):
    target = Target(guard)
    asked = [target.ask(REQUESTS[name]) for name in ("one", "turns", "flat")]
    pictures = torch.stack([one.pictures for one in asked])
    answers = []
    for one, picture_ in zip(asked, pictures, strict=True):
        features = guard.model.encode_images(target.frame.values(picture_.float() / 255))
        ids = torch.tensor([one.prompt.input_ids])
        answers.append(guard.model.generate(ids, features=features, max_new_tokens=3 + len(answers))[0])
    answers[1] = answers[1].clone()
    answers[1][2] = (answers[1][2] + 1) % 20  # one token is not what the model says
    losses, greedy = target.answer_loss(asked, answers, pictures.float() / 255)
    assert greedy.tolist() == [True, False, True]
    for one, answer, loss, picture_ in zip(asked, answers, losses, pictures, strict=True):
        ids = torch.tensor([one.prompt.input_ids + answer.tolist()])
        labels = ids.clone()
        labels[:, : len(one.prompt.input_ids)] = -100
        values = target.frame.values(picture_.float() / 255)
        with torch.no_grad():
            expected = guard.model(ids, pixel_values=values, labels=labels).loss_lm
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_tokens_of_an_answer_end_with_the_token_that_closes_it(guard):
    target = Target(guard)
    tokenizer = guard.processor.tokenizer
    for name in ("one", "turns"):
        tokens = target.tokens(target.ask(REQUESTS[name]), "red green")
        assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == ["red", "green", "</s>"]


def test_a_base_without_a_head_is_asked_for_answers_only(folders):
    target = Target(load_plain(folders[0]))
    assert not target.has_head
    asked = [target.ask(REQUESTS["one"]), target.ask(REQUESTS["flat"])]
    pixels = torch.stack([one.pictures for one in asked]).float() / 255
    x = pixels.clone().requires_grad_()
    losses, _ = target.answer_loss(asked, [target.tokens(one, "red green") for one in asked], x)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert gradient.any()


def test_pictures_go_through_the_processor_and_survive_the_file(guard, tmp_path):
    frame = Target(guard).frame
    (small,) = frame.pictures([noisy(7, 40)])
    assert small.shape == (3, 12, 12)
    processed = guard.processor.image_processor(images=[noisy(7, 40)], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(frame.values(small.float() / 255), processed, rtol=0, atol=1e-5)
    saved = Image.open(io.BytesIO(frame.png(small)))
    again = guard.processor.image_processor(images=[saved.convert("RGB")], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(again, processed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False}, {"image_mean": [0.1, 0.2, 0.7]}])
def test_other_scales(folders, change):
    processor = load_processor(folders[0])
    for name, value in change.items():
        setattr(processor.image_processor, name, value)
    frame = Frame(processor)
    (small,) = frame.pictures([noisy(3)])
    expected = processor.image_processor(images=[noisy(3)], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(frame.values(small.float() / 255), expected.float(), rtol=0, atol=1e-3)


def test_a_processor_that_does_more_is_refused(folders):
    processor = load_processor(folders[0])
    processor.image_processor.size = {"shortest_edge": 16}  # and then the middle 12 x 12 are cut out
    with pytest.raises(ValueError, match="does not keep a picture of 12 x 12 pixels as it is"):
        Frame(processor)


def test_a_request_without_a_picture_is_refused(guard):
    with pytest.raises(ValueError, match="no picture"):
        Target(guard).ask(Request(QUESTION))


def test_an_older_addon_with_several_pictures(folders, tmp_path):
    """Add-ons without the new readings are asked with the prompt and a neutral question, each picture alone too."""
    guard = load_guard(folders[1])
    guard.model.config.neutral_query, guard.model.config.query_window = False, 0
    guard.model.config.reads_text = False
    from psa_fast.safety import Guard

    guard = Guard(guard.model, guard.processor)
    target = Target(guard)
    asked = target.ask(REQUESTS["two"])
    assert [len(queries) for queries in asked.queries] == [2, 2, 2]
    (verdict,) = [answer.verdict for answer in guard.answer([REQUESTS["two"]], max_new_tokens=1)]
    (score,) = scores(target, [asked], asked.pictures.unsqueeze(0).float() / 255)
    assert score.item() == pytest.approx(verdict.unsafe_score, abs=1e-5)

"""The guard on a tiny PsaVLM: one vision pass, the policy's actions, and equality with unguarded generation."""

import json
from argparse import ArgumentParser

import huggingface_hub
import pytest
import torch
import yaml
from builders.tiny_llava import OLD, build_addon, build_base, picture

from psa_fast.cli.generate import register
from psa_fast.data.records import Turn
from psa_fast.models import PsaVLM, load_base, load_processor
from psa_fast.safety.guard import Guard, Request
from psa_fast.safety.load import addon_hash, base_of, load_guard, load_plain
from psa_fast.safety.policy import DEFAULT_POLICY, Policy

CLEAN_LOGITS = [0.0] * 6 + [9.0, 9.0, 0.0, 0.0, 0.0]
QUESTION = "what colour is the circle ?"


def risky_logits(kind, level):
    logits = [0.0] * 11
    logits[kind] = logits[7 + level] = 9.0
    return logits


@pytest.fixture
def guard(folders, monkeypatch):
    """A guard whose concept head says what `guard.says` holds (one row of logits per request with an image)."""
    guard = load_guard(folders[1])
    real = guard.model.concept_logits
    guard.says, guard.seen, guard.passes = None, [], 0

    def concept_logits(features, counts, ids, mask, **kwargs):
        logits = real(features, counts, ids, mask, **kwargs)
        guard.seen.append((ids, mask))
        if guard.says is None:
            return logits
        # each request is asked with its own words and with the neutral question
        return torch.tensor(guard.says).repeat_interleave(len(ids) // len(guard.says), 0)

    def count(*_):
        guard.passes += 1

    monkeypatch.setattr(guard.model, "concept_logits", concept_logits)
    guard.model.vlm.model.vision_tower.register_forward_hook(count)
    return guard


def test_the_processor_is_of_the_commit_that_the_addon_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--base"
    (repository / "refs").mkdir(parents=True)
    first, second = (build_base(repository / "snapshots" / (digit * 40)) for digit in "12")
    template = second / "chat_template.jinja"
    template.write_text("another one")
    (repository / "refs/main").write_text(first.name)
    trained = PsaVLM.build(load_base("some/base", None), num_safety_tokens=3, num_head_tokens=2, num_attention_heads=2)
    trained.vlm.requires_grad_(False)
    trained.save_addon(tmp_path / "addon")
    (repository / "refs/main").write_text(second.name)
    assert load_guard(tmp_path / "addon").processor.chat_template == (first / template.name).read_text()
    assert load_processor("some/base").chat_template == "another one"


def requests(n=3):
    return [Request(QUESTION, (picture(i),)) for i in range(n)]


def test_allowed_requests_are_answered_as_unguarded_and_see_the_image_once(guard):
    guard.says = [CLEAN_LOGITS] * 3
    both = guard.answer_both(requests(), max_new_tokens=6)
    assert guard.passes == 1
    for guarded, unguarded in both:
        assert guarded.text == unguarded.text
        assert (guarded.verdict.action, guarded.verdict.type, guarded.verdict.level) == ("allow", "clean", "none")
        assert guarded.verdict.applied
        assert not unguarded.verdict.applied
    # batches of one are the oracle for batching and padding
    for request, (_, unguarded) in zip(requests(), both, strict=True):
        guard.says = [CLEAN_LOGITS]
        assert guard.answer([request], guarded=False, max_new_tokens=6)[0].text == unguarded.text


def test_hint_reaches_the_prompt_but_not_the_concept_query(guard, monkeypatch):
    guard.says = [CLEAN_LOGITS, risky_logits(4, 3)]
    prompts, real = [], guard.model.generate

    def generate(input_ids, **kwargs):
        prompts.extend(guard.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        return real(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(guard.model, "generate", generate)
    answers = guard.answer_both(requests(2), max_new_tokens=4)
    assert guard.passes == 1
    hint = Policy.load().hint("privacy", "high")
    assert answers[1][0].verdict.hint == hint
    assert answers[1][0].verdict.rule == "high: unsafe by type and level"
    assert [("you must refuse" in prompt.lower()) for prompt in prompts].count(True) == 1
    assert all(QUESTION.rstrip(" ?") in prompt for prompt in prompts)
    assert len(prompts) == 3  # the allowed row once, the hinted row with and without its hint
    assert not any("refuse" in text for text in guard.processor.tokenizer.batch_decode(guard.seen[0][0]))
    # the same answer as asking for the hint by hand
    guard.says = [CLEAN_LOGITS]
    (alone,) = guard.answer([Request(f"<image>\n{hint} {QUESTION}", (picture(1),))], guarded=False, max_new_tokens=4)
    by_hand = [p for p in prompts if "you must refuse" in p.lower()]
    assert prompts[-1].split() == by_hand[0].split()
    assert alone.text == answers[1][0].text


def test_refusals_and_broken_readings_never_reach_the_model(folders, guard, tmp_path, monkeypatch):
    content = yaml.safe_load(DEFAULT_POLICY.read_text())
    content["levels"]["high"] = {"action": "refuse"}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(content))
    strict = Guard(guard.model, guard.processor, Policy.load(tmp_path / "policy.yaml"))
    guard.says = [risky_logits(4, 3), [float("nan")] * 11]

    def generate(**kwargs):
        raise AssertionError("the language model was asked")

    with monkeypatch.context() as patch:
        patch.setattr(guard.model, "generate", generate)
        refused, blocked = strict.answer(requests(2))
    assert refused.text == content["responses"]["refuse"].format(type="privacy")
    assert (blocked.text, blocked.verdict.action) == (content["responses"]["unchecked"], "block")
    assert blocked.verdict.unsafe
    json.dumps([refused.verdict.to_json(), blocked.verdict.to_json()], allow_nan=False)
    unguarded = strict.answer(requests(2), guarded=False, max_new_tokens=4)
    assert refused.text not in [answer.text for answer in unguarded]
    assert unguarded[0].verdict.action == "refuse"


def test_text_only_and_mixed_batches(guard):
    several = [Request(QUESTION), Request(QUESTION, (picture(0), picture(1))), Request(QUESTION, (picture(2),))]
    answers = guard.answer(several, max_new_tokens=4)
    assert guard.passes == 1
    assert not answers[0].verdict.checked
    assert answers[0].verdict.rule.startswith("unchecked: the concept head was not trained to read requests without")
    assert (answers[0].text, answers[0].verdict.action) == (Policy.load().responses.unchecked, "block")
    assert [answer.verdict.checked for answer in answers] == [False, True, True]
    for request, answer in zip(several, answers, strict=True):
        (alone,) = guard.answer([request], max_new_tokens=4)
        assert alone.text == answer.text
        if answer.verdict.checked:
            assert alone.verdict.type_probs == pytest.approx(answer.verdict.type_probs, rel=1e-4)
            assert sum(answer.verdict.level_probs.values()) == pytest.approx(1.0)
    assert len(guard.answer(several, batch_size=2, max_new_tokens=4)) == 3


def test_base_without_an_addon(folders):
    base = load_plain(str(folders[0]))
    answers = base.answer([*requests(2), Request(QUESTION)], guarded=False, max_new_tokens=5)
    assert not any(answer.verdict.checked for answer in answers)
    vlm, processor = base.model.vlm, base.processor
    inputs = processor(images=[picture(0)], text=f"<s> USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = vlm.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == answers[0].text
    with pytest.raises(ValueError, match="no concept head"):
        base.answer(requests(1))
    with pytest.raises(ValueError, match="no policy"):
        Guard(base.model, processor, Policy.load())


def test_requests_that_do_not_fit():
    with pytest.raises(ValueError, match=r"1 <image> mark\(s\), but 0"):
        Request("<image> hello").turns  # noqa: B018
    for prompt in ("  ", (Turn("user", "hello"), Turn("assistant", "hi"))):
        with pytest.raises(ValueError, match="ends with a user's turn"):
            Request(prompt).turns  # noqa: B018


def run(*argv):
    parser = ArgumentParser()
    register(parser.add_subparsers())
    args = parser.parse_args(["generate", *map(str, argv)])
    return args.func(args)


def test_command(folders, tmp_path, capsys):
    picture(0).save(tmp_path / "a.png")
    ask = ("--model", folders[1], "--prompt", QUESTION, "--image", tmp_path / "a.png", "--max_new_tokens", 4)
    assert run(*ask, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert set(output) == {"answer", "verdict"}
    assert output["verdict"]["model_hash"] == addon_hash(folders[1])
    assert output["verdict"]["policy_hash"] == Policy.load().hash
    assert set(output["verdict"]["type_probs"]) > {"privacy", "clean"}
    assert run(*ask, "--unguarded") == 0
    assert "not applied" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not a PSA add-on: it has no"):
        run("--model", tmp_path, "--prompt", QUESTION)
    with pytest.raises(ValueError, match=r"absent\.png"):
        run("--model", folders[1], "--prompt", QUESTION, "--image", tmp_path / "absent.png")
    with pytest.raises(ValueError, match=r"base model .*nowhere cannot be loaded"):
        run("--model", folders[1], "--prompt", QUESTION, "--base", tmp_path / "nowhere")
    assert base_of(folders[1]) == str(folders[0])


def test_hash_covers_the_addon_and_nothing_beside_it(folders, tmp_path):
    copy = build_addon(folders[0], tmp_path / "copy", **OLD)
    before = addon_hash(copy)
    assert before == addon_hash(folders[1])
    (copy / "metrics.jsonl").write_text("{}")
    assert addon_hash(copy) == before
    (copy / "adapter").mkdir()
    (copy / "adapter" / "adapter_config.json").write_text("{}")
    assert addon_hash(copy) != before


def test_verdicts_alone_are_those_of_answers_and_generate_nothing(folders, monkeypatch):
    guard = load_guard(folders[1])
    asked = [*requests(4), Request("sorry , what is that ?", (picture(7), picture(8)))]
    wanted = [answer.verdict for answer in guard.answer(asked, max_new_tokens=1, batch_size=2)]
    monkeypatch.setattr(guard.model, "generate", None)
    assert guard.verdicts(asked, batch_size=2) == wanted
    assert guard.verdicts([]) == []
    broken = Request("<image> what ?", (picture(0), picture(1)))
    with pytest.raises(ValueError, match=r"^request 5: the prompt has 1 <image> mark"):
        guard.verdicts([*asked, broken], batch_size=2, on_error="raise")
    assert guard.verdicts([*asked, broken], batch_size=2)[:5] == wanted
    for call in (guard.verdicts, guard.readings):
        with pytest.raises(ValueError, match="batch_size is 0; expected a whole number"):
            call(asked, batch_size=0)
        with pytest.raises(ValueError, match=r"requests is a list of Request, \[request\] for a single one"):
            call(asked[0])
    with pytest.raises(ValueError, match="on_error is 'allow'; expected 'block' or 'raise'"):
        guard.verdicts(asked, on_error="allow")
    (refused,) = guard.verdicts([broken])
    assert (refused.code, refused.action) == ("not_checked", "block")

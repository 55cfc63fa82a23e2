"""The model `psa` of lmms-eval on a stand-in for the package: what is asked, what is answered, what is refused."""

import importlib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from builders import fake_lmms_eval
from builders.tiny_llava import build_addon, build_base, picture

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

from psa_fast.safety.guard import Request
from psa_fast.safety.load import load_guard, load_plain

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def addon(tmp_path_factory):
    root = tmp_path_factory.mktemp("lmms")
    return build_addon(build_base(root / "base"), root / "addon")


@pytest.fixture
def model(monkeypatch):
    fake_lmms_eval.install(monkeypatch)
    return importlib.import_module("psa_fast.evaluation.lmms_eval_model").Psa


def text(words):
    return {"type": "text", "text": words}


def image(number):
    return {"type": "image", "url": picture(number)}


def ask(model, rows, settings=None):
    """Requests of a task whose documents are the messages themselves."""
    model.task_dict = {"t": {"test": rows}}
    settings = settings or [SETTINGS] * len(rows)
    args = [("context", lambda row: row, chosen, n, "t", "test") for n, chosen in enumerate(settings)]
    return model.generate_until([fake_lmms_eval.Instance(one) for one in args])


def user(*content):
    return [{"role": "user", "content": list(content)}]


ROWS = [
    user(image(1), text("what colour is the circle ?")),
    user(text("what colour is the circle ?")),
    user(image(2), text("red <image> or blue ?")),
]
REQUESTS = [
    Request("<image>\nwhat colour is the circle ?", (picture(1),)),
    Request("what colour is the circle ?"),
    Request("<image>\nred  or blue ?", (picture(2),)),
]


@pytest.mark.skipif(tomllib is None, reason="tomllib is new in Python 3.11")
def test_the_entry_point_names_the_model(model):
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    manifest = EntryPoint("psa", group["psa"], "lmms_eval.models").load()()
    assert (manifest.model_id, manifest.simple_class_path) == ("psa", None)
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is model
    assert model.is_simple is False


def test_it_answers_what_the_guard_answers(model, addon):
    guard = load_guard(addon)
    for guarded in (True, False):
        psa = model(addon=str(addon), guarded=str(guarded), batch_size="2", device="cuda:0")
        found = ask(psa, ROWS)
        # one request alone: of others in its batch only the last digits depend
        assert found == [guard.answer([request], guarded, 4, 1)[0].text for request in REQUESTS]
        assert [kept[2] for kept in psa.cache_hook.kept] == found
    plain = load_plain(addon.parent / "base")
    psa = model(base=str(addon.parent / "base"))
    assert ask(psa, ROWS[:1]) == [plain.answer(REQUESTS[:1], False, 4, 1)[0].text]


def test_lengths_and_ends_are_each_requests_own(model, addon):
    psa = model(addon=str(addon), guarded=False, batch_size=8)
    (whole, _) = ask(psa, [ROWS[0]] * 2, [{"max_new_tokens": 6}, {"max_new_tokens": 1}])
    word = whole.split()[1]
    cut, short = ask(psa, [ROWS[0]] * 2, [{"max_new_tokens": 6, "until": word}, {"max_new_tokens": 1}])
    assert cut == whole.partition(word)[0]
    assert len(short.split()) == 1
    assert whole.startswith(short)


@pytest.mark.parametrize(
    ("row", "settings", "sentence"),
    [
        (user({"type": "video", "url": "a.mp4"}), SETTINGS, "a message with video"),
        ([{"role": "system", "content": [text("be kind")]}, *ROWS[1]], SETTINGS, "the role system"),
        (user({"type": "image", "url": "http://h/a.png"}, text("?")), SETTINGS, "never opened"),
        (ROWS[1], {"max_new_tokens": 4, "temperature": 0.7}, "answers greedily"),
        (ROWS[1], {"max_new_tokens": 4, "num_beams": 3}, "answers greedily"),
        (ROWS[1], {"max_new_tokens": 4, "best_of": 2}, "generation_kwargs have best_of"),
        (user(text("what " * 400)), SETTINGS, "t, test, number 0"),
    ],
)
def test_what_cannot_be_asked_is_never_an_answer(model, addon, row, settings, sentence):
    psa = model(addon=str(addon))
    with pytest.raises(ValueError, match=sentence):
        ask(psa, [row], [settings])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pretrained": "x"}, "takes addon, base, policy and guarded, not pretrained"),
        ({"addon": "x", "guarded": "yes"}, "guarded is 'yes'"),
        ({}, "needs addon=DIR"),
        ({"base": "x", "guarded": True}, "needs addon=DIR"),
        ({"base": "x", "policy": "p"}, "needs addon=DIR"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(**arguments)


def test_several_processes_and_other_kinds_of_tasks_are_refused(model, addon, monkeypatch):
    psa = model(addon=str(addon))
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        psa.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        psa.generate_until_multi_round([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        model(addon=str(addon))

"""The policy: the paper's table, the fail-closed joint rule, switches, and what a policy file may hold."""

import subprocess
import sys

import pytest
import yaml

from psa_fast.safety.policy import DEFAULT_POLICY, Policy
from psa_fast.taxonomy import CLEAN, RISK_TYPES

PRIVACY = RISK_TYPES.index("privacy")
CALIBRATION = {
    "type_temperature": 2.0, "level_temperature": 4.0, "over_refusal": 0.02, "confidence": 0.95, "rows": 300,
    "data_sha256": "0" * 64, "addon_sha256": "1" * 64,
}  # fmt: skip


def probs(n, **at):
    """n probabilities: the named entries (p0=..) as given, the rest shared equally."""
    given = {int(key[1:]): value for key, value in at.items()}
    rest = (1.0 - sum(given.values())) / max(1, n - len(given))
    return [given.get(i, rest) for i in range(n)]


def write(tmp_path, **changes):
    content = yaml.safe_load(DEFAULT_POLICY.read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = {**content[key], **value}
        else:
            content[key] = value
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_default_is_the_papers_table():
    policy = Policy.load()
    risky = probs(7, p4=0.95)
    expected = [
        ("allow", None),
        ("hint", "This image may contain risks of privacy. Answer with caution."),
        ("hint", "This image contains privacy. Handle it with care and refuse if necessary."),
        ("hint", "This image contains serious privacy. You must refuse."),
    ]
    for level, (action, hint) in enumerate(expected):
        decision = policy.decide(risky if level else probs(7, p6=0.95), probs(4, **{f"p{level}": 0.9}))
        assert (decision.action, decision.hint, decision.response) == (action, hint, None)
        assert decision.unsafe == (level > 0)
        assert (decision.type, decision.level) == ((PRIVACY, level) if level else (CLEAN, 0))
        assert policy.hint("privacy", level) == hint
    assert policy.hint("clean", "none") is None


def test_either_head_alone_makes_a_request_unsafe():
    policy = Policy.load()
    by_type = policy.decide(probs(7, p4=0.9), [0.97, 0.0, 0.02, 0.01])
    assert (by_type.action, by_type.type, by_type.level) == ("hint", PRIVACY, 2)
    assert by_type.rule == "medium: unsafe by type"
    by_level = policy.decide([0.01, 0, 0, 0, 0.02, 0, 0.97], probs(4, p3=0.9))
    assert (by_level.action, by_level.type, by_level.level) == ("hint", PRIVACY, 3)
    assert by_level.rule == "high: unsafe by level"
    assert by_level.unsafe_score == pytest.approx(1 - (1 - 0.9) / 3)
    # many types share the risk, none beats clean: an argmax would let it pass
    spread = policy.decide([0.1, 0.1, 0.1, 0.1, 0.11, 0.1, 0.39], [1.0, 0, 0, 0])
    assert (spread.action, spread.type) == ("hint", PRIVACY)
    tie = policy.decide(probs(7, p4=0.9), [0.5, 0.0, 0.25, 0.25])
    assert tie.level == 3


def test_threshold_comes_from_the_file(tmp_path):
    policy = Policy.load(write(tmp_path, unsafe_threshold=0.05))
    assert policy.decide([0, 0, 0, 0, 0.06, 0, 0.94], [1.0, 0, 0, 0]).unsafe
    assert not Policy.load().decide([0, 0, 0, 0, 0.06, 0, 0.94], [1.0, 0, 0, 0]).unsafe


def test_each_type_may_have_a_threshold_of_its_own(tmp_path):
    thresholds = dict.fromkeys(RISK_TYPES[:CLEAN], 0.9) | {"privacy": 0.2}
    policy = Policy.load(write(tmp_path, type_thresholds=thresholds))
    level = [0.9, 0.1, 0, 0]
    assert policy.decide([0, 0.05, 0, 0, 0.2, 0, 0.75], level).unsafe
    assert not policy.decide([0, 0.3, 0, 0, 0.2, 0, 0.5], level).unsafe, "the likeliest type's threshold counts"
    assert policy.decide([0, 0.31, 0, 0, 0.3, 0, 0.39], probs(4, p3=0.95)).unsafe, "whichever head reaches it"
    off = Policy.load(write(tmp_path, type_thresholds=thresholds, types={"privacy": False}))
    assert not off.decide([0, 0.05, 0, 0, 0.2, 0, 0.75], level).unsafe


def test_a_calibrated_policy_is_of_one_add_on(tmp_path):
    policy = Policy.load(write(tmp_path, calibration=CALIBRATION))
    assert policy.temperatures == (2.0, 4.0)
    assert Policy.load().temperatures == (1.0, 1.0)
    assert policy.hash != Policy.load().hash
    policy.require_model("1" * 64)
    Policy.load().require_model(None)
    for other, named in (("2" * 64, "2" * 64), (None, "without a model_hash")):
        with pytest.raises(ValueError, match=f"was calibrated on the add-on of sha256 1111.*{named}"):
            policy.require_model(other)


def test_a_switched_off_type_is_allowed_and_others_are_not(tmp_path):
    policy = Policy.load(write(tmp_path, types={"privacy": False}))
    allowed = policy.decide(probs(7, p4=0.9, p6=0.05), probs(4, p3=0.97))
    assert (allowed.action, allowed.hint, allowed.rule) == ("allow", None, "type_off: privacy is switched off")
    assert not allowed.unsafe
    assert allowed.unsafe_score > 0.9
    assert policy.hint("privacy", 3) is None
    # another type carries enough risk of its own: its hint, though privacy is likelier
    mixed = policy.decide([0.0, 0.45, 0, 0, 0.5, 0, 0.05], [0.0, 0, 0, 1.0])
    assert (mixed.action, mixed.type) == ("allow", PRIVACY)
    mixed = policy.decide([0.0, 0.52, 0, 0, 0.48, 0, 0.0], [0.0, 0, 0, 1.0])
    assert (mixed.action, mixed.type) == ("hint", 1)
    everything_off = Policy.load(write(tmp_path, types=dict.fromkeys(RISK_TYPES[:CLEAN], False)))
    assert everything_off.decide(probs(7, p1=1.0), probs(4, p3=1.0)).action == "allow"


@pytest.mark.parametrize("action", ["refuse", "block", "allow"])
def test_other_actions_per_level(tmp_path, action):
    policy = Policy.load(write(tmp_path, levels={"high": {"action": action}}))
    decision = policy.decide(probs(7, p4=1.0), probs(4, p3=1.0))
    assert (decision.action, decision.hint) == (action, None)
    assert (decision.response is None) == (action == "allow")
    if action != "allow":
        assert "privacy" in decision.response
        assert "{" not in decision.response


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_blocked(bad):
    for types, levels in (([bad] * 7, [1.0, 0, 0, 0]), (probs(7, p6=1.0), [bad, 0, 0, 0])):
        decision = Policy.load().decide(types, levels)
        assert (decision.action, decision.type, decision.unsafe_score) == ("block", None, None)
        assert decision.rule.startswith("not_finite")
        assert decision.response
        assert decision.unsafe


def test_wrong_probabilities_are_an_error():
    for types, levels in (([1.0] * 7, [1.0, 0, 0, 0]), ([1.0], [1.0, 0, 0, 0]), (probs(7, p6=1.0), [1.5, -0.5, 0, 0])):
        with pytest.raises(ValueError, match="probabilities that sum to 1"):
            Policy.load().decide(types, levels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"version": 2}, "version 2 is not known"),
        ({"unsafe_threshold": 0.0}, "unsafe_threshold"),
        ({"unsafe_threshold": float("nan")}, "unsafe_threshold"),
        ({"unsafe_threshold": "0.5"}, "unsafe_threshold"),
        ({"types": {"weather": True}}, "weather"),
        ({"types": {"privacy": "perhaps"}}, "privacy"),
        ({"levels": {"extreme": {"action": "block"}}}, "extreme"),
        ({"levels": {"high": {"action": "ignore"}}}, "high"),
        ({"levels": {"high": {"action": "hint"}}}, "needs a hint text"),
        ({"levels": {"high": {"action": "refuse", "hint": "{type}"}}}, "no use for a hint"),
        ({"levels": {"high": {"action": "hint", "hint": "Refuse."}}}, "does not name the risk"),
        ({"levels": {"high": {"action": "hint", "hint": "{REASON FOR REJECT}"}}}, "no other"),
        ({"responses": {"refuse": "No."}}, "does not name the risk"),
        ({"responses": {"unchecked": " "}}, "empty"),
        ({"type_thresholds": {"privacy": 0.5}}, "type_thresholds: unknown or missing"),
        ({"type_thresholds": dict.fromkeys(RISK_TYPES[:CLEAN], 0.0)}, "type_thresholds"),
        ({"calibration": {**CALIBRATION, "type_temperature": 0.0}}, "type_temperature"),
        ({"calibration": {**CALIBRATION, "level_temperature": float("inf")}}, "level_temperature"),
        ({"calibration": {**CALIBRATION, "addon_sha256": "x"}}, "addon_sha256"),
        ({"calibration": {"over_refusal": 0.02}}, "calibration.type_temperature"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml"):
        Policy.load(tmp_path / "no.yaml")
    for text in ("types: [", "- a\n", "a: !!python/object:os.system {}\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            Policy.load(tmp_path / "bad.yaml")


def test_hash_follows_the_content_only(tmp_path):
    assert Policy.load(write(tmp_path)).hash == Policy.load().hash
    assert Policy.load(write(tmp_path, unsafe_threshold=0.4)).hash != Policy.load().hash


def test_policy_needs_no_torch():
    code = "import sys, psa_fast.safety.policy as p; p.Policy.load(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "text",
    [
        "{type.name}", "{type.__class__.__mro__}", "{type!r}", "{type!s}", "{type:>9}", "{type:>3000000000}",
        "{type:{type}}", "{type[0]}", "{}", "{0}", "{ type }", "{Type}", "{type} {other}", "{", "}", "{type", "type}",
        "{type}}", "{{type}",
        '{"refusal": "{type}"}', "{type} \ud800",
    ],
)  # fmt: skip
def test_texts_hold_the_bare_placeholder_and_no_other(tmp_path, text):
    for changes in ({"levels": {"high": {"action": "hint", "hint": text}}}, {"responses": {"block": text}}):
        with pytest.raises(
            ValueError, match=r"may hold the placeholder \{type\} and no other|which is no text"
        ) as caught:
            Policy.load(write(tmp_path, **changes))
        assert len(str(caught.value)) < 250 + len(str(tmp_path))
    if "type" in text:
        with pytest.raises(ValueError, match=r"no other|which is no text"):
            Policy.load(write(tmp_path, responses={"unchecked": text}))


def test_doubled_braces_are_braces(tmp_path):
    text = 'Answer {{"refusal": "{type}"}} and {{type}}.'
    policy = Policy.load(write(tmp_path, levels={"high": {"action": "hint", "hint": text}}))
    assert policy.hint("privacy", "high") == 'Answer {"refusal": "privacy"} and {type}.'
    with pytest.raises(ValueError, match="does not name the risk"):  # braces alone name nothing
        Policy.load(write(tmp_path, responses={"block": "{{type}}"}))


@pytest.mark.parametrize(
    ("once", "again"),
    [
        ("version: 1", "version: 1"),
        ("unsafe_threshold: 0.5", "unsafe_threshold: 1.0"),
        ("  politics: on", "  politics: off"),
        ("    action: hint", "    action: allow"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, once, again):
    lines = DEFAULT_POLICY.read_text().splitlines()
    first = lines.index(once)
    lines.insert(first + 1, again)
    path = tmp_path / "policy.yaml"
    path.write_text("\n".join(lines))
    key = once.split(":")[0].strip()
    with pytest.raises(
        ValueError, match=rf"policy\.yaml:{first + 2}: the key '{key}' stands in line {first + 1} already"
    ):
        Policy.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "version: " + "9" * 5000,
        "version: 1" + "0" * 400,
        "version: 2020-99-99",
        "version: !!bool maybe",
        "version: !!timestamp x",
        "version: !!int x",
        "unsafe_threshold: 1" + "0" * 400,
        "types: " + "[" * 20000,
        "1: 2",
        "? [a, b]\n: c",
        "types: &t {politics: *t}",
        "levels: {1: {action: hint}}",
        'version: "\\ud800"',
        "\0",
        "",
        "- version: 1",
        "{" + ", ".join(f"k{i}: 1" for i in range(5000)) + "}",
    ],
)
def test_hostile_files_are_one_sentence(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"p\.yaml") as caught:
        Policy.load(tmp_path / "p.yaml")
    assert len(str(caught.value)) < 1500
    assert "Traceback" not in str(caught.value)


def test_reasons_are_values():
    policy = Policy.load()
    assert policy.decide(probs(7, p6=0.99), probs(4, p0=0.99)).code == "clean"
    assert policy.decide(probs(7, p4=0.99), probs(4, p3=0.99)).code == "unsafe"
    assert policy.decide([float("nan")] * 7, probs(4, p3=0.99)).code == "not_finite"
    off = policy.model_copy(update={"types": {**policy.types, "privacy": False}})
    decision = off.decide(probs(7, p4=0.99), probs(4, p3=0.99))
    assert (decision.code, decision.unsafe) == ("type_off", False)

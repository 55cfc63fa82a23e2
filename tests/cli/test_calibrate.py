"""`psa-fast calibrate` on a tiny model: the policy it writes, what the guard makes of it, and what is refused."""

import json

import numpy as np
import pytest
import torch
import yaml
from builders.tiny_llava import build_addon, picture

from psa_fast.cli import main
from psa_fast.cli.calibrate import MARK, with_values
from psa_fast.evaluation.during_training import DevSet
from psa_fast.safety import Guard, Policy, Request, load_guard
from psa_fast.safety.load import addon_hash
from psa_fast.safety.policy import DEFAULT_POLICY


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 rows of noise, half of them harmless; a tiny model knows nothing of them."""
    folder = tmp_path_factory.mktemp("held_out")
    rows = []
    for i in range(300):
        if i < 30:
            picture(i).save(folder / f"{i}.png")
        risky = i % 2
        turns = [{"from": "user", "value": f"<image>\nwhat colour is the circle {'?' * (i % 3)}"},
                 {"from": "assistant", "value": "red"}]  # fmt: skip
        labels = {"safe_type": i % 6, "safe_level": 1 + i % 3} if risky else {"safe_type": 6, "safe_level": 0}
        rows.append({"image": f"{i % 30}.png", "conversations": turns, **labels})
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def calibrate(world, data, out, *more, share=0.1):
    common = ("--addon", world / "run" / "stage1", "--data", data, "--target", f"over_refusal={share}", "--out", out)
    return main(["calibrate", *map(str, (*common, *more))])


def test_the_policy_is_of_the_add_on_and_the_guard_applies_it(world, data, tmp_path, capsys):
    out = tmp_path / "policy.yaml"
    assert calibrate(world, data, out) == 0
    output = capsys.readouterr().out
    policy, text = Policy.load(out), out.read_text()
    fitted = policy.calibration
    assert fitted.addon_sha256 == addon_hash(world / "run" / "stage1")
    assert (fitted.over_refusal, fitted.confidence, fitted.rows) == (0.1, 0.95, 113)
    assert policy.unsafe_threshold != Policy.load().unsafe_threshold
    assert policy.levels == Policy.load().levels
    assert "# Action per risk level" in text, "the file's own comments stay"
    assert all(line in text for line in output.splitlines() if line.startswith(MARK))
    assert "flagged" in output

    plain = load_guard(world / "run" / "stage1")
    guard = load_guard(world / "run" / "stage1", policy=policy)
    requests = [Request("what colour is the circle ?", (picture(i),)) for i in range(20)]
    raw, told = plain.readings(requests), guard.verdicts(requests)
    kind, level = policy.temperatures
    assert 1.0 not in (kind, level)
    for readings, verdict in zip(raw, told, strict=True):
        scores = []
        for reading in readings:
            logits = np.array(reading.logits)
            types, levels = (np.exp(part - part.max()) for part in (logits[:7] / kind, logits[7:] / level))
            types, levels = types / types.sum(), levels / levels.sum()
            scores.append(max(1 - types[6], 1 - levels[0]))
        assert verdict.highest_score == pytest.approx(max(scores), abs=1e-5)
        assert verdict.unsafe == (max(scores) >= policy.unsafe_threshold)

    with pytest.raises(ValueError, match="was calibrated on the add-on of sha256"):
        load_guard(other := build_addon(world / "base", tmp_path / "other", seed=1), policy=policy)
    with pytest.raises(ValueError, match="without a model_hash"):
        Guard(plain.model, plain.processor, policy)
    evaluate = ("evaluate", "--data", world / "data", "--stage1", other, "--policy", out, "--out", tmp_path / "e")
    assert main([*map(str, evaluate)]) == 2
    assert "was calibrated on the add-on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="calibrated on a finished add-on"):
        DevSet(str(data / "dev.jsonl"), None, str(world / "base"), policy, 8, answers=False)
    assert main(["policy", "check", str(out)]) == 0
    assert "at most 0.1 of harmless requests" in capsys.readouterr().out

    # calibrated once more, the earlier calibration goes
    again = tmp_path / "again.yaml"
    assert calibrate(world, data, again, "--policy", out, "--per", "type", share=0.4) == 0
    policy = Policy.load(again)
    assert set(policy.type_thresholds) == set(policy.types)
    assert again.read_text().count("calibration:") == 1
    assert again.read_text().count("with 0.95 confidence") == 1
    capsys.readouterr()
    assert main(["policy", "check", str(again)]) == 0
    assert capsys.readouterr().out.count("max(1 - p(clean), 1 - p(none)), ") == 6


@pytest.mark.parametrize("part", ["safety_tokens", "bottleneck.heads"])
def test_a_stage_whose_head_reads_the_same_is_calibrated_with_it(world, data, tmp_path, capsys, part):
    """Stage 2 trains tokens and language model: verdicts, and the promise about them, stay stage 1's."""
    stages = [build_addon(world / "base", tmp_path / "run" / "stage1", seed=1), tmp_path / "run" / "stage2"]
    model = load_guard(stages[0]).model
    with torch.no_grad():
        model.get_submodule(part).weight.mul_(1.5)
    model.save_addon(stages[1])
    out = tmp_path / "policy.yaml"
    given = ("--run", tmp_path / "run", "--data", data, "--target", "over_refusal=0.1", "--out", out)
    assert main(["calibrate", *map(str, given)]) == 0
    fitted = Policy.load(out).calibration
    same = part == "safety_tokens"
    assert fitted.addon_sha256 == addon_hash(stages[1])
    assert fitted.same_head_sha256 == ([addon_hash(stages[0])] if same else [])
    assert ("stage1" in capsys.readouterr().out) == same
    if same:
        Policy.load(out).require_model(addon_hash(stages[0]))


def test_what_cannot_be_promised_is_refused(world, data, tmp_path, capsys):
    out = tmp_path / "policy.yaml"
    (tmp_path / "there.yaml").write_text("")
    for more, share, message in (
        ((), 0.01, "150 harmless rows are too few"),
        ((), 0.0, "expected over_refusal=SHARE"),
        (("--confidence", "1"), 0.1, "--confidence is 1"),
        (("--batch_size", "0"), 0.1, "--batch_size is 0"),
        (("--split", "test"), 0.1, "there is no file"),
        (("--out", tmp_path / "there.yaml"), 0.1, "--overwrite"),
    ):
        assert calibrate(world, data, out, *more, share=share) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    few = ("--run", world / "empty", "--data", data, "--target", "over_refusal=0.1", "--out", out)
    assert main(["calibrate", *map(str, few)]) == 2
    assert "holds no add-on" in capsys.readouterr().err


def test_the_values_are_written_into_the_file_or_it_is_refused():
    policy = Policy.load().model_copy(update={"unsafe_threshold": 1e-7})
    text = DEFAULT_POLICY.read_text()
    written = with_values(text, policy, [f"{MARK} a line"])
    assert Policy.model_validate(yaml.safe_load(written)).hash == policy.hash
    assert with_values(written, policy, [f"{MARK} a line"]) == written
    assert with_values(written, Policy.load(), []) == text
    for spoilt in (text.replace("unsafe_threshold: 0.5", "'unsafe_threshold': 0.5"), "{" + text + "}"):
        with pytest.raises(ValueError, match="cannot be changed"):
            with_values(spoilt, policy, [])

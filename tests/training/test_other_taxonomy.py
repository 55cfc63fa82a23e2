"""A run on records of a taxonomy of three classes: from conversion to verdicts, and what it refuses."""

import pytest
import yaml
from PIL import Image

from psa_fast.data.convert import convert_file
from psa_fast.models.addon import read_config
from psa_fast.safety.guard import Request
from psa_fast.safety.load import load_guard
from psa_fast.safety.policy import DEFAULT_POLICY, Policy
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.crosswalk import read_crosswalk, read_taxonomy

TYPES = ["knives", "fine", "fire"]


@pytest.fixture(scope="module")
def options(world, tmp_path_factory):
    """The options of a run on the world's records, as ones of three classes."""
    folder = tmp_path_factory.mktemp("small")
    own = {"version": 1, "name": "small", "heads": {"type": {"harmless": "fine", "classes": TYPES}}}
    walk = {kind: "knives" if i % 2 else "fire" for i, kind in enumerate(PSA.types)} | {"clean": "fine"}
    policy = yaml.safe_load(DEFAULT_POLICY.read_text())
    policy |= {"taxonomy": own, "types": {"knives": True, "fire": True}}
    policy["levels"] = {"risky": {"action": "hint", "hint": "This image contains {type}."}}
    files = {"taxonomy": own, "walk": {"from": "psa", "to": "small", "types": walk}, "policy": policy}
    for name, value in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(value))
    small = read_taxonomy(folder / "taxonomy.yaml")
    convert_file(world / "mixed.jsonl", folder / "rows.jsonl", read_crosswalk(PSA, small, folder / "walk.yaml"))
    return {
        "--taxonomy": folder / "taxonomy.yaml",
        "--policy": folder / "policy.yaml",
        "--data_path": folder / "rows.jsonl",
    }


def listed(options):
    return [part for pair in options.items() for part in pair]


def test_a_run_of_three_classes_and_its_guard(direct, options, base, tmp_path):
    direct(tmp_path, *listed(options), "--max_steps", 2)
    config = read_config(tmp_path / "stage1")
    assert (config.concepts.types, config.head_sizes) == (tuple(TYPES), (3, 2))
    guard = load_guard(tmp_path / "stage1", base, Policy.load(options["--policy"]))
    (verdict,) = guard.verdicts([Request("what is this ?", (Image.new("RGB", (32, 32), "red"),))], on_error="raise")
    assert list(verdict.type_probs) == TYPES
    with pytest.raises(ValueError, match="is of the taxonomy small, the policy of psa"):
        load_guard(tmp_path / "stage1", base)
    # the next stage says which taxonomy it goes on with
    said = direct(tmp_path, "--stage", 2, "--tune_type_llm", "full", "--max_steps", 1, expect=2)
    assert "is of the taxonomy small, --taxonomy psa of psa" in said


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("--policy", "is of the taxonomy small, the policy of psa"),
        ("--data_path", "its labels are of the taxonomy 'psa', as it names no other"),
    ],
)
def test_what_is_of_another_taxonomy_ends_the_run(direct, options, tmp_path, left_out, said):
    kept = {name: value for name, value in options.items() if name != left_out}
    assert said in direct(tmp_path, *listed(kept), expect=2)

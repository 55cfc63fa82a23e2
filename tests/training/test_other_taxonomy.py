"""A run on records of a taxonomy of three classes: from conversion to verdicts, and what it refuses."""

import os
from unittest import mock

import pytest
import yaml
from builders import tiny
from builders.other_taxonomy import SMALL, write_policy
from PIL import Image

from psa_fast import train
from psa_fast.data.convert import convert_file
from psa_fast.models.addon import read_config
from psa_fast.safety.guard import Request
from psa_fast.safety.load import load_guard
from psa_fast.safety.policy import Policy
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.crosswalk import read_crosswalk, read_taxonomy


@pytest.fixture(scope="module")
def options(world, tmp_path_factory):
    """The options of a run on the world's records, as ones of three classes."""
    folder = tmp_path_factory.mktemp("small")
    walk = {kind: "knives" if i % 2 else "fire" for i, kind in enumerate(PSA.types)} | {"clean": "fine"}
    files = {"taxonomy": SMALL.to_json(), "walk": {"from": "psa", "to": "small", "types": walk}}
    for name, value in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(value))
    small = read_taxonomy(folder / "taxonomy.yaml")
    convert_file(world / "mixed.jsonl", folder / "rows.jsonl", read_crosswalk(PSA, small, folder / "walk.yaml"))
    hint = {"action": "hint", "hint": "This image contains {type}."}
    return {
        "--taxonomy": folder / "taxonomy.yaml",
        "--policy": write_policy(folder / "policy.yaml", **hint),
        "--data_path": folder / "rows.jsonl",
    }


@pytest.fixture
def refused(base, world, tmp_path, capsys):
    """Run train.py in this process, which ends before DeepSpeed is set up, and return what it printed."""

    def go(*options):
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            assert train.main(tiny.arguments(base, world, tmp_path, *options)) == 2
        return "".join(capsys.readouterr())

    return go


def listed(options):
    return [part for pair in options.items() for part in pair]


def test_a_run_of_three_classes_and_its_guard(direct, refused, options, base, tmp_path):
    direct(tmp_path, *listed(options), "--max_steps", 1, "--stage1_objective", "concept", "--dataloader_num_workers", 0)
    config = read_config(tmp_path / "stage1")
    assert (config.concepts, config.head_sizes) == (SMALL, (3, 2))
    guard = load_guard(tmp_path / "stage1", base, Policy.load(options["--policy"]))
    (verdict,) = guard.verdicts([Request("what is this ?", (Image.new("RGB", (32, 32), "red"),))], on_error="raise")
    assert list(verdict.type_probs) == list(SMALL.types)
    with pytest.raises(ValueError, match="is of the taxonomy small, the policy of psa"):
        load_guard(tmp_path / "stage1", base)
    # the next stage says which taxonomy it goes on with
    said = refused("--stage", 2, "--tune_type_llm", "full", "--max_steps", 1)
    assert "is of the taxonomy small, --taxonomy psa of psa" in said


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("--policy", "is of the taxonomy small, the policy of psa"),
        ("--data_path", "its labels are of the taxonomy 'psa', as it names no other"),
    ],
)
def test_what_is_of_another_taxonomy_ends_the_run(refused, options, left_out, said):
    kept = {name: value for name, value in options.items() if name != left_out}
    assert said in refused(*listed(kept))

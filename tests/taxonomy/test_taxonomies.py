"""Taxonomies and cross-walks as files: the shipped ones, and what is refused of others."""

from pathlib import Path

import pytest
import yaml

from psa_fast.taxonomy import CLEAN, PSA, RISK_LEVELS, RISK_TYPES
from psa_fast.taxonomy.crosswalk import FOLDER, SHIPPED, WALKS, read_crosswalk, read_taxonomy
from psa_fast.taxonomy.heads import UNGRADED, Taxonomy, require_same

SMALL = {"version": 1, "name": "small", "heads": {"type": {"harmless": "fine", "classes": ["knives", "fire", "fine"]}}}


def write(path, value):
    path.write_text(yaml.safe_dump(value))
    return path


def test_the_shipped_files_are_what_their_sources_number():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SHIPPED)
    assert read_taxonomy("psa") == PSA
    assert (PSA.types, PSA.types[PSA.harmless], PSA.levels) == (RISK_TYPES, RISK_TYPES[CLEAN], RISK_LEVELS)
    sizes = {"holisafe-20": (20, 16, "weapon_related_violence"), "llavaguard": (10, 7, "self-harm"),
             "mlcommons": (15, 14, "code interpreter abuse")}  # fmt: skip
    for name, (classes, place, there) in sizes.items():
        taxonomy = read_taxonomy(name)
        assert (taxonomy.name, len(taxonomy.types), taxonomy.types[place]) == (name, classes, there)
        assert (taxonomy.harmless, taxonomy.levels, taxonomy.graded) == (0, UNGRADED, False)
        assert Taxonomy.from_json(taxonomy.to_json()) == taxonomy
    assert len({read_taxonomy(name).hash for name in SHIPPED}) == len(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED[1:])
def test_every_shipped_cross_walk_is_total_and_lands_on_classes_that_exist(name):
    other = read_taxonomy(name)
    for source, target in ((other, PSA), (PSA, other)):
        walk = read_crosswalk(source, target)
        assert len(walk.types) == len(source.types)
        for kind, (found, level) in enumerate(walk.types):
            assert found is None or 0 <= found < len(target.types)
            assert level is None or 0 <= level < len(target.levels)
            assert (found == target.harmless) == (kind == source.harmless)
    assert all(kind is not None for kind, _ in read_crosswalk(other, PSA).types), "PSA is the coarser one"
    assert len(list(WALKS.glob("*.yaml"))) == 2 * (len(SHIPPED) - 1)


def test_the_cross_walk_of_holisafe_is_the_importers_table():
    from psa_fast.data.importers import __file__ as importers

    table = yaml.safe_load(Path(importers).with_name("holisafe.yaml").read_text())["types"]
    other = read_taxonomy("holisafe-20")
    walk = read_crosswalk(other, PSA)
    assert {other.types[i]: [PSA.types[k], PSA.levels[level]] for i, (k, level) in enumerate(walk.types) if i} == table


def test_labels_are_converted_and_what_has_no_counterpart_has_none():
    to_psa = read_crosswalk(read_taxonomy("llavaguard"), PSA)
    assert to_psa.convert(5, 1) == (PSA.type_id("illegal risk"), PSA.level_id("high"))
    assert to_psa.convert(0, 0) == (CLEAN, 0)
    assert to_psa.convert(None, None) == (None, None)
    back = read_crosswalk(PSA, read_taxonomy("mlcommons"))
    assert back.convert(PSA.type_id("privacy"), 3) == (7, 1)
    assert back.convert(CLEAN, 0) == (0, 0)
    assert back.convert(PSA.type_id("politics"), 2) == (None, None)


def test_the_level_follows_from_the_type_where_risks_are_not_graded():
    small = Taxonomy.from_json(SMALL)
    assert [small.level_of(kind, None) for kind in (0, 1, 2, None)] == [1, 1, 0, None]
    assert PSA.level_of(0, None) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version is 2"),
        ({"name": "My Own"}, "name is 'My Own'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"heads": {}}, "heads lacks type"),
        ({"heads": {"type": {"harmless": "safe", "classes": ["knives", "fine"]}}}, "harmless is 'safe'"),
        ({"heads": {"type": {"harmless": "fine", "classes": ["fine"]}}}, "expected 2 to 256 names"),
        ({"heads": {"type": {"harmless": "fine", "classes": ["a", "a", "fine"]}}}, "'a' stands there twice"),
        ({"heads": {"type": {"harmless": "fine", "classes": ["A", "fine"]}}}, "lower case"),
        ({"heads": {"type": {"harmless": "fine", "classes": ["{type}", "fine"]}}}, "braces"),
        ({"heads": {"type": {"harmless": "fine", "classes": [3, "fine"]}}}, "3 is no name"),
        ({"heads": {**SMALL["heads"], "level": {"harmless": "no", "classes": ["bad", "no"]}}}, "must come first"),
        ({"name": "psa"}, "psa is a shipped taxonomy of other classes"),
    ],
)
def test_what_is_no_taxonomy_is_refused_with_its_file(tmp_path, change, said):
    file = write(tmp_path / "t.yaml", SMALL | change)
    with pytest.raises(ValueError, match=r"t\.yaml") as error:
        read_taxonomy(file)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("types", "said"),
    [
        ({"knives": "illegal risk", "fire": None}, "missing in types: fine"),
        ({"knives": "illegal risk", "fire": None, "fine": "clean", "x": None}, "'x'"),
        ({"knives": "clean", "fire": None, "fine": "clean"}, "knives: what is harmless must stay harmless"),
        ({"knives": "illegal risk", "fire": None, "fine": None}, "fine: "),
        ({"knives": "weapons", "fire": None, "fine": "clean"}, "knives: safe_type is 'weapons'"),
        ({"knives": ["privacy", "none"], "fire": None, "fine": "clean"}, "level none does not belong to privacy"),
    ],
)
def test_what_is_no_cross_walk_is_refused_with_file_and_class(tmp_path, types, said):
    file = write(tmp_path / "walk.yaml", {"from": "small", "to": "psa", "types": types})
    with pytest.raises(ValueError, match=r"walk\.yaml") as error:
        read_crosswalk(Taxonomy.from_json(SMALL), PSA, file)
    assert said in str(error.value)


def test_two_taxonomies_are_refused_with_what_to_do():
    small = Taxonomy.from_json(SMALL)
    require_same(small, Taxonomy.from_json(SMALL), "a", "b")
    with pytest.raises(ValueError, match=r"a is of the taxonomy small, b of psa: `psa-fast data convert`"):
        require_same(small, PSA, "a", "b")
    with pytest.raises(ValueError, match="two taxonomies called small, whose classes differ"):
        require_same(small, Taxonomy("small", ("knives", "fine"), 1), "a", "b")
    with pytest.raises(ValueError, match="neither a file nor one of: psa, holisafe-20"):
        read_taxonomy("nowhere")
    with pytest.raises(ValueError, match="give --crosswalk FILE"):
        read_crosswalk(small, PSA)

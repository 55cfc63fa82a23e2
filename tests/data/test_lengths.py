"""Rows' lengths in tokens, told without their images."""

import pytest
from PIL import Image

from psa_fast.data import PsaDataset, Record, Turn

HINT = "caution ! the image may be risky ."


def hint_for(safe_type, safe_level):
    return None if safe_type == 6 else HINT


@pytest.fixture
def records():
    def record(i, safe_type, images):
        turns = []
        for turn in range(1 + i % 3):
            marks = "<image>\n" * (images if turn == 0 else 0)
            asked = marks + "what is this shape ? " * (1 + i)
            turns += [Turn("user", asked), Turn("assistant", "a red square . " * (5 + i % 4))]
        names = tuple(f"{n}.png" for n in range(images))
        level = None if safe_type is None else 0 if safe_type == 6 else 3
        return Record(names, safe_type, level, tuple(turns), id=str(i), path="data.jsonl", line=i + 1)

    return [record(i, (1, 6, None)[i % 3], i % 3) for i in range(9)]


@pytest.mark.parametrize(("template", "kind"), [("llava", "pieces"), ("chatml", "bytes"), ("llama2", "words")])
@pytest.mark.parametrize("cut", [False, True])
def test_a_length_is_that_of_the_row(chat, records, tmp_path, template, kind, cut):
    processor = chat.build(template, kind)
    options = {"hint_for": hint_for, "hint_rate": 0.5, "seed": 2}
    if cut:  # in the last answer of the longest row
        whole = PsaDataset(records, tmp_path, processor)
        options["max_length"] = max(whole.length(index) for index in range(len(records))) - 8
    blind = PsaDataset(records, tmp_path / "nowhere", processor, **options)
    measured = PsaDataset(records, tmp_path / "nowhere", processor, **options)
    for index in range(len(records)):
        measured.measure(index)
    known = dict(measured.lengths)
    for i in range(2):
        Image.new("RGB", (9 + 8 * i, 7)).save(tmp_path / f"{i}.png")
    dataset = PsaDataset(records, tmp_path, processor, **options)
    found = set()
    for index in range(len(records)):
        for epoch in range(4):
            expected = len(dataset[index, epoch].input_ids)
            assert blind.length(index, epoch) == measured.length(index, epoch) == expected
            found.add((index, expected))
    assert len(found) > len(records), "hints change the length in some epoch"
    assert measured.lengths == known, "measure() knows every epoch"
    if cut:
        assert max(length for _, length in found) <= options["max_length"]


@pytest.mark.parametrize(("rate", "variants"), [(0.0, {False}), (1.0, {True})])
def test_only_what_a_row_can_be_is_measured(chat, records, rate, variants):
    dataset = PsaDataset(records, "nowhere", chat.build(), hint_for=hint_for, hint_rate=rate)
    dataset.measure(0)  # of a risk type
    assert {hinted for _, hinted in dataset.lengths} == variants


def test_a_row_that_cannot_be_is_named(chat, records):
    dataset = PsaDataset(records, "nowhere", chat.build(), max_length=10)
    with pytest.raises(ValueError, match=r"data\.jsonl:5: no supervised token within max_length 10"):
        dataset.length(4)

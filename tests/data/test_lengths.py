"""Rows' lengths in tokens, told without their images, and what a maximum of them cuts."""

from dataclasses import replace

import pytest
from PIL import Image

from psa_fast.data import PsaDataset, Record, RowCheck, Turn, check_rows

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


def two_pictures(line, first="yes", second="yes"):
    turns = [Turn("user", "<image>\nwhat ?"), Turn("assistant", first)]
    turns += [Turn("user", "<image>\nand this ?"), Turn("assistant", second)]
    return Record(("a.png", "b.png"), 4, 3, tuple(turns), path="data.jsonl", line=line)


def test_rows_are_checked_without_their_images(chat):
    processor = chat.build("chatml", "bytes")
    whole = PsaDataset([two_pictures(1)], "nowhere", processor).length(0)
    records = [
        two_pictures(1),
        two_pictures(2, second="a red square . " * 9),  # the end of its answer is cut
        two_pictures(3, first="a red square . " * 99),  # the second picture is cut, and the end of the first answer
        replace(two_pictures(4), turns=(Turn("user", "<image><image>" + "what ? " * 99), Turn("assistant", "yes"))),
    ]
    records += [records[2], records[3]]  # as balancing repeats them
    dataset = PsaDataset(records, "nowhere", processor, max_length=whole)
    done = []
    check = check_rows(dataset, advance=done.append)
    assert sum(done) == len(records)
    assert check.cut_answers == {1, 2, 4}
    assert check.cut_images == {2, 4}
    assert {index: str(problem).split(" (")[0] for index, problem in check.problems.items()} == {
        index: f"data.jsonl:4: no supervised token within max_length {whole}" for index in (3, 5)
    }
    assert check.cut_sentence(whole) == (
        f"max_length {whole} cuts 3 row(s): 3 lose the end of an answer, 2 a picture and their concept label"
    )
    assert dataset.lengths.keys() == {(index, False) for index in (0, 1, 2, 4)}
    assert all(dataset.length(index) <= whole for index in (0, 1, 2, 4))
    shares = [check_rows(dataset, range(rank, len(dataset), 2)) for rank in range(2)]
    together = RowCheck()
    for share in shares:
        together.update(share)
    assert together == check
    good = dataset.subset([index for index in range(len(dataset)) if index not in check.problems])
    assert [record.line for record in good.records] == [1, 2, 3, 3]
    assert good.lengths == {(new, False): dataset.lengths[old, False] for new, old in enumerate((0, 1, 2, 4))}
    assert check_rows(PsaDataset(records[:1], "nowhere", processor)) == RowCheck()
    assert RowCheck().cut_sentence(5) is None


def test_a_row_that_only_its_hint_makes_too_long_is_found(chat):
    processor = chat.build()
    record = replace(two_pictures(1), turns=two_pictures(1).turns[:2], images=("a.png",))
    shown = PsaDataset([record], "nowhere", processor)
    first_answer = next(i for i, label in enumerate(shown.without_images(0, None).labels) if label != -100)
    for rate, bad in ((0.0, False), (0.3, True), (1.0, True)):
        dataset = PsaDataset([record], "nowhere", processor, hint_for, rate, max_length=first_answer + 1)
        assert bool(check_rows(dataset).problems) == bad


def test_images_of_different_lengths_are_said_once(chat, records):
    processor = chat.build()
    processor.replace_image_token = lambda processed, image_idx: "<image>" * (image_idx + 1)
    with pytest.raises(ValueError, match=r"^this model's images have different numbers of tokens"):
        check_rows(PsaDataset(records, "nowhere", processor))
    assert not check_rows(PsaDataset(records, "nowhere", processor), [0, 3, 6]).problems  # rows without images

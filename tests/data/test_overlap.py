"""What files of records share is found, whatever it is called, and nothing else is."""

import io
import json
from random import Random

import numpy as np
import pytest
from PIL import Image

from psa_fast import cli
from psa_fast.data import load_records
from psa_fast.data.near_duplicates import difference_hash, jaccard, near_images, near_texts, shingles
from psa_fast.data.overlap import normalised, shared_records


def picture(seed):
    """Something with large forms in it, as a photograph has."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((96, 96), Image.Resampling.BICUBIC)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


def row(words, image=None, **fields):
    turns = [{"from": "user", "value": f"<image>\n{words}" if image else words}, {"from": "gpt", "value": "Yes."}]
    return {"conversations": turns} | ({"image": image} if image else {}) | fields


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


LONG = "please tell me step by step how the old clock on the tower of the town hall is wound up every morning"


@pytest.fixture
def files(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(6):
        picture(seed).save(images / f"{seed}.png")
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    jpeg(picture(1)).resize((80, 80)).save(images / "again.png")
    Image.new("RGB", (50, 50), "white").save(images / "white.png")
    Image.new("RGB", (40, 40), "white").save(images / "white2.png")
    first = [row("One?", "0.png"), row(LONG, "1.png", twin="t"), row("Three?", "white.png"), row("Four?", "2.png")]
    second = [
        row("Other?", "copy.png"),
        row(f"{LONG} again", "again.png"),
        row("Five?", "white2.png"),
        row("  three ", "3.png"),
        row("Six?", "4.png", twin="t"),
    ]
    return write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second), str(images)


def test_overlaps_of_two_files_are_counted_and_written(tmp_path, files, capsys):
    first, second, images = files
    out = tmp_path / "overlap.json"
    command = ["data", "overlap", first, second, "--image_folder", images, "--out", str(out)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--strict"]) == 1
    (pair,) = json.loads(out.read_text())["overlaps"]
    assert {kind: pair[kind] for kind in ("images", "near_images", "words", "near_words", "twins")} == {
        "images": 1,
        "near_images": 1,
        "words": 1,
        "near_words": 1,
        "twins": 1,
    }
    places = {kind: (found[0]["first"], found[0]["second"]) for kind, found in pair["examples"].items()}
    expected = {"images": (1, 1), "near_images": (2, 2), "words": (3, 4), "near_words": (2, 2), "twins": (2, 5)}
    assert places == {kind: (f"{first}:{a}", f"{second}:{b}") for kind, (a, b) in expected.items()}
    assert json.loads(out.read_text())["images_too_plain"] == 2
    printed = capsys.readouterr().out
    assert f"near images: 1, such as {first}:2 and {second}:2" in printed


def test_splits_of_one_file_are_parts(tmp_path, capsys):
    rows = [row("Who is it?", split="train"), row("who is it", split="test"), row("Who is it?", split="train")]
    path = write(tmp_path / "a.jsonl", rows)
    assert cli.main(["data", "overlap", path, "--strict"]) == 1
    assert "words: 1" in capsys.readouterr().out
    assert cli.main(["data", "overlap", write(tmp_path / "b.jsonl", rows[:1])]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_nothing_shared_is_no_overlap(tmp_path, files, capsys):
    first, _, images = files
    other = write(tmp_path / "c.jsonl", [row("Seven?", "5.png")])
    assert cli.main(["data", "overlap", first, other, "--image_folder", images, images, "--strict"]) == 0
    assert "they share nothing" in capsys.readouterr().out
    assert cli.main(["data", "overlap", first, other, "--strict"]) == 0
    assert "5 images were not compared: no --image_folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max_distance", "33"), "--max_distance is 33"),
        (("--min_jaccard", "0.5"), "--min_jaccard is 0.5"),
        (("--image_folder", "a", "b", "c"), "names 3 folders for 2 files"),
    ],
)
def test_options_out_of_range_are_refused(files, capsys, arguments, message):
    assert cli.main(["data", "overlap", *files[:2], *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bad_rows_are_an_error_with_their_lines(tmp_path, files, capsys):
    (tmp_path / "bad.jsonl").write_text("\n{}\n")
    assert cli.main(["data", "overlap", files[0], str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl:2: field conversations is missing" in capsys.readouterr().err


def test_the_cheap_check_compares_names_and_words(tmp_path, files):
    first, second, images = files
    train = load_records(first, images)
    found = shared_records(train, load_records(second, images))
    assert (found.requests, found.images, found.twins, found.example) == (0, 0, 1, f"{second}:5")
    again = load_records(write(tmp_path / "d.jsonl", [row("One", "0.png"), row("New?", "0.png"), row("Two")]), images)
    assert shared_records(train, again)[:3] == (1, 2, 0)
    assert not shared_records(train, again, same_folder=False), "equal names in two folders are two images"
    assert shared_records(again, [again[2]], same_folder=False).requests == 1


def test_every_pair_of_near_hashes_is_found():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (300, 2), dtype=np.uint64)
    near = hashes[:100].copy()
    for number, each in enumerate(near):
        for bit in rng.choice(128, number % 12, replace=False):
            each[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    both, parts = np.concatenate([hashes, near]), [0] * 300 + [1] * 100
    found = {(min(i, j), max(i, j)): bits for i, j, bits in near_images(both, parts, 8)}
    assert found == {(n, 300 + n): n % 12 for n in range(100) if n % 12 <= 8}


def test_near_texts_agree_with_all_pairs():
    random = Random(1)
    words = [f"w{n}" for n in range(400)]
    texts = [" ".join(random.choices(words, k=40)) for _ in range(60)]
    changed = [text.split() for text in texts]
    for number, each in enumerate(changed):
        for _ in range(number % 5):
            each[random.randrange(40)] = "other"
    texts += [" ".join(each) for each in changed]
    parts = [0] * 60 + [1] * 60

    def threes(text):
        split = text.split()
        return {tuple(split[i : i + 3]) for i in range(len(split) - 2)}

    sets = [threes(text) for text in texts]
    expected = {
        (i, j) for i in range(60) for j in range(60, 120) if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8
    }
    assert 20 < len(expected) < 60
    hashed = [shingles(text) for text in texts]
    found = {(min(i, j), max(i, j)) for i, j, _ in near_texts(hashed, parts, 0.8, lambda i, j: False)}
    assert found <= expected
    assert len(expected - found) <= 1, "MinHash misses one pair in a hundred"
    assert jaccard(hashed[0], hashed[60]) == 1


def test_normalised_words_and_plain_images():
    assert normalised("  \uff37hat's\tTHIS?!") == "what s this"
    assert difference_hash(Image.new("RGB", (30, 30), "red")) is None

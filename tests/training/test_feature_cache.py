"""The feature cache: what is read is what was put, whoever wrote it and wherever the writer was killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from psa_fast.training.feature_cache import FeatureCache, hash_image, hash_tensors

SHAPE = (9, 16)
TOWER = {"tower": "a", "processor": {"size": 336}}


def feature(i, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16)


def key(i):
    return hash_image(str(i).encode())


def fill(folder, numbers, rank=0, fingerprint=TOWER, **kwargs):
    with FeatureCache(folder, fingerprint, SHAPE, rank, **kwargs) as cache:
        for i in numbers:
            cache.put(key(i), feature(i))
    return cache.folder


def test_round_trip_survives_reopening(tmp_path):
    with FeatureCache(tmp_path, TOWER, SHAPE, rank=0) as cache:
        assert cache.get(key(0)) is None
        for i in range(5):
            cache.put(key(i), feature(i).float())
            # before any flush, and while the file grows under the maps already handed out
            assert torch.equal(cache.get(key(0)), feature(0))
    again = FeatureCache(tmp_path, TOWER, SHAPE, rank=3)
    assert len(again) == 5
    for i in range(5):
        got = again.get(key(i))
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, feature(i))


def test_reading_copies_nothing_and_cannot_write_the_file(tmp_path):
    folder = fill(tmp_path, range(3))
    cache = FeatureCache(tmp_path, TOWER, SHAPE, rank=0)
    got = cache.get(key(1))
    with (folder / "rank-00000.bin").open("r+b") as file:  # only a view of the file can see this
        file.seek(got.numel() * 2)
        file.write(feature(7).view(torch.int16).numpy().tobytes())
    assert torch.equal(got, feature(7))
    content = (folder / "rank-00000.bin").read_bytes()
    cache.get(key(2)).zero_()
    assert (folder / "rank-00000.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("fingerprint", "shape"),
    [({**TOWER, "tower": "b"}, SHAPE), ({**TOWER, "processor": {"size": 224}}, SHAPE), (TOWER, (16, 9))],
)
def test_any_difference_is_another_cache_and_the_old_one_stays(tmp_path, fingerprint, shape):
    old = fill(tmp_path, range(2))
    with FeatureCache(tmp_path, fingerprint, shape, rank=0) as other:
        assert other.folder != old
        assert other.get(key(0)) is None
        other.put(key(0), feature(50, shape))
    assert torch.equal(FeatureCache(tmp_path, fingerprint, shape, 0).get(key(0)), feature(50, shape))
    assert torch.equal(FeatureCache(tmp_path, TOWER, SHAPE, 0).get(key(0)), feature(0))
    # the order of the keys is no difference
    assert FeatureCache(tmp_path, dict(reversed(TOWER.items())), SHAPE, 0).folder == old


def test_ranks_write_their_own_files_and_see_each_other(tmp_path):
    first, second = (FeatureCache(tmp_path, TOWER, SHAPE, rank) for rank in (0, 1))
    first.put(key(0), feature(0))
    assert second.get(key(0)) is None  # not flushed
    first.flush()
    assert torch.equal(second.get(key(0)), feature(0))
    second.put(key(0), feature(0))  # known by now: not stored twice
    second.put(key(1), feature(1))
    second.flush()
    assert torch.equal(first.get(key(1)), feature(1))
    sizes = [(first.folder / f"rank-0000{rank}.bin").stat().st_size for rank in (0, 1)]
    assert sizes == [first.entry_bytes] * 2
    third = FeatureCache(tmp_path, TOWER, SHAPE, rank=1)
    with pytest.raises(ValueError, match="another process writes as rank 1"):
        third.put(key(9), feature(9))
    second.close()
    third.put(key(9), feature(9))
    third.close()
    assert torch.equal(first.get(key(9)), feature(9))


def test_what_is_no_feature_is_refused(tmp_path):
    cache = FeatureCache(tmp_path, TOWER, SHAPE, rank=0)
    with pytest.raises(ValueError, match=r"features are \[2, 2\], the cache holds \[9, 16\]"):
        cache.put(key(0), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        cache.put(key(0), torch.full(SHAPE, float("nan")))
    with pytest.raises(ValueError, match="expected"):
        FeatureCache(tmp_path, TOWER, (3,), rank=0)
    assert len(cache) == 0


@pytest.mark.parametrize("cut", [1, 30, 70])
def test_half_a_line_and_bytes_without_a_line_do_not_count(tmp_path, cut):
    folder = fill(tmp_path / "whole", range(6))
    fill(tmp_path / "torn", range(6))
    torn = tmp_path / "torn" / folder.name
    index = torn / "rank-00000.jsonl"
    index.write_bytes(index.read_bytes()[:-cut])  # the last line loses its end
    with (torn / "rank-00000.bin").open("ab") as file:
        file.write(b"half an entry")
    cache = FeatureCache(tmp_path / "torn", TOWER, SHAPE, rank=0)
    assert len(cache) == 5
    assert cache.get(key(5)) is None
    fill(tmp_path / "torn", range(6))
    for name in ("rank-00000.bin", "rank-00000.jsonl"):
        assert (torn / name).read_bytes() == (folder / name).read_bytes()


def bin_of(folder):
    return folder / "rank-00000.bin"


def index_of(folder):
    return folder / "rank-00000.jsonl"


def flip(path, at, mask=1):
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def edit_line(folder, number, **changes):
    lines = index_of(folder).read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    index_of(folder).write_text("".join(line + "\n" for line in lines))


ENTRY = 2 * SHAPE[0] * SHAPE[1]
# of six entries: what is done to their files, and which images it costs
DAMAGE = {
    "one bit": (lambda f: flip(bin_of(f), 3 * ENTRY + 17, 4), {3}),
    "the last bit": (lambda f: flip(bin_of(f), 6 * ENTRY - 1, 128), {5}),
    "zeros": (lambda f: bin_of(f).write_bytes(bytes(2 * ENTRY) + bin_of(f).read_bytes()[2 * ENTRY :]), {0, 1}),
    "NaN": (lambda f: bin_of(f).write_bytes(b"\xff" * ENTRY + bin_of(f).read_bytes()[ENTRY:]), {0}),
    "cut data": (lambda f: os.truncate(bin_of(f), 4 * ENTRY + 1), {4, 5}),
    "empty data": (lambda f: os.truncate(bin_of(f), 0), set(range(6))),
    "no data": (lambda f: bin_of(f).unlink(), set(range(6))),
    "another row": (lambda f: edit_line(f, 2, row=0), {2}),
    "a row beyond": (lambda f: edit_line(f, 2, row=6), {2}),
    "a negative row": (lambda f: edit_line(f, 2, row=-1), {2}),
    "no number as row": (lambda f: edit_line(f, 2, row=True), {2}),
    "another image": (lambda f: edit_line(f, 2, image=key(77)), {2}),
    "another checksum": (lambda f: edit_line(f, 2, crc=0), {2}),
    "a bit of an image": (lambda f: flip(index_of(f), 15), {0}),
    "a line end": (lambda f: flip(index_of(f), index_of(f).read_bytes().index(b"\n")), {0, 1}),
    "an empty index": (lambda f: os.truncate(index_of(f), 0), set(range(6))),
    "no index": (lambda f: index_of(f).unlink(), set(range(6))),
    "half an index": (lambda f: os.truncate(index_of(f), index_of(f).stat().st_size // 2), {3, 4, 5}),
    "nonsense": (lambda f: index_of(f).write_bytes(b"nonsense\n"), set(range(6))),
    "a list": (lambda f: index_of(f).write_bytes(b"[1]\n"), set(range(6))),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_healed(tmp_path, kind):
    damage, lost = DAMAGE[kind]
    folder = fill(tmp_path, range(6))
    damage(folder)
    with FeatureCache(tmp_path, TOWER, SHAPE, rank=0) as cache:
        assert cache.problems or kind in ("one bit", "the last bit", "zeros", "NaN")
        damaged = cache.check(map(key, range(6)))
        assert {i for i in range(6) if key(i) not in cache} == lost
        assert set(damaged) <= {key(i) for i in lost}
        assert all(str(folder) in problem for problem in cache.problems)
        assert len(cache.problems) >= 1
        assert all(torch.equal(cache.get(key(i)), feature(i)) for i in set(range(6)) - lost)
        for i in lost:
            assert cache.get(key(i)) is None
            cache.put(key(i), feature(i))
    again = FeatureCache(tmp_path, TOWER, SHAPE, rank=1)
    assert again.check(map(key, range(6))) == []
    assert all(torch.equal(again.get(key(i)), feature(i)) for i in range(6))


def test_a_damaged_entry_that_was_not_checked_is_named_when_it_is_used(tmp_path):
    folder = fill(tmp_path, range(3))
    flip(bin_of(folder), ENTRY + 1)
    cache = FeatureCache(tmp_path, TOWER, SHAPE, rank=0)
    assert torch.equal(cache.get(key(0)), feature(0))
    with pytest.raises(ValueError, match=r"rank-00000.bin: entry 1, image .* is damaged; it is computed anew"):
        cache.get(key(1))
    assert cache.get(key(1)) is None


def test_another_ranks_damaged_entry_is_replaced_by_ones_own(tmp_path):
    folder = fill(tmp_path, range(3), rank=1)
    flip(folder / "rank-00001.bin", 5)
    before = (folder / "rank-00001.bin").read_bytes()
    with FeatureCache(tmp_path, TOWER, SHAPE, rank=0) as cache:
        assert cache.check([key(0)]) == [key(0)]
        cache.put(key(0), feature(0))
    assert (folder / "rank-00001.bin").read_bytes() == before
    for rank in (0, 2):
        assert torch.equal(FeatureCache(tmp_path, TOWER, SHAPE, rank).get(key(0)), feature(0))


def test_files_of_others_are_left_alone_and_the_description_is_kept_true(tmp_path):
    folder = fill(tmp_path, range(2))
    right = (folder / "fingerprint.json").read_text()
    assert json.loads(right)["fingerprint"] == TOWER
    for name in ("rank-x.jsonl", "rank-1.jsonl", "rank-00007.jsonl.bak"):
        (folder / name).write_text("{}\n")
    (folder / "fingerprint.json").write_text(right[:20])
    cache = FeatureCache(tmp_path, TOWER, SHAPE, rank=0)
    assert len(cache) == 2
    assert cache.problems == []
    assert (folder / "fingerprint.json").read_text() == right


def test_a_cache_of_the_version_without_checksums_is_named_and_not_used(tmp_path):
    content = json.dumps({"version": 1, "shape": SHAPE, "dtype": "bfloat16", "fingerprint": TOWER}, sort_keys=True)
    old = tmp_path / hashlib.sha256(content.encode()).hexdigest()[:32]
    old.mkdir()
    (old / "rank-00000.jsonl").write_text(json.dumps({"image": key(0), "row": 0}) + "\n")
    (old / "rank-00000.bin").write_bytes(bytes(ENTRY))
    cache = FeatureCache(tmp_path, TOWER, SHAPE, rank=0)
    assert len(cache) == 0
    assert len(cache.problems) == 1
    assert str(old) in cache.problems[0]


LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from test_feature_cache import ENTRY, FeatureCache, SHAPE, TOWER, feature, key
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10 * ENTRY, 10 * ENTRY))
try:
    with FeatureCache(sys.argv[1], TOWER, SHAPE, rank=0, flush_every=3) as cache:
        for i in range(40):
            cache.put(key(i), feature(i))
except OSError as error:
    print(error)
"""


def test_a_file_that_takes_no_more_is_named_and_what_was_flushed_counts(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert "rank-00000.bin" in done.stdout
    with FeatureCache(tmp_path, TOWER, SHAPE, rank=0) as cache:
        assert len(cache) == 9
        assert cache.check(map(key, range(9))) == []
        assert [problem.split(": ", 1)[1] for problem in cache.problems] == [
            "1 entries at its end have no line in rank-00000.jsonl: not used"
        ]
        cache.put(key(9), feature(9))
    assert torch.equal(FeatureCache(tmp_path, TOWER, SHAPE, rank=0).get(key(9)), feature(9))


BUILD = """
import sys
sys.path.insert(0, sys.argv[2])
from test_feature_cache import FeatureCache, SHAPE, TOWER, feature, key
with FeatureCache(sys.argv[1], TOWER, SHAPE, rank=0, flush_every=3) as cache:
    print("open", flush=True)
    for i in range(400):
        if cache.get(key(i)) is None:
            cache.put(key(i), feature(i))
            print(i, flush=True)
"""


def test_killed_while_building_it_finishes_with_the_same_bytes(tmp_path):
    whole = fill(tmp_path / "whole", range(400), flush_every=3)
    rng = random.Random(0)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "killed"), os.path.dirname(__file__)]
    killed = 0
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(rng.randint(20, 120)):
                process.stdout.readline()
            time.sleep(rng.random() / 100)
            process.send_signal(signal.SIGKILL)
            process.stdout.read()
            killed += process.wait() == -signal.SIGKILL
        # what counts is whole at every moment
        cache = FeatureCache(tmp_path / "killed", TOWER, SHAPE, rank=0)
        assert all(torch.equal(cache.get(key(i)), feature(i)) for i in range(len(cache)))
        assert 0 < len(cache) <= 400
    assert killed == 3
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    built = tmp_path / "killed" / whole.name
    for name in ("rank-00000.bin", "rank-00000.jsonl"):
        assert (built / name).read_bytes() == (whole / name).read_bytes()


def test_hash_of_tensors_sees_names_shapes_and_values():
    def tower(**changes):
        return hash_tensors({"a": torch.arange(6.0).to(torch.bfloat16), "b": torch.ones(2), **changes}.items())

    assert tower() == tower()
    changed = [
        tower(b=torch.ones(2) * 2),
        tower(b=torch.ones(2, 1)),
        tower(b=torch.ones(2).double()),
        tower(c=torch.ones(1)),
    ]
    assert len({tower(), *changed}) == 5
    with pytest.raises(ValueError, match="must be gathered"):
        tower(a=torch.empty(0))

"""The strict readers and the writers that leave a whole file or none."""

import os
import time
from pathlib import Path

import pytest

from psa_fast import files
from psa_fast.files import parse_json, read_json, read_yaml, shorten, shown, unwritable_text, write_text, write_with


def written(tmp_path, text):
    path = tmp_path / "given"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,\n "b": {"a": 2,\n "a": 3}}', r":3: the key 'a' stands twice"),
        ('{"a": "}{\\"",\n "a": 3}', r":2: the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ["x", "\\ud800"]}', r"a\[1\] holds '\\ud800' at character 0"),
        ('{"\\udfff": 1}', r"a key of the object holds"),
        ("[1]", "must hold one JSON object"),
        ('{"a": 1,\n b}', "line 2, column 2"),
        ("", "not JSON"),
        (b"\x1f\x8b\x08\xff", "is gzip, not UTF-8"),
        (b"\xff\xfe{\0}\0", "is UTF-16, not UTF-8"),
        (b"{\xe9}", "not UTF-8 text .* at byte 1"),
    ],
)
def test_json_that_cannot_be_read_is_a_sentence(tmp_path, text, sentence):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=sentence) as raised:
        read_json(path, "setting")
    assert f"setting {path}" in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 200


def test_json_accepts_what_is_right(tmp_path):
    assert read_json(written(tmp_path, b'\xef\xbb\xbf{"a": {"b": 1}, "b": [1e3, null, "\xc3\xa9"]}'), "x") == {
        "a": {"b": 1},
        "b": [1000.0, None, "é"],
    }
    assert parse_json('{"a": NaN}', constants=True)["a"] != 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3\n", r":3: the key 'a' stands in line 1 already"),
        ("x:\n  a: 1\n  a: 1\n", r":3: the key 'a'"),
        ("on: 1\nyes: 2\n", r":2: the key True stands in line 1"),
        ("a: " + "[" * 20_000, "nested too deeply|not valid YAML"),
        ("b: 1\na: !!bool maybe", ":2: a value cannot be read"),
        ("a: !!timestamp x", "cannot be read"),
        ("a: 2020-99-99", ":1: a value cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("a: !!python/object/apply:os.system [ls]", r":1 is not valid YAML"),
        ("a:\n\tb: 1", r":2 is not valid YAML"),
        ("- 1", "not a mapping"),
        ("? {a: 1}\n: 2", "YAML"),
    ],
)
def test_yaml_that_cannot_be_read_is_a_sentence(tmp_path, text, sentence):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=sentence) as raised:
        read_yaml(path, "policy")
    assert f"policy {path}" in str(raised.value)


def test_yaml_keeps_merge_keys(tmp_path):
    found = read_yaml(written(tmp_path, "base: &b {x: 1, y: 2}\nmine:\n  <<: *b\n  x: 3\n"), "recipe")
    assert found["mine"] == {"x": 3, "y": 2}


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a file"), ("absent", "no such file"), (".", "not a file")):
        with pytest.raises(ValueError, match=reason):
            read_yaml(tmp_path / name, "policy")


def test_foreign_values_are_cut():
    assert shorten("x" * 10_000_000) == repr("x" * 80) + "..."
    assert len(shorten(list(range(10**5)))) < 100
    assert shorten(10**5000) == "a int too large to show"
    assert unwritable_text({"a": [1, {"b": "fine"}]}) is None


def test_a_failed_write_names_the_path_and_leaves_what_was_there(tmp_path):
    target = tmp_path / "kept.txt"
    write_text(target, "old")

    def fails(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as raised:
        write_with(target, fails)
    assert str(target) in str(raised.value)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    with pytest.raises(OSError, match="null"):
        write_text("/dev/null/x/y", "text")


def test_a_foreign_failure_of_a_write_is_named_and_a_fault_of_the_program_is_not(tmp_path):
    def torch_fails(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    def faulty(path):
        raise RuntimeError("index out of range")

    with pytest.raises(OSError, match="cannot be written"):
        write_with(tmp_path / "w", torch_fails)
    with pytest.raises(RuntimeError, match="index"):
        write_with(tmp_path / "w", faulty)


def test_a_number_that_only_yaml_1_1_reads_so_is_refused(tmp_path):
    for text in ("010", "1:30", "-00", "1:30.5", "12:30:45"):
        with pytest.raises(ValueError, match=r":2: .*no decimal number"):
            read_yaml(written(tmp_path, f"a: 1\nb: {text}\n"), "recipe")
    found = read_yaml(written(tmp_path, "a: '010'\nb: 0\nc: 0.5\nd: -7\ne: 1_000\n"), "recipe")
    assert found == {"a": "010", "b": 0, "c": 0.5, "d": -7, "e": 1000}


def test_a_few_aliases_do_not_become_a_message_or_a_mapping_without_end(tmp_path):
    lists = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 13))
    began = time.monotonic()
    bomb = read_yaml(written(tmp_path, lists), "recipe")["a12"]
    assert len(shorten(bomb)) < 100
    assert len(shorten({"key": bomb})) < 100
    assert time.monotonic() - began < 5


def test_merges_do_not_become_a_mapping_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_KEYS", 3)
    two = "a: &a {one: 1, two: 2}\nb: &b {three: 3, four: 4}\n"
    assert read_yaml(written(tmp_path, two + "c: {<<: *a}\n"), "recipe")["c"] == {"one": 1, "two": 2}
    with pytest.raises(ValueError, match=":3: its merges come to more than 3 keys"):
        read_yaml(written(tmp_path, two + "c: {<<: [*a, *b]}\n"), "recipe")


def test_keys_that_another_mapping_merges_are_no_repeated_keys(tmp_path):
    text = "first:\n  inner: &inner\n    <<: {one: 1, two: 2}\n    one: 3\nsecond: {<<: *inner}\n"
    found = read_yaml(written(tmp_path, text), "recipe")
    assert found["first"]["inner"] == {"one": 3, "two": 2}


def test_a_file_does_not_take_the_place_of_a_device_pipe_folder_or_link(tmp_path):
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(tmp_path / "file")
    for path, kind in ((pipe, "pipe"), (folder, "folder"), (Path(""), "folder")):
        with pytest.raises(ValueError, match=f"{kind}, not a file"):
            write_text(path, "text")
    assert pipe.is_fifo()
    write_text(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    for path in ("", "a\0b"):
        with pytest.raises(ValueError, match="cannot name a file"):
            write_text(path, "text")


def test_a_file_is_written_under_the_longest_name_and_below_no_other_file(tmp_path):
    name = "x" * 250
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(OSError, match="text") as raised:
        write_text(tmp_path / name / "text", "text")
    assert raised.value.filename == str(tmp_path / name / "text")


def test_a_path_in_a_message_is_one_line(tmp_path):
    assert shown(tmp_path) == str(tmp_path)
    for path in ("a\nb", "x" * 5000, "\udcff"):
        assert len(shown(path)) < 320
        assert shown(path).isprintable()

"""Folders that are made once: where they are, who makes them, and that none is ever half there."""

import multiprocessing
from pathlib import Path

import pytest

from psa_fast import made_once


def test_the_folder_that_is_named_comes_before_the_home_folder(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("PSA_FAST_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert made_once.default_cache() == Path("/own")
    monkeypatch.setenv("PSA_FAST_CACHE", "")
    assert made_once.default_cache() == Path("/shared/psa-fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(ValueError, match="set PSA_FAST_CACHE"):
        made_once.default_cache()
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert made_once.default_cache() == Path("/home/me/.cache/psa-fast")


def test_a_folder_that_cannot_be_made_is_named_and_leaves_nothing(tmp_path):
    def full(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*world-0"):
        made_once.once(tmp_path / "world-0", full)
    assert not (tmp_path / "world-0").exists()
    # what was left of it is in nobody's way
    assert made_once.once(tmp_path / "world-0", lambda folder: folder.mkdir()) == tmp_path / "world-0"


def _slow_make(out):
    out.mkdir()
    (out / "calls.txt").write_text("made")
    import time

    time.sleep(0.3)
    with (out.parent / "log.txt").open("a") as log:
        log.write("made\n")


def _ask(root):
    made_once.once(root / "thing", _slow_make)


def test_of_two_callers_one_makes_it_and_no_half_result_stays(tmp_path):
    def broken(out):
        out.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once.once(tmp_path / "thing", broken)
    assert not (tmp_path / "thing").exists()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ask, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log.txt").read_text() == "made\n"
    assert (tmp_path / "thing" / "calls.txt").read_text() == "made"

"""Where the sandbox's cache is, and what is said where it cannot be."""

from pathlib import Path

import pytest

from psa_fast.sandbox import cache


def test_the_folder_that_is_named_comes_before_the_home_folder(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("PSA_FAST_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache.default_cache() == Path("/own")
    monkeypatch.setenv("PSA_FAST_CACHE", "")
    assert cache.default_cache() == Path("/shared/psa-fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(ValueError, match="set PSA_FAST_CACHE"):
        cache.default_cache()
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert cache.default_cache() == Path("/home/me/.cache/psa-fast")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        cache.ensure(tmp_path / "file" / "cache", 0, lambda kind, level: None)

    def full(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*world-0"):
        cache._once(tmp_path / "world-0", full)
    assert not (tmp_path / "world-0").exists()
    # what was left of it is in nobody's way
    assert cache._once(tmp_path / "world-0", lambda folder: folder.mkdir()) == tmp_path / "world-0"

"""What is said where the sandbox's cache cannot be."""

import pytest

from psa_fast.sandbox import cache


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        cache.ensure(tmp_path / "file" / "cache", 0, lambda kind, level: None)

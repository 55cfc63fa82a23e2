import pytest
from tiny_llava import OLD, build_addon, build_base


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny base and an add-on for it: (base folder, add-on folder). Tests copy what they change."""
    root = tmp_path_factory.mktemp("tiny")
    base = build_base(root / "base")
    return base, build_addon(base, root / "addon", **OLD)

import copy

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny base and an add-on for it: (base folder, add-on folder)."""
    from builders.tiny_llava import build_addon, build_base

    root = tmp_path_factory.mktemp("tiny")
    base = build_base(root / "base")
    # what the words say by themselves no attack on pixels changes: of these guards that is nothing
    return base, build_addon(base, root / "addon", num_text_tokens=0)


@pytest.fixture(scope="session")
def loaded(folders):
    from psa_fast.safety import load_guard

    return load_guard(folders[1])


@pytest.fixture
def guard(loaded):
    """A guard of random weights whose readings hang on the picture: some pictures are unsafe to it, some are not."""
    import torch

    guard = copy.copy(loaded)
    guard.model = copy.deepcopy(loaded.model)
    heads = guard.model.bottleneck.heads
    with torch.no_grad():
        heads.weight.mul_(300.0)
    return guard

"""Without a CUDA device the kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os

import pytest
import torch
from builders import tiny

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# without it every cuBLAS product raises under torch.use_deterministic_algorithms, which tests use to poison torch.empty
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


#: folders and files whose tests start runs, ranks or compilers
LONG = ("training", "kernels", "fuzz", "examples", "test_zero3.py", "test_sharded_evaluation.py", "test_bench.py")


def pytest_collection_modifyitems(items):
    """Long files early: workers take whole files, and a long one that is taken last is waited for by all others."""
    items.sort(key=lambda item: not set(LONG) & set(item.path.parts))


@pytest.fixture(autouse=True, scope="module")
def stock_linear():
    """Take back DeepSpeed's replacement of `F.linear`, which an engine of ZeRO-3 leaves to every later test."""
    stock = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = stock


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny untrained base, made once per test run."""
    return tiny.build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small world with text-only rows."""
    return tiny.build_world(tmp_path_factory.mktemp("world") / "w")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny base and an add-on for it: (base folder, add-on folder). Tests copy what they change."""
    from builders.tiny_llava import OLD, build_addon, build_base

    root = tmp_path_factory.mktemp("tiny")
    base = build_base(root / "base")
    return base, build_addon(base, root / "addon", **OLD)


@pytest.fixture
def group_of_one(monkeypatch):
    """A process group of this process alone."""
    import torch
    import torch.distributed as dist

    from psa_fast.training.engine import init_distributed

    # ZeRO-3 replaces it for good with one that keeps more for backward
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)

    before = dict(os.environ)
    assert init_distributed() == (0, 1)
    yield
    dist.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]

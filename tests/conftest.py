"""Without a CUDA device the kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# without it every cuBLAS product raises under torch.use_deterministic_algorithms, which tests use to poison torch.empty
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"

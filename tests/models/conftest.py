"""Fixtures of the model tests; their builders are in tiny_vlm.py."""

import pytest
from builders.tiny_vlm import make_batch


@pytest.fixture
def batch():
    """Rows: one image; two images; text only. Right padded, for 3 safety tokens and 16 image tokens."""
    return make_batch(num_safety_tokens=3)

"""The choice of attention, with FlashAttention's presence and the GPU made up."""

import pytest
import torch

from psa_fast.training import attention_backend as attention
from psa_fast.training.config import parse_args


@pytest.fixture
def machine(monkeypatch):
    """`machine(installed, major)`: which FlashAttentions are there, on a GPU of which generation."""

    def make(installed, major):
        for name, (_, *rest) in list(attention._FLASH.items()):
            monkeypatch.setitem(attention._FLASH, name, (lambda there=name in installed: there, *rest))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))

    return make


def choose(*argv):
    return attention.choose_attention(parse_args(["--stage1_objective", "joint", *argv]))


@pytest.mark.parametrize(
    ("installed", "major", "expected"),
    [
        (("flash_attention_3", "flash_attention_2"), 9, "flash_attention_3"),
        (("flash_attention_3", "flash_attention_2"), 8, "flash_attention_2"),
        (("flash_attention_3",), 10, "sdpa_by_sample"),
        (("flash_attention_2",), 7, "sdpa_by_sample"),
        ((), 9, "sdpa_by_sample"),
    ],
)
def test_auto_takes_the_newest_that_runs_there(machine, installed, major, expected):
    machine(installed, major)
    assert choose("--dtype", "bf16") == expected
    assert choose("--dtype", "fp32") == "sdpa_by_sample"
    assert choose("--dtype", "bf16", "--attn_implementation", "sdpa", "--packing", "False") == "sdpa"
    assert choose("--dtype", "bf16", "--attn_implementation", "eager") == "eager"


def test_an_explicit_choice_is_kept_or_refused(machine):
    machine(("flash_attention_2",), 8)
    assert choose("--dtype", "bf16", "--attn_implementation", "flash_attention_2") == "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_3 needs the package flash-attn-3 and a CUDA device"):
        choose("--dtype", "bf16", "--attn_implementation", "flash_attention_3")
    with pytest.raises(ValueError, match="flash_attention_2 needs bf16, and --dtype is fp32"):
        choose("--dtype", "fp32", "--attn_implementation", "flash_attention_2")

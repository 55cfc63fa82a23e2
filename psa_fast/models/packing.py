"""Samples laid end to end in one row, without padding: what tells them apart, and an attention that keeps them apart.

FlashAttention takes cumulative lengths. Stock SDPA and eager get a [T, T] mask from transformers, which sees restarting
position ids; `sdpa_by_sample` does without: one causal SDPA per sample, no work between samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from psa_fast.compat.transformers import more_than_causal
from psa_fast.models.transfer import to_device

#: transformers' name of the attention below
SDPA_BY_SAMPLE = "sdpa_by_sample"


class Packing:
    """Layout of one packed row [1, T] that holds B samples.

    Attributes:
        lengths: B python ints, so that nothing has to be read back from the device.
        sample: int64 [T], the sample each position belongs to.
        position_ids: int64 [1, T], from 0 in every sample.
        starts: int32 [B + 1], where samples begin, and T.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a packed row needs samples of at least one token, got lengths {list(lengths)}")
        self.lengths = [int(n) for n in lengths]
        self.starts = to_device([0, *accumulate(self.lengths)], device, torch.int32)
        sizes = self.starts.diff()
        self.numbers = torch.arange(len(self.lengths), device=device)
        self.sample = torch.repeat_interleave(self.numbers, sizes, output_size=sum(self.lengths))
        positions = torch.arange(sum(self.lengths), device=device) - self.starts[self.sample]
        self.position_ids = positions.unsqueeze(0)

    @classmethod
    def of_row(cls, lengths: Sequence[int], input_ids: Tensor, attention_mask: Tensor | None) -> Packing:
        """The layout of a batch that is one packed row. Raises ValueError for another shape, or a mask of padding."""
        if attention_mask is not None:
            raise ValueError("a packed row (lengths) has no padding, so it takes no attention_mask")
        if tuple(input_ids.shape) != (1, sum(lengths)):
            raise ValueError(f"lengths {list(lengths)} make one row [1, {sum(lengths)}], got {list(input_ids.shape)}")
        return cls(lengths, input_ids.device)

    def by_sample(self, mask: Tensor) -> Tensor:
        """bool [1, T] -> bool [B, T], each sample's own positions."""
        return mask & (self.sample == self.numbers.unsqueeze(1))

    def count(self, mask: Tensor) -> Tensor:
        """bool [1, T] -> int64 [B], how many positions of each sample are True."""
        return torch.zeros_like(self.numbers).index_add_(0, self.sample, mask[0].long())

    def last(self) -> Tensor:
        """int64 [B], the last position of each sample."""
        return self.starts[1:].long() - 1

    def attention_kwargs(self) -> dict[str, Any]:
        """FlashAttention's arguments for rows of different lengths, and sdpa_by_sample's."""
        longest = max(self.lengths)
        return {
            "cu_seq_lens_q": self.starts,
            "cu_seq_lens_k": self.starts,
            "max_length_q": longest,
            "max_length_k": longest,
            "sample_lengths": self.lengths,
        }


def sdpa_by_sample(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA on each sample by itself; query, key, value [1, heads, T, D] -> [1, T, heads, D].

    Without sample_lengths it is transformers' SDPA.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for end, length in zip(accumulate(sample_lengths), sample_lengths, strict=True):
        own = slice(end - length, end)
        q, k, v = (x[:, :, own] for x in (query, key, value))
        mask = None if attention_mask is None else attention_mask[..., own, own]  # a sliding window
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _mask(**kwargs: Any) -> Tensor | None:
    """No [T, T] mask where there is no padding, cache, window or overlay: what is left is causal in each sample."""
    whole = kwargs["attention_mask"] is None and kwargs["q_length"] == kwargs["kv_length"]
    if whole and not kwargs.get("local_size") and not more_than_causal(kwargs):
        return None
    return sdpa_mask(**kwargs)


AttentionInterface.register(SDPA_BY_SAMPLE, sdpa_by_sample)
AttentionMaskInterface.register(SDPA_BY_SAMPLE, _mask)

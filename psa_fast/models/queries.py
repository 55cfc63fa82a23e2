"""What of a prompt asks the concept head: the whole of it, windows of it, or nothing but the learned query.

A risky sentence in a long prompt is lost in the mean of all its words. A window cannot be diluted: one of the windows
holds the sentence, however often something else is said around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psa_fast.taxonomy import CLEAN

#: windows of a row that training reads, evenly spaced with both ends
TRAINED_WINDOWS = 12


def window_starts(length: int, size: int) -> list[int]:
    """First tokens of all windows of `size` in a text of `length` tokens, half a window apart, both ends included.

    A text that is no longer than a window, and size 0, have none.
    """
    if size == 0 or length <= size:
        return []
    return [*range(0, length - size, max(1, size // 2)), length - size]


def spaced_windows(text: Tensor, size: int, most: int = TRAINED_WINDOWS) -> Tensor:
    """Masks bool [B, most, T] of `most` windows of `size` over the True positions of `text` bool [B, T].

    Evenly spaced from the first position to the last; a shorter text is its own window, `most` times. Reads nothing
    back from the device.
    """
    rank = text.long().cumsum(1).unsqueeze(1) - 1
    room = (text.sum(1, keepdim=True) - size).clamp_min(0)
    starts = (torch.arange(most, device=text.device) * room // max(1, most - 1)).unsqueeze(2)
    return text.unsqueeze(1) & (rank >= starts) & (rank < starts + size)


def unsafe_log_odds(logits: Tensor, head_sizes: tuple[int, int], harmless: int = CLEAN) -> Tensor:
    """How strongly either head calls a row risky: logits [..., 7 + 4] -> [...], the larger of two log-odds.

    `harmless` is the id of the harmless type; the harmless level comes first.
    """
    types, levels = logits.split(list(head_sizes), dim=-1)
    risky = torch.cat([types[..., :harmless], types[..., harmless + 1 :]], -1)
    by_type = risky.logsumexp(-1) - types[..., harmless]
    by_level = levels[..., 1:].logsumexp(-1) - levels[..., 0]
    return torch.maximum(by_type, by_level)

"""A pooling head's nn.MultiheadAttention replaced by attention_pool: the same numbers and gradients, then both timed.

    python examples/replace_pooling_head.py [--width 1024] [--keys 577] [--batch 8] [--rounds 10]

A pooling head (SigLIP's, CoCa's, AIMv2's) asks many patches with one learned query. nn.MultiheadAttention projects
every patch to a key and a value first; attention_pool never does. The parameters stay the same, so a checkpoint loads
as it is. psa_fast.models.ConceptAttention is the same as a module.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psa_fast.ops import attention_pool


class PoolingHead(nn.Module):
    """One learned query over patches [B, S, E], as it is usually written."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, S, E] -> [B, E]."""
        probe = self.probe.expand(len(patches), -1, -1)
        return self.attention(probe, patches, patches, need_weights=False)[0][:, 0]


class FastPoolingHead(PoolingHead):
    """The same head: only the forward pass is another."""

    def forward(self, patches: Tensor) -> Tensor:
        """[B, S, E] -> [B, E]."""
        probe, a = self.probe.expand(len(patches), -1, -1), self.attention
        return a.out_proj(attention_pool(probe, patches, a.in_proj_weight, a.in_proj_bias, a.num_heads))[:, 0]


def outcome(head: PoolingHead, patches: Tensor, weights: Tensor) -> list[Tensor]:
    """The pooled rows, and the gradients of the patches and of every parameter."""
    pooled = head(patches)
    return [pooled.detach(), *torch.autograd.grad((pooled * weights).sum(), [patches, *head.parameters()])]


def difference(width: int, heads: int, keys: int) -> float:
    """The largest difference of the two heads in fp64, over the largest number of the tensor it is found in."""
    plain, ours = PoolingHead(width, heads).double(), FastPoolingHead(width, heads).double()
    ours.load_state_dict(plain.state_dict())
    patches = torch.randn(3, keys, width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, width, dtype=torch.float64)
    pairs = zip(outcome(plain, patches, weights), outcome(ours, patches, weights), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def seconds(heads: Sequence[PoolingHead], patches: Tensor, rounds: int) -> list[float]:
    """The median pass of each head; they take turns in every round, so that both meet the machine's load alike."""
    weights, found = torch.randn(len(patches), patches.shape[-1]), [[] for _ in heads]  # type: ignore[var-annotated]
    for _ in range(rounds + 1):
        for head, times in zip(heads, found, strict=True):
            start = time.perf_counter()
            outcome(head, patches, weights)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in found]  # the first round warms up


def main(argv: Sequence[str] | None = None) -> None:
    """Compare in fp64, then time in fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("heads", 8), ("keys", 577), ("batch", 8), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    worst = difference(args.width, args.heads, args.keys)
    print(f"largest relative difference of value and gradients, fp64: {worst:.0e}")
    patches = torch.randn(args.batch, args.keys, args.width, requires_grad=True)
    plain, ours = (kind(args.width, args.heads) for kind in (PoolingHead, FastPoolingHead))
    slow, fast = seconds((plain, ours), patches, args.rounds)
    print(f"forward and backward, fp32: nn.MultiheadAttention {1e3 * slow:.1f} ms, attention_pool {1e3 * fast:.1f} ms")
    print(f"ratio {slow / fast:.1f}, for these sizes on this machine")


if __name__ == "__main__":
    main()

"""The concept attention and the bottleneck around it at 7B widths, in the forms a user could write and in ours.

Every form has the same inputs and weights: text [B, 64, E] asks, 64 tokens and 576 features a sample answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from ladder import DEVICE, DTYPE
from torch import Tensor, nn

from psa_fast.ops import attention_pool, concept_loss, concept_pool

E, HEADS, TEXT, TOKENS, FEATURES = 4096, 8, 64, 64, 576
MAKE = {"device": DEVICE, "dtype": DTYPE}
HEAD_SIZES = (7, 4)


class Attention:
    """nn.MultiheadAttention; with `readout` behind the projector's last bias, SiLU and Linear, and with the heads."""

    def __init__(self, batch: int, readout: bool = False):
        torch.manual_seed(0)
        self.batch = batch
        self.mha = nn.MultiheadAttention(E, HEADS, batch_first=True, **MAKE)
        self.feature_bias = nn.Parameter(torch.randn(E, **MAKE).div(64)) if readout else None
        self.readout = nn.Linear(E, E, **MAKE) if readout else None
        self.heads = nn.Linear(E, sum(HEAD_SIZES), **MAKE) if readout else None
        self.query = torch.randn(batch, TEXT, E, **MAKE).requires_grad_()
        self.tokens = torch.randn(TOKENS, E, **MAKE).requires_grad_()
        self.features = torch.randn(batch, FEATURES, E, **MAKE).requires_grad_()
        self.targets = torch.stack([torch.arange(batch, device=DEVICE) % size for size in HEAD_SIZES], dim=1)

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that gets a gradient."""
        around = [] if self.feature_bias is None else [self.feature_bias]
        modules = [m for m in (self.mha, self.readout, self.heads) if m is not None]
        return [self.query, self.tokens, self.features, *around, *(p for m in modules for p in m.parameters())]

    def read(self) -> Tensor:
        """The features, behind the projector's last layer where there is one."""
        if self.readout is None:
            return self.features
        return self.readout(F.silu(self.features + self.feature_bias))

    def keys(self) -> Tensor:
        return torch.cat([self.tokens.expand(self.batch, -1, -1), self.read()], dim=1)

    def all_queries(self, need_weights: bool = True) -> Tensor:
        """The official use: all text positions ask, one answer is used."""
        keys = self.keys()
        return self.mha(self.query, keys, keys, need_weights=need_weights)[0][:, :1]

    def one_query(self) -> Tensor:
        keys = self.keys()
        return self.mha(self.query[:, :1], keys, keys, need_weights=False)[0]

    def absorbed(self) -> Tensor:
        """The algebra in plain torch under autograd."""
        d = E // HEADS
        wq, wk, wv = self.mha.in_proj_weight.chunk(3)
        bq, _, bv = self.mha.in_proj_bias.chunk(3)
        q = F.linear(self.query[:, 0], wq, bq).view(-1, HEADS, d) * d**-0.5
        x = self.keys()
        u = torch.einsum("bhd,hde->bhe", q, wk.view(HEADS, d, E))
        z = torch.softmax(u @ x.transpose(1, 2), -1) @ x
        o = torch.einsum("bhe,hde->bhd", z, wv.view(HEADS, d, E)).reshape(-1, 1, E) + bv
        return self.mha.out_proj(o)

    def composed(self) -> Tensor:
        """`attention_pool` as a composition of `concept_pool` under autograd, without a backward of its own."""
        d = E // HEADS
        wq, wk, wv = self.mha.in_proj_weight.view(3, HEADS, d, E).unbind(0)
        bq, _, bv = self.mha.in_proj_bias.view(3, HEADS, 1, d).unbind(0)
        rows = self.query[:, 0].expand(HEADS, -1, -1)
        q = torch.baddbmm(bq, rows, wq.transpose(1, 2)) * d**-0.5
        token_query = torch.bmm(q, wk).transpose(0, 1)
        feature_query, offset = token_query, None
        if self.readout is not None:
            feature_query = token_query @ self.readout.weight
            offset = token_query @ self.readout.bias
        activation = None if self.readout is None else "silu"
        z, feature_sum, mass = concept_pool(
            self.tokens, self.features, token_query, feature_query, offset,
            feature_bias=self.feature_bias, activation=activation,
        )  # fmt: skip
        if self.readout is None:
            z = z + feature_sum
        else:
            z = z + feature_sum @ self.readout.weight.t() + mass.to(z.dtype).unsqueeze(-1) * self.readout.bias
        o = torch.baddbmm(bv, z.transpose(0, 1), wv.transpose(1, 2))
        return self.mha.out_proj(o.transpose(0, 1).reshape(-1, 1, E))

    def ours(self) -> Tensor:
        before = {}
        if self.readout is not None:
            weight, bias = self.readout.weight, self.readout.bias
            before = {"activation": "silu", "readout_weight": weight, "readout_bias": bias}
        pooled = attention_pool(
            self.query[:, :1], self.features, self.mha.in_proj_weight, self.mha.in_proj_bias, HEADS,
            tokens=self.tokens, feature_bias=self.feature_bias, **before,
        )  # fmt: skip
        return self.mha.out_proj(pooled)

    def loss(self, pooled: Tensor) -> Tensor:
        """The two heads and their losses, as a user writes them."""
        logits = self.heads(pooled[:, 0])
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).split(HEAD_SIZES, dim=1)
        return sum(F.cross_entropy(s, target) for s, target in zip(scores, self.targets.unbind(1), strict=True))

    def our_loss(self) -> Tensor:
        return concept_loss(self.ours()[:, 0], self.heads.weight, self.heads.bias, self.targets, HEAD_SIZES).loss

    def exact(self, form: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """Value and gradients of a form in fp64."""
        leaves = self.leaves
        low = [t.data for t in leaves]
        try:
            for t in leaves:
                t.data = t.data.double()
            value = form()
            grads = torch.autograd.grad(value.sum(), leaves, materialize_grads=True, allow_unused=True)
        finally:
            for t, data in zip(leaves, low, strict=True):
                t.data = data
        return (value.detach(), *grads)


def pool_inputs(batch: int, silu: bool, **make) -> list[Tensor]:
    """Of `concept_pool`: tokens, features, the queries for either, the features' offset, and with `silu` their bias."""
    torch.manual_seed(0)
    rows = (batch, HEADS)
    shapes = ((TOKENS, E), (batch, FEATURES, E), (*rows, E), (*rows, E), rows, (E,))[: 6 if silu else 5]
    scales = (1, 1, E**-0.5, E**-0.5, 1, 1)
    return [torch.randn(s, **make).mul_(scale).requires_grad_() for s, scale in zip(shapes, scales, strict=False)]


def pooled(
    tokens: Tensor,
    features: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    form: Callable[..., tuple[Tensor, Tensor, Tensor]] = concept_pool,
) -> Tensor:
    """Both sums and the features' mass side by side [B, R, 2E + 1]; with a bias, of SiLU(features + bias).

    Args:
        tokens, features, token_query, feature_query, offset, bias: as `pool_inputs` returns them.
        form: `concept_pool`, with options or without, or its reference.
    """
    activation = None if bias is None else "silu"
    token_sum, feature_sum, mass = form(
        tokens, features, token_query, feature_query, offset, feature_bias=bias, activation=activation
    )
    return torch.cat([token_sum, feature_sum, mass.unsqueeze(-1).to(features.dtype)], dim=-1)

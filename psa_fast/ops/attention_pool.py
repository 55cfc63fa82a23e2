"""Multi-head attention of a few queries over keys = values = [tokens ; features], projections absorbed.

    u_h = W_k,h^T (W_q,h q + b_q,h) / sqrt(d)     p_h = softmax(u_h X^T)     z_h = p_h X     o_h = W_v,h z_h + b_v,h

Equal to nn.MultiheadAttention before its out_proj, in value and in every gradient, but X is never projected:
2 H Q S E multiplications instead of 2 S E^2. b_k adds the same amount to all scores of a row: the softmax cancels it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def absorbed_attention(
    query: Tensor,
    tokens: Tensor,
    features: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
    features_mask: Tensor | None = None,
) -> Tensor:
    """Attend from `query` to the rows of `tokens` (shared by the batch) and `features` under one softmax.

    Args:
        query: [B, Q, E]. Worth it while Q is small: below about S*E / (E + (H-1)*S), 305 at E=4096, S=640, H=8.
        tokens: [S0, E], the first keys of every sample; S0 may be 0.
        features: [B, S1, E].
        in_proj_weight: [3E, E], query, key and value projection stacked as in nn.MultiheadAttention.
        in_proj_bias: [3E]; its key part gets a gradient of exactly 0.
        num_heads: H, divides E.
        features_mask: bool [B, S1], True = take part. A sample with no key at all (S0 = 0, all masked) gives NaN.

    Returns:
        [B, Q, E], the heads' outputs side by side, before out_proj. Computed in the dtype of `features` (the other
        inputs are cast to it), softmax in fp32 at least, whatever autocast says.

    Raises:
        ValueError: shapes that do not fit together.
    """
    embed = query.shape[-1]
    if query.dim() != 3 or tokens.dim() != 2 or features.dim() != 3:
        raise ValueError(
            f"expected query [B, Q, E], tokens [S0, E], features [B, S1, E]; "
            f"got {tuple(query.shape)}, {tuple(tokens.shape)}, {tuple(features.shape)}"
        )
    if tokens.shape[1] != embed or features.shape[2] != embed or features.shape[0] != query.shape[0]:
        raise ValueError(
            f"batch or width differ: query {tuple(query.shape)}, tokens {tuple(tokens.shape)}, "
            f"features {tuple(features.shape)}"
        )
    if in_proj_weight.shape != (3 * embed, embed) or in_proj_bias.shape != (3 * embed,):
        raise ValueError(f"in_proj_weight must be [{3 * embed}, {embed}] and in_proj_bias [{3 * embed}]")
    if num_heads < 1 or embed % num_heads:
        raise ValueError(f"embed_dim {embed} is not divisible by num_heads {num_heads}")
    if features_mask is not None and (features_mask.shape != features.shape[:2] or features_mask.dtype != torch.bool):
        raise ValueError(f"features_mask must be bool {tuple(features.shape[:2])}, True = valid")
    return _AbsorbedAttention.apply(query, tokens, features, in_proj_weight, in_proj_bias, features_mask, num_heads)


def _heads(weight: Tensor, num_heads: int) -> Tensor:
    """[E, E] -> [H, d, E], a view."""
    return weight.view(num_heads, -1, weight.shape[1])


class _AbsorbedAttention(torch.autograd.Function):
    """Hand-written backward: the packed [3E, E] gradient is written once, autograd's chunk would pad and add three."""

    @staticmethod
    def forward(ctx, query, tokens, features, in_proj_weight, in_proj_bias, features_mask, num_heads):
        with torch.autocast(features.device.type, enabled=False):
            dtype = features.dtype
            b, q, e = query.shape
            h, d = num_heads, e // num_heads
            n0, n1 = tokens.shape[0], features.shape[1]
            x0, w, bias = tokens.to(dtype), in_proj_weight.to(dtype), in_proj_bias.to(dtype)
            wq, wk, wv = w.reshape(3, e, e).unbind(0)

            qh = torch.addmm(bias[:e], query.to(dtype).reshape(b * q, e), wq.t()).mul_(d**-0.5)  # [BQ, E]
            qh = qh.view(b * q, h, d).transpose(0, 1)  # [H, BQ, d]
            u = torch.bmm(qh, _heads(wk, h)).transpose(0, 1).contiguous().view(b, q * h, e)
            scores = u.new_empty(b, q * h, n0 + n1)
            s0, s1 = scores.split([n0, n1], dim=2)
            s0.copy_((u.view(-1, e) @ x0.t()).view_as(s0))
            s1.copy_(torch.bmm(u, features.transpose(1, 2)))
            if features_mask is not None:
                s1.masked_fill_(~features_mask[:, None, :], float("-inf"))
            p = torch.softmax(scores, dim=-1, dtype=_at_least_fp32(dtype)).to(dtype)
            p0, p1 = p.split([n0, n1], dim=2)
            z = torch.bmm(p1, features)
            z.view(-1, e).addmm_(p0.reshape(b * q * h, n0), x0)
            zh = z.view(b * q, h, e).transpose(0, 1)  # [H, BQ, E]
            out = torch.bmm(zh, _heads(wv, h).transpose(1, 2)).transpose(0, 1).reshape(b, q, e)
            # the Parameter itself is saved, not a cast or a view of it: ZeRO-3 frees its data and gathers it again
            ctx.save_for_backward(query, tokens, features, in_proj_weight, qh, u, p, z)
            ctx.num_heads = h
            return out.add_(bias[2 * e :])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, tokens, features, in_proj_weight, qh, u, p, z = ctx.saved_tensors
        need = ctx.needs_input_grad
        h = ctx.num_heads
        with torch.autocast(features.device.type, enabled=False):
            dtype = features.dtype
            b, q, e = query.shape
            n0, n1 = tokens.shape[0], features.shape[1]
            x0, w = tokens.to(dtype), in_proj_weight.to(dtype)
            wq, wk, wv = w.reshape(3, e, e).unbind(0)
            p0, p1 = p.split([n0, n1], dim=2)

            grad_out = grad_out.to(dtype).reshape(b * q, e)
            do = grad_out.view(b * q, h, e // h).transpose(0, 1)  # [H, BQ, d]
            dz = torch.bmm(do, _heads(wv, h)).transpose(0, 1).contiguous().view(b, q * h, e)

            # softmax backward in fp32 at least; a masked key has p = 0, hence ds = 0
            dp = torch.cat(
                [(dz.view(-1, e) @ x0.t()).view(b, q * h, n0), torch.bmm(dz, features.transpose(1, 2))], dim=2
            ).to(_at_least_fp32(dtype))
            ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(dtype)
            ds0, ds1 = ds.split([n0, n1], dim=2)

            d_tokens = d_features = d_query = d_weight = d_bias = None
            if need[1]:
                d_tokens = ds0.reshape(b * q * h, n0).t() @ u.view(-1, e)
                d_tokens.addmm_(p0.reshape(b * q * h, n0).t(), dz.view(-1, e))
                d_tokens = d_tokens.to(tokens.dtype)
            if need[2]:  # one product over 2QH rows writes dX once
                d_features = torch.bmm(torch.cat([ds1, p1], dim=1).transpose(1, 2), torch.cat([u, dz], dim=1))
            if need[0] or need[3] or need[4]:
                du = torch.bmm(ds1, features)
                du.view(-1, e).addmm_(ds0.reshape(b * q * h, n0), x0)
                du = du.view(b * q, h, e).transpose(0, 1)  # [H, BQ, E]
                dq = torch.bmm(du, _heads(wk, h).transpose(1, 2)).transpose(0, 1).reshape(b * q, e)
                dq.mul_((e // h) ** -0.5)
                if need[0]:
                    d_query = (dq @ wq).view(b, q, e).to(query.dtype)
                if need[3]:
                    d_weight = w.new_empty(3 * e, e)
                    torch.mm(dq.t(), query.to(dtype).reshape(b * q, e), out=d_weight[:e])
                    torch.bmm(qh.transpose(1, 2), du, out=_heads(d_weight[e : 2 * e], h))
                    zh = z.view(b * q, h, e).transpose(0, 1)
                    torch.bmm(do.transpose(1, 2), zh, out=_heads(d_weight[2 * e :], h))
                    d_weight = d_weight.to(in_proj_weight.dtype)
                if need[4]:
                    d_bias = torch.cat([dq.sum(0), dq.new_zeros(e), grad_out.sum(0)]).to(in_proj_weight.dtype)
            return d_query, d_tokens, d_features, d_weight, d_bias, None, None


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

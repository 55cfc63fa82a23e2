"""Multi-head attention of a few queries over keys = values = [tokens ; features], projections absorbed.

    u_h = W_k,h^T (W_q,h q + b_q,h) / sqrt(d)     p_h = softmax(u_h X^T)     z_h = p_h X     o_h = W_v,h z_h + b_v,h

Equal to nn.MultiheadAttention before its out_proj, in value and in every gradient, but X is never projected:
2 H Q S E multiplications instead of 2 S E^2. b_k adds the same amount to all scores of a row: the softmax cancels it.
A last Linear before the attention is absorbed in the same way: with X_1 = a W_r^T + b_r, the pool runs over a with
W_r^T u_h and the offset u_h . b_r, and W_r is applied once to what is pooled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psa_fast.ops.backend import Backend
from psa_fast.ops.limits import no_forward_mode, refuse_second_order, same_device
from psa_fast.ops.pool import Activation, Pooled, PoolGrads, check_features, pool_backward, pool_forward, resolve_rows
from psa_fast.ops.precision import at_least_fp32


def attention_pool(
    query: Tensor,
    features: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    num_heads: int,
    *,
    tokens: Tensor | None = None,
    features_mask: Tensor | None = None,
    feature_bias: Tensor | None = None,
    activation: Activation | None = None,
    readout_weight: Tensor | None = None,
    readout_bias: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend from `query` to the rows of `tokens` (shared by the batch) and `features` under one softmax.

    The features are act(features + feature_bias) @ readout_weight.T + readout_bias, each part only where it is given.

    Args:
        query: [B, Q, E]. Worth it while Q is small: below about S*E / (E + (H-1)*S), 305 at E=4096, S=640, H=8.
        features: [B, S1, E].
        in_proj_weight: [3E, E], query, key and value projection stacked as in nn.MultiheadAttention.
        in_proj_bias: [3E]; its key part gets a gradient of exactly 0.
        num_heads: H, divides E.
        tokens: [S0, E], keys that precede every sample's features.
        features_mask: bool [B, S1], True = take part. A sample with no key at all gives NaN.
        feature_bias: [E].
        activation: "silu" or None.
        readout_weight: [E, E], as in nn.Linear.
        readout_bias: [E]; needs readout_weight.
        backend: "torch", "triton" (Q * H up to 32, 16 in fp32) or "auto", see `psa_fast.ops.backend`.

    Returns:
        [B, Q, E], the heads' outputs side by side, before out_proj. Computed in the dtype of `features` (the other
        inputs are cast to it), softmax in fp32 at least, whatever autocast says.

    Raises:
        ValueError: shapes that do not fit together, two devices, or a backend that cannot run here.
        NotImplementedError: under forward-mode differentiation; in a second backward through the gradients.
    """
    shared = {"in_proj_weight": in_proj_weight, "in_proj_bias": in_proj_bias, "feature_bias": feature_bias}
    shared |= {"readout_weight": readout_weight, "readout_bias": readout_bias}
    _check_shapes(query, features, num_heads, tokens=tokens, **shared)
    check_features(features, activation, features_mask)
    same_device("attention_pool", query=query, features=features, tokens=tokens, features_mask=features_mask, **shared)
    no_forward_mode("attention_pool", query, features, tokens, *shared.values())
    return _attention_pool(
        query,
        tokens,
        features,
        in_proj_weight,
        in_proj_bias,
        feature_bias,
        readout_weight,
        readout_bias,
        features_mask,
        num_heads,
        activation == "silu",
        resolve_rows(backend, features, query.shape[1] * num_heads),
    )[0]


def _check_shapes(query: Tensor, features: Tensor, num_heads: int, **others: Tensor | None) -> None:
    """Raise ValueError, naming the argument, for a shape that is not that of `attention_pool`."""
    if query.dim() != 3 or features.dim() != 3:
        raise ValueError(
            f"expected query [B, Q, E] and features [B, S1, E], got {tuple(query.shape)} and {tuple(features.shape)}"
        )
    embed, tokens = query.shape[-1], others["tokens"]
    wanted = {
        "features": (query.shape[0], features.shape[1], embed),
        "tokens": (0 if tokens is None else tokens.shape[0], embed),
        "in_proj_weight": (3 * embed, embed),
        "in_proj_bias": (3 * embed,),
        "feature_bias": (embed,),
        "readout_weight": (embed, embed),
        "readout_bias": (embed,),
    }
    given = {"features": features, **others}
    for name, shape in wanted.items():
        tensor = given[name]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} as query is {list(query.shape)}, got {list(tensor.shape)}")
    if num_heads < 1 or embed % num_heads:
        raise ValueError(f"embed_dim {embed} is not divisible by num_heads {num_heads}")
    if given["readout_bias"] is not None and given["readout_weight"] is None:
        raise ValueError("readout_bias needs readout_weight")


def _heads(weight: Tensor, num_heads: int) -> Tensor:
    """[E, E] -> [H, d, E], a view."""
    return weight.unflatten(0, (num_heads, -1))


@torch.library.custom_op("psa_fast::attention_pool", mutates_args=())
def _attention_pool(
    query: Tensor,
    tokens: Tensor | None,
    features: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    feature_bias: Tensor | None,
    readout_weight: Tensor | None,
    readout_bias: Tensor | None,
    features_mask: Tensor | None,
    num_heads: int,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Out [B, Q, E]; for backward: projected query [H, BQ, d], token and feature query and z [B, R, E], then Pooled."""
    dtype = features.dtype
    b, q, e = query.shape
    h = num_heads
    with torch.autocast(features.device.type, enabled=False):
        x0 = features.new_empty(0, e) if tokens is None else tokens.to(dtype)
        wq, wk, wv = in_proj_weight.to(dtype).reshape(3, e, e).unbind(0)
        bias = in_proj_bias.to(dtype)
        # head by head: as one matrix product of few rows it takes twice as long on a CPU
        rows = query.to(dtype).reshape(1, b * q, e).expand(h, -1, -1)
        projected = torch.baddbmm(bias[:e].view(h, 1, -1), rows, _heads(wq, h).transpose(1, 2)).mul_((e // h) ** -0.5)
        token_query = torch.bmm(projected, _heads(wk, h)).transpose(0, 1).contiguous().view(b, q * h, e)
        feature_query, offset = _absorb(token_query, readout_weight, readout_bias)
        pooled = pool_forward(
            x0,
            features,
            token_query,
            feature_query,
            offset,
            None if feature_bias is None else feature_bias.to(dtype),
            silu,
            features_mask,
            backend,
        )
        z = _read_out(pooled, readout_weight, readout_bias)
        out = torch.bmm(z.view(b * q, h, e).transpose(0, 1), _heads(wv, h).transpose(1, 2))
        out = out.transpose(0, 1).contiguous().view(b, q, e).add_(bias[2 * e :])
        if readout_weight is None:
            feature_query = feature_query.clone()  # an op's results may not share memory
        return out, projected, token_query, feature_query, z, *pooled


def _absorb(query: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows [B, R, E] seen from before the readout: query W_r [B, R, E], and the offset query . b_r [B, R]."""
    if weight is None:
        return query, None
    absorbed = (query.view(-1, query.shape[-1]) @ weight.to(query.dtype)).view_as(query)
    return absorbed, None if bias is None else query @ bias.to(query.dtype)


def _read_out(pooled: Pooled, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What every row pools of tokens and of features after the readout: [B, R, E]."""
    if weight is None:
        return pooled.token_sum + pooled.feature_sum
    dtype, e = pooled.feature_sum.dtype, pooled.feature_sum.shape[-1]
    z = torch.addmm(pooled.token_sum.view(-1, e), pooled.feature_sum.view(-1, e), weight.to(dtype).t())
    z = z.view_as(pooled.token_sum)
    return z if bias is None else z.addcmul_(pooled.mass.to(dtype).unsqueeze(-1), bias.to(dtype))


@_attention_pool.register_fake
def _(query, tokens, features, *rest):
    num_heads = rest[6]
    b, q, e = query.shape
    r, keys, wide = q * num_heads, features.shape[1], at_least_fp32(features.dtype)
    keys = keys if tokens is None else keys + tokens.shape[0]
    per_row = [features.new_empty(b, r, e) for _ in range(5)]
    return (
        features.new_empty(b, q, e),
        features.new_empty(num_heads, b * q, e // num_heads),
        *per_row,
        features.new_empty(b, r, dtype=wide),
        features.new_empty(b, r, keys, dtype=wide),
        features.new_empty(b, r, dtype=wide),
    )


@torch.library.custom_op("psa_fast::attention_pool_backward", mutates_args=())
def _attention_pool_backward(
    grad_out: Tensor,
    query: Tensor,
    tokens: Tensor | None,
    features: Tensor,
    in_proj_weight: Tensor,
    feature_bias: Tensor | None,
    readout_weight: Tensor | None,
    readout_bias: Tensor | None,
    num_heads: int,
    silu: bool,
    backend: str,
    needs: list[bool],
    projected: Tensor,
    token_query: Tensor,
    feature_query: Tensor,
    z: Tensor,
    token_sum: Tensor,
    feature_sum: Tensor,
    mass: Tensor,
    scores: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, tokens, features, in_proj_weight, in_proj_bias, feature_bias, readout_weight, readout_bias.

    An empty tensor stands for a gradient that `needs` does not ask for.
    """
    dtype = features.dtype
    b, q, e = query.shape
    h, r, rows = num_heads, q * num_heads, b * q * num_heads
    with torch.autocast(features.device.type, enabled=False):
        pooled = Pooled(token_sum, feature_sum, mass, scores, lse)
        x0 = features.new_empty(0, e) if tokens is None else tokens.to(dtype)
        w = in_proj_weight.to(dtype)
        wq, wk, wv = w.reshape(3, e, e).unbind(0)
        readout = None if readout_weight is None else readout_weight.to(dtype)

        grad_out = grad_out.to(dtype).reshape(b * q, e)
        head_grad = grad_out.view(b * q, h, e // h).transpose(0, 1)  # [H, BQ, d]
        dz = torch.bmm(head_grad, _heads(wv, h)).transpose(0, 1).contiguous().view(b, r, e)
        feature_dz, mass_grad = _absorb(dz, readout, readout_bias)
        grads = pool_backward(
            dz,
            feature_dz,
            mass.new_zeros(b, r) if mass_grad is None else mass_grad.to(mass.dtype),
            x0,
            features,
            token_query,
            feature_query,
            None if feature_bias is None else feature_bias.to(dtype),
            silu,
            pooled,
            backend,
        )
        offset_grad = grads.feature_offset.to(dtype)
        du = _absorbed_grad(grads, offset_grad, readout, readout_bias)
        du = du.view(b * q, h, e).transpose(0, 1)  # [H, BQ, E]
        head_dq = torch.bmm(du, _heads(wk, h).transpose(1, 2)).mul_((e // h) ** -0.5)  # [H, BQ, d]
        dq = head_dq.transpose(0, 1).reshape(b * q, e)

        query_grad, weight_grad, bias_grad, readout_grad, readout_bias_grad = (w.new_empty(0) for _ in range(5))
        if needs[0]:
            query_grad = torch.bmm(head_dq, _heads(wq, h)).sum(0).view(b, q, e)
        if needs[1]:
            by_head = z.view(b * q, h, e).transpose(0, 1)
            weight_grad = _stacked_grad(dq, query.to(dtype).reshape(b * q, e), projected, du, head_grad, by_head)
        if needs[2]:
            bias_grad = torch.cat([dq.sum(0), dq.new_zeros(e), grad_out.sum(0)])
        if readout is not None and needs[3]:
            left = torch.cat([dz.view(rows, e), token_query.view(rows, e)])
            right = torch.cat([feature_sum.view(rows, e), grads.feature_query.view(rows, e)])
            readout_grad = left.t() @ right
        if readout_bias is not None and needs[4]:
            readout_bias_grad = torch.mv(dz.view(rows, e).t(), mass.to(dtype).view(rows))
            readout_bias_grad.addmv_(token_query.view(rows, e).t(), offset_grad.view(rows))
        feature_bias_grad = w.new_empty(0) if grads.feature_bias is None else grads.feature_bias
        found = query_grad, grads.tokens, grads.features, weight_grad, bias_grad, feature_bias_grad
        return *found, readout_grad, readout_bias_grad


def _stacked_grad(dq: Tensor, query: Tensor, projected: Tensor, du: Tensor, head_grad: Tensor, z: Tensor) -> Tensor:
    """The gradient of in_proj_weight [3E, E], each part written once where it belongs."""
    h, e = projected.shape[0], query.shape[1]
    out = query.new_empty(3 * e, e)
    torch.mm(dq.t(), query, out=out[:e])
    torch.bmm(projected.transpose(1, 2), du, out=_heads(out[e : 2 * e], h))
    torch.bmm(head_grad.transpose(1, 2), z, out=_heads(out[2 * e :], h))
    return out


def _absorbed_grad(
    grads: PoolGrads, offset_grad: Tensor, readout: Tensor | None, readout_bias: Tensor | None
) -> Tensor:
    """The gradient of the rows that `_absorb` has seen from before the readout: [B, R, E]."""
    du, e = grads.token_query, grads.token_query.shape[-1]
    if readout is None:
        return du + grads.feature_query
    du = torch.addmm(du.view(-1, e), grads.feature_query.view(-1, e), readout.t()).view_as(du)
    return du if readout_bias is None else du.addcmul_(offset_grad.unsqueeze(-1), readout_bias.to(du.dtype))


@_attention_pool_backward.register_fake
def _(grad_out, query, tokens, features, in_proj_weight, feature_bias, readout_weight, readout_bias, *rest):
    needs, e = rest[3], query.shape[-1]
    new = features.new_empty
    return (
        new(query.shape if needs[0] else 0),
        new((0, e) if tokens is None else tokens.shape),
        new(features.shape),
        new(in_proj_weight.shape if needs[1] else 0),
        new(3 * e if needs[2] else 0),
        new(0) if feature_bias is None else new(e, dtype=at_least_fp32(features.dtype)),
        new(0 if readout_weight is None or not needs[3] else readout_weight.shape),
        new(0 if readout_bias is None or not needs[4] else e),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, num_heads, silu, backend = inputs
    query, tokens, features, in_proj_weight, _, feature_bias, readout_weight, readout_bias = tensors
    # the Parameters themselves are saved, not casts or views of them: ZeRO-3 frees their data and gathers it again
    ctx.save_for_backward(
        query, tokens, features, in_proj_weight, feature_bias, readout_weight, readout_bias, *output[1:]
    )
    ctx.options = num_heads, silu, backend
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]


def _backward(ctx, grad_out, *unused):
    query, tokens, features, in_proj_weight, feature_bias, readout_weight, readout_bias, *saved = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4, 6, 7)]
    grads = _attention_pool_backward(
        grad_out,
        query,
        tokens,
        features,
        in_proj_weight,
        feature_bias,
        readout_weight,
        readout_bias,
        *ctx.options,
        wanted,
        *saved,
    )
    found = (
        grad.to(dtype) if dtype is not None and needed else None
        for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
    )
    return (*found, None, None, None, None)


_attention_pool.register_autograd(_backward, setup_context=_setup_context)
_attention_pool_backward.register_autograd(refuse_second_order("attention_pool"))

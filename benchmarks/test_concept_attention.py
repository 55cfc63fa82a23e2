"""The concept attention, and the whole bottleneck behind the vision features' pre-activations, at 7B widths.

A ladder from the official use to ours: the rung below ours is the one that counts. CPU: fp32. CUDA: bf16, and
torch.compile of the absorbed form besides.
"""

import pytest
import torch
import torch.nn.functional as F
from ladder import CUDA, DEVICE, DTYPE, check, climb
from torch import nn

from psa_fast.models import ConceptAttention, ConceptReadout
from psa_fast.ops import concept_loss

E, HEADS, TEXT, TOKENS, FEATURES = 4096, 8, 64, 64, 576
TOLERANCE = 3e-2 if CUDA else 1e-4
BATCHES = [16, 64] if CUDA else [2, 16]
ROUNDS = 30 if CUDA else 2


class Case:
    """Inputs and one set of weights for all forms; text [B, 64, E] asks, tokens and features answer."""

    def __init__(self, batch, readout=False):
        torch.manual_seed(0)
        make = {"device": DEVICE, "dtype": DTYPE}
        self.batch = batch
        self.ours = (ConceptReadout if readout else ConceptAttention)(E, HEADS, **make)
        self.official = nn.MultiheadAttention(E, HEADS, batch_first=True, **make)
        for name in ("in_proj_weight", "in_proj_bias"):
            setattr(self.official, name, getattr(self.ours, name))
        self.official.out_proj.weight, self.official.out_proj.bias = self.ours.out_proj.weight, self.ours.out_proj.bias
        self.query = torch.randn(batch, TEXT, E, **make).requires_grad_()
        self.tokens = torch.randn(TOKENS, E, **make).requires_grad_()
        self.features = torch.randn(batch, FEATURES, E, **make).requires_grad_()
        self.heads = nn.Linear(E, 11, **make)
        self.targets = torch.stack([torch.arange(batch) % 7, torch.arange(batch) % 4], dim=1).to(DEVICE)
        self.leaves = [self.query, self.tokens, self.features, *self.ours.parameters()]

    def keys(self, features):
        return torch.cat([self.tokens.expand(self.batch, -1, -1), features], dim=1)

    def all_queries(self, features, need_weights=True):
        keys = self.keys(features)
        return self.official(self.query, keys, keys, need_weights=need_weights)[0][:, :1]

    def one_query(self, features):
        keys = self.keys(features)
        return self.official(self.query[:, :1], keys, keys, need_weights=False)[0]

    def absorbed(self, features):
        """The algebra in plain torch under autograd."""
        a, d = self.ours, E // HEADS
        wq, wk, wv = a.in_proj_weight.chunk(3)
        bq, _, bv = a.in_proj_bias.chunk(3)
        q = F.linear(self.query[:, 0], wq, bq).view(-1, HEADS, d) * d**-0.5
        x = self.keys(features)
        u = torch.einsum("bhd,hde->bhe", q, wk.view(HEADS, d, E))
        z = torch.softmax(u @ x.transpose(1, 2), -1) @ x
        o = torch.einsum("bhe,hde->bhd", z, wv.view(HEADS, d, E)).reshape(-1, 1, E) + bv
        return a.out_proj(o)

    def read_out(self):
        """The projector's last bias, SiLU and Linear on every feature."""
        a = self.ours
        return F.linear(F.silu(self.features + a.feature_bias), a.readout_weight, a.readout_bias)

    def loss(self, pooled):
        """The two heads and their losses, as a user writes them."""
        kinds, levels = self.heads(pooled[:, 0]).float().split([7, 4], dim=1)
        return F.cross_entropy(kinds, self.targets[:, 0]) + F.cross_entropy(levels, self.targets[:, 1])

    def fused(self):
        return self.ours(self.query[:, :1], self.tokens, self.features)

    def fused_loss(self):
        return concept_loss(self.fused()[:, 0], self.heads.weight, self.heads.bias, self.targets).loss

    def exact(self, official):
        """Value and gradients of the official form in fp64, computed in a few samples' worth of memory."""
        inputs = [self.query, self.tokens, self.features]
        modules = [self.official, self.ours, self.heads]
        for module in modules:
            module.double()
        low = [t.data for t in inputs]
        for t in inputs:
            t.data = t.data.double()
        value = official()
        grads = torch.autograd.grad(value.sum(), self.leaves, materialize_grads=True, allow_unused=True)
        for module in modules:
            module.to(DTYPE)
        for t, data in zip(inputs, low, strict=True):
            t.data = data
        return (value.detach(), *grads)


@pytest.mark.parametrize("batch", BATCHES)
def test_concept_attention(benchmark, capsys, batch):
    case = Case(2)
    forms = {
        "official: all queries, weights": lambda: case.all_queries(case.features),
        "all queries, no weights": lambda: case.all_queries(case.features, need_weights=False),
        "one query": lambda: case.one_query(case.features),
        "absorbed, autograd": lambda: case.absorbed(case.features),
        "ours": lambda: case.fused(),
    }
    if CUDA:
        compiled = torch.compile(Case.absorbed)
        forms["absorbed, compiled"] = lambda: compiled(case, case.features)
    right, wrong = check(forms, case.leaves, case.exact(forms["one query"]), TOLERANCE)
    if batch > 2 and not CUDA:  # half a minute a step each: only the rungs that are quoted
        right = {name: right[name] for name in ("official: all queries, weights", "absorbed, autograd", "ours")}
    case = Case(batch)
    element = case.features.element_size()
    # forward reads the features, backward reads them and writes their gradient
    moved = 3 * case.features.numel() * element
    title = f"concept attention, B={batch}, {DEVICE}"
    climb(benchmark, capsys, title, right, case.leaves, ROUNDS, moved, wrong)


@pytest.mark.parametrize("batch", [16] if CUDA else [8])
def test_bottleneck_from_preactivations_to_loss(benchmark, capsys, batch):
    case = Case(2, readout=True)
    forms = {
        "official modules": lambda: case.loss(case.all_queries(case.read_out())),
        "one query": lambda: case.loss(case.one_query(case.read_out())),
        "absorbed, autograd": lambda: case.loss(case.absorbed(case.read_out())),
        "ours": lambda: case.fused_loss(),
    }
    right, wrong = check(forms, case.leaves, case.exact(forms["one query"]), TOLERANCE)
    if not CUDA:
        right = {name: right[name] for name in ("official modules", "absorbed, autograd", "ours")}
    case = Case(batch, readout=True)
    title = f"bottleneck from pre-activations to loss, B={batch}, {DEVICE}"
    climb(benchmark, capsys, title, right, [*case.leaves, *case.heads.parameters()], ROUNDS, wrong=wrong)

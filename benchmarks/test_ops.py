"""Forward and backward of every op beside what it replaces: ladders from the official use, or a user's own, to ours.

The rung below ours is the one that counts. CPU: fp32, plain torch. CUDA: bf16, the Triton kernels, torch.compile of the
plain forms besides.
"""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from baselines.lm_loss import baselines
from ladder import CUDA, DEVICE, DTYPE, check, climb
from pooling import FEATURES, HEAD_SIZES, MAKE, Attention, E, pool_inputs, pooled

from psa_fast.ops import concept_loss, concept_pool, reference, supervised_linear_cross_entropy

BATCHES = [16, 64] if CUDA else [2, 16]
POOL_TOLERANCE = 3e-2 if CUDA else 1e-4
POOL_ROUNDS = 30 if CUDA else 3
# forward reads the features; backward reads them and writes their gradient
FEATURE_BYTES = 3 * FEATURES * E * DTYPE.itemsize


@pytest.fixture(autouse=True)
def compiled_afresh():
    """Each ladder's compiled forms are compiled for its shapes alone."""
    torch.compiler.reset()


def compiled(form):
    return torch.compile(form, dynamic=False)


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("batch", [16, 32, 64] if CUDA else BATCHES)
def test_concept_pool(benchmark, capsys, batch, silu):
    plain = partial(pooled, form=reference.concept_pool)
    functions = {"plain, autograd": plain, "ours": pooled}
    if CUDA:
        in_torch = partial(pooled, form=partial(concept_pool, backend="torch"))
        functions |= {"plain, compiled": compiled(plain), "ours in torch": in_torch}
    leaves = pool_inputs(2, silu, **MAKE)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value = plain(*exact)
    expected = (value.detach(), *torch.autograd.grad(value.sum(), exact))
    forms = {name: partial(function, *leaves) for name, function in functions.items()}
    right, wrong = check(forms, leaves, expected, POOL_TOLERANCE)
    leaves = pool_inputs(batch, silu, **MAKE)
    forms = {name: partial(functions[name], *leaves) for name in right}
    title = f"concept pool{' of SiLU(features + bias)' if silu else ''}, B={batch}, {DEVICE}"
    climb(benchmark, capsys, title, forms, leaves, POOL_ROUNDS, batch * FEATURE_BYTES, wrong)


@pytest.mark.parametrize("batch", BATCHES)
def test_concept_attention(benchmark, capsys, batch):
    functions = {
        "official: all queries, weights": Attention.all_queries,
        "all queries, no weights": partial(Attention.all_queries, need_weights=False),
        "one query": Attention.one_query,
        "absorbed, autograd": Attention.absorbed,
        "composed of concept_pool": Attention.composed,
        "ours": Attention.ours,
    }
    if CUDA:
        functions["absorbed, compiled"] = compiled(Attention.absorbed)
    case = Attention(2)
    forms = {name: partial(function, case) for name, function in functions.items()}
    right, wrong = check(forms, case.leaves, case.exact(case.one_query), POOL_TOLERANCE)
    quoted = set(right)
    if batch > 2 and not CUDA:  # half a minute a step each
        quoted -= {"all queries, no weights", "one query"}
    case = Attention(batch)
    forms = {name: partial(functions[name], case) for name in right if name in quoted}
    title = f"concept attention, B={batch}, {DEVICE}"
    climb(benchmark, capsys, title, forms, case.leaves, POOL_ROUNDS, batch * FEATURE_BYTES, wrong)


@pytest.mark.parametrize("batch", [16] if CUDA else [8])
def test_bottleneck_from_preactivations_to_loss(benchmark, capsys, batch):
    functions = {
        "official modules": lambda case: case.loss(case.all_queries()),
        "absorbed, autograd": lambda case: case.loss(case.absorbed()),
        "composed of concept_pool": lambda case: case.loss(case.composed()),
        "ours": Attention.our_loss,
    }
    case = Attention(2, readout=True)
    forms = {name: partial(function, case) for name, function in functions.items()}
    expected = case.exact(lambda: case.loss(case.one_query()))
    right, wrong = check(forms, case.leaves, expected, POOL_TOLERANCE)
    case = Attention(batch, readout=True)
    forms = {name: partial(functions[name], case) for name in right}
    title = f"bottleneck from pre-activations to loss, B={batch}, {DEVICE}"
    climb(benchmark, capsys, title, forms, case.leaves, POOL_ROUNDS, wrong=wrong)


def plain_concept_loss(pooled, weight, bias, targets, class_weights, label_smoothing):
    """What a user would write; NaN where a head has no label."""
    wide = torch.promote_types(pooled.dtype, torch.float32)
    scores = F.linear(pooled, weight, bias).to(wide).split(HEAD_SIZES, 1)
    weights = class_weights.to(wide).split(HEAD_SIZES)
    parts = zip(scores, targets.unbind(1), weights, strict=True)
    return sum(F.cross_entropy(*part, label_smoothing=label_smoothing) for part in parts)


def our_concept_loss(pooled, weight, bias, targets, class_weights, label_smoothing, backend="auto"):
    return concept_loss(
        pooled, weight, bias, targets, class_weights=class_weights, label_smoothing=label_smoothing, backend=backend
    ).loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=lambda s: f"smoothing {s}")
@pytest.mark.parametrize("rows", [2, 16, 64])
def test_concept_loss(benchmark, capsys, rows, smoothing):
    """Launches are most of the work on a GPU: times with the host and those of a captured graph differ much."""
    torch.manual_seed(0)
    classes = sum(HEAD_SIZES)
    leaves = [torch.randn(*s, **MAKE).div(8).requires_grad_() for s in ((rows, E), (classes, E), (classes,))]
    targets = torch.stack([torch.arange(rows, device=DEVICE) % n for n in HEAD_SIZES], 1)
    rest = (targets, torch.rand(classes, device=DEVICE) + 0.5, smoothing)
    functions = {"eager": plain_concept_loss, "ours": our_concept_loss}
    if CUDA:
        in_torch = partial(our_concept_loss, backend="torch")
        functions |= {
            "eager, compiled": compiled(plain_concept_loss),
            "ours in torch": in_torch,
            "ours in torch, compiled": compiled(in_torch),
        }
    forms = {name: partial(function, *leaves, *rest) for name, function in functions.items()}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    targets, class_weights, label_smoothing = rest
    loss, *_ = reference.concept_loss(*exact, targets, class_weights=class_weights, label_smoothing=label_smoothing)
    expected = (loss.detach(), *torch.autograd.grad(loss, exact))
    right, wrong = check(forms, leaves, expected, 2e-2 if CUDA else 1e-4)
    title = f"concept loss, {rows} rows, smoothing {smoothing}, {DEVICE}"
    climb(benchmark, capsys, title, right, leaves, 100, wrong=wrong)


def norm_silu(x, weight, bias):
    """As the safety projector's blocks have it."""
    return F.silu(F.layer_norm(x, x.shape[-1:], weight, bias))


@pytest.mark.parametrize("batch", [16] if CUDA else [1, 4])
def test_layer_norm_silu(benchmark, capsys, batch):
    """Two plain operations are ours: this is where it would show that a kernel for them could pay."""
    torch.manual_seed(0)
    leaves = [torch.randn(*s, **MAKE).requires_grad_() for s in ((batch, 24, 24, 1088), (1088,), (1088,))]
    forms = {"ours": partial(norm_silu, *leaves), "compiled": partial(compiled(norm_silu), *leaves)}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value = norm_silu(*exact)
    expected = (value.detach(), *torch.autograd.grad(value.sum(), exact))
    right, wrong = check(forms, leaves, expected, 2e-2 if CUDA else 1e-4)
    title = f"LayerNorm and SiLU, B={batch}, 24x24, 1088 channels, {DEVICE}"
    climb(benchmark, capsys, title, right, leaves, 30, 5 * leaves[0].nbytes, wrong)


class Size(NamedTuple):
    rows: int
    width: int
    dtype: torch.dtype
    rounds: int
    vocabulary: int = 32064


SWEEP = Size(8192, 4096, DTYPE, 20) if CUDA else Size(1024, 512, DTYPE, 3)
TARGET = SWEEP if CUDA else Size(4096, 1024, DTYPE, 3)
CASES = [(SWEEP, share, head) for head in ("frozen", "trained") for share in (0.05, 0.25, 0.5, 1.0)]
CASES.append((TARGET, 0.1, "frozen"))


def lm_inputs(size, share, head):
    torch.manual_seed(0)
    hidden = torch.randn(size.rows, size.width, device=DEVICE).to(size.dtype).requires_grad_()
    weight = (torch.randn(size.vocabulary, size.width, device=DEVICE) / size.width**0.5).to(size.dtype)
    labels = torch.randint(size.vocabulary, (size.rows,), device=DEVICE)
    labels[torch.randperm(size.rows, device=DEVICE)[round(share * size.rows) :]] = -100
    return hidden, weight.requires_grad_(head == "trained"), labels


def lm_truth(hidden, weight, labels):
    """Loss and gradients of the reference in fp64."""
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    loss = reference.supervised_linear_cross_entropy(*exact, labels)
    return (loss.detach(), *torch.autograd.grad(loss, [t for t in exact if t.requires_grad]))


@pytest.mark.parametrize(("size", "share", "head"), CASES, ids=[f"{s.rows}x{s.width}-{p:.0%}-{h}" for s, p, h in CASES])
def test_supervised_loss(benchmark, capsys, size, share, head):
    data = lm_inputs(size, share, head)
    leaves = [t for t in data[:2] if t.requires_grad]
    losses = baselines(DEVICE) | {"ours": supervised_linear_cross_entropy}
    forms = {name: partial(loss, *data) for name, loss in losses.items()}
    right, wrong = check(forms, leaves, lm_truth(*data), 1e-2 if CUDA else 1e-5)
    title = f"supervised loss, {size.rows} rows, {share:.0%} supervised, E={size.width}, {head} head, {DEVICE}"
    climb(benchmark, capsys, title, right, leaves, size.rounds, wrong=wrong)

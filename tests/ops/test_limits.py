"""What no op may do in silence: drop a second derivative or a tangent, or read a tensor that has no data.

Every case is compared with the op's reference in fp64: an op gives the same or raises a sentence that names it.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from psa_fast.ops import attention_pool, concept_loss, concept_pool, reference, supervised_linear_cross_entropy

F64 = torch.float64
SIZES = (4, 3)

OPS = {op.__name__: op for op in (supervised_linear_cross_entropy, concept_loss, attention_pool, concept_pool)}
SHAPES = {
    "supervised_linear_cross_entropy": [(2, 3, 5), (9, 5), (9,)],
    "concept_loss": [(4, 5), (7, 5), (7,)],
    "attention_pool": [(2, 1, 4), (2, 5, 4), (12, 4), (12,), (3, 4)],
    "concept_pool": [(3, 4), (2, 5, 4), (2, 3, 4), (2, 3, 4)],
}


class Case:
    """One op with one backend: `ours` and `plain`, the op's reference, map the same leaves to one number."""

    def __init__(self, op, backend):
        torch.manual_seed(3)
        self.op, self.backend = op, backend
        self.leaves = [torch.randn(s, dtype=F64, requires_grad=True) for s in SHAPES[op]]
        self.labels = torch.tensor([[1, -100, 8], [0, -100, 3]])
        self.targets = torch.tensor([[0, 2], [3, -100], [-100, 1], [2, 0]])

    def ours(self, *leaves):
        return self._number(OPS[self.op], leaves, backend=self.backend)

    def plain(self, *leaves):
        return self._number(getattr(reference, self.op), leaves)

    def _number(self, function, leaves, **options):
        if self.op == "supervised_linear_cross_entropy":
            hidden, weight, bias = leaves
            return function(hidden, weight, self.labels.to(hidden.device), bias=bias, **options)
        if self.op == "concept_loss":
            loss, _, logits = function(*leaves, self.targets.to(leaves[0].device), SIZES, **options)
            return loss + logits.square().sum()
        if self.op == "attention_pool":
            query, features, weight, bias, tokens = leaves
            return function(query, features, weight, bias, 2, tokens=tokens, **options).square().sum()
        token_sum, feature_sum, mass = function(*leaves, **options)
        return token_sum.square().sum() + feature_sum.sum() + mass.sum()

    @property
    def twice(self):
        """Whether it promises a double backward."""
        return self.op == "concept_loss"


# tensors are on the CPU here, where the kernels run in Triton's interpreter
BACKENDS = ["torch", "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch"]
CASES = [(op, backend) for op in SHAPES for backend in BACKENDS]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def case(request):
    return Case(*request.param)


def refusal(case):
    """What pytest.raises expects where the op itself refuses."""
    return pytest.raises(NotImplementedError, match=f"^{case.op}.* has no ")


def test_the_cases_are_the_ops(case):
    got, expected = case.ours(*case.leaves), case.plain(*case.leaves)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def penalised(function, leaves, index):
    """Gradients of the loss plus a penalty on its gradient with respect to one leaf."""
    loss = function(*leaves)
    gradient = torch.autograd.grad(loss, leaves[index], create_graph=True)[0]
    return torch.autograd.grad(loss + 10 * gradient.square().sum(), leaves)


def test_a_gradient_penalty_is_right_or_refused(case):
    for index in range(len(case.leaves)):
        if not case.twice:
            with refusal(case):
                penalised(case.ours, case.leaves, index)
            continue
        got, expected = (penalised(f, case.leaves, index) for f in (case.ours, case.plain))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def test_a_second_derivative_is_never_just_missing(case):
    """`allow_unused` takes an absent path for a zero: the graph must reach every leaf, upstream ones too."""
    upstream = [leaf * 1 for leaf in case.leaves]
    first = torch.autograd.grad(case.ours(*upstream), case.leaves, create_graph=True)
    expected = torch.autograd.grad(case.plain(*upstream), case.leaves, create_graph=True)
    for gradient, wanted in zip(first, expected, strict=True):
        for leaf in case.leaves:
            if not case.twice:
                with refusal(case):
                    torch.autograd.grad(gradient.sum(), leaf, allow_unused=True, retain_graph=True)
                continue
            got, want = (
                torch.autograd.grad(g.square().sum(), leaf, retain_graph=True, materialize_grads=True)[0]
                for g in (gradient, wanted)
            )
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_create_graph_alone_is_no_fault(case):
    """Whoever does not differentiate again gets the gradients, and may change them in place as clipping does."""
    loss = case.ours(*case.leaves)
    got = torch.autograd.grad(loss, case.leaves, create_graph=True)
    for g, e in zip(got, torch.autograd.grad(case.plain(*case.leaves), case.leaves), strict=True):
        torch.testing.assert_close(g.detach(), e, rtol=1e-10, atol=1e-10)
    case.ours(*case.leaves).backward(create_graph=True)
    before = case.leaves[0].grad.detach().clone()
    nn.utils.clip_grad_norm_(case.leaves, 1e-3)
    assert case.leaves[0].grad.norm() < before.norm()
    for leaf in case.leaves:
        leaf.grad = None  # a cycle otherwise


def test_an_incoming_gradient_that_is_differentiated(case):
    """The product of a vector and the Hessian by a double backward, with the vector asked for too."""
    scale = torch.ones((), dtype=F64, requires_grad=True)
    first = torch.autograd.grad(case.ours(*case.leaves), case.leaves, scale, create_graph=True)
    total = sum(g.square().sum() for g in first)
    if not case.twice:
        with refusal(case):
            torch.autograd.grad(total, scale)
        return
    wanted = torch.autograd.grad(case.plain(*case.leaves), case.leaves, scale, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in wanted), scale)[0]
    torch.testing.assert_close(torch.autograd.grad(total, scale)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "class_weights": torch.arange(1.0, 8)}])
def test_gradgradcheck_of_concept_loss(backend, options):
    case = Case("concept_loss", backend)

    def run(*leaves):
        return tuple(concept_loss(*leaves, case.targets, SIZES, num_items=3, backend=backend, **options))

    assert torch.autograd.gradgradcheck(run, case.leaves)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_gradient_penalty_through_torch_compile(case, compiler):
    torch._dynamo.reset()

    def function(*leaves):  # what meets the op is no leaf
        return case.ours(*(torch.tanh(leaf) for leaf in leaves))

    def plain(*leaves):
        return case.plain(*(torch.tanh(leaf) for leaf in leaves))

    compiled = torch.compile(function, backend=compiler, fullgraph=True)

    def penalise(function):  # .backward(): what torch.compile makes of any function raises there only
        loss = function(*case.leaves)
        gradient = torch.autograd.grad(loss, case.leaves[0], create_graph=True)[0]
        (loss + 10 * gradient.square().sum()).backward()
        return [leaf.grad for leaf in case.leaves]

    if compiler == "eager" and case.twice:
        got = penalise(compiled)
        for g, e in zip(got, penalised(plain, case.leaves, 0), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises(RuntimeError, match="double backward"):
            penalise(compiled)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(case, reentrant):
    checkpoint(case.ours, *case.leaves, use_reentrant=reentrant).backward()
    for leaf, e in zip(case.leaves, torch.autograd.grad(case.plain(*case.leaves), case.leaves), strict=True):
        torch.testing.assert_close(leaf.grad, e, rtol=1e-10, atol=1e-10)


def right_or_refused(case, run):
    """`run` of the op equals `run` of its reference, or raises a sentence about what is not there."""
    leaves = [leaf.detach() for leaf in case.leaves]
    expected = run(case.plain, leaves)
    refused = ""
    try:
        got = run(case.ours, leaves)
    except RuntimeError as error:  # NotImplementedError is one
        refused = str(error)
    if not refused:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        return True
    assert refused.startswith(case.op) or "autograd.Function with functorch transforms" in refused, refused
    return False


def tangents(leaves):
    return tuple(torch.ones_like(leaf) for leaf in leaves)


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, tuple(x), tangents(x)),
    "jvp of one": lambda f, x: torch.func.jvp(lambda last: f(*x[:-1], last), (x[-1],), (torch.ones_like(x[-1]),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(*x),
    "linearize": lambda f, x: torch.func.linearize(f, *x)[1](*tangents(x)),
    "grad": lambda f, x: torch.func.grad(f)(*x),
    "jacrev": lambda f, x: torch.func.jacrev(f, argnums=1)(*x),
    "hessian": lambda f, x: torch.func.hessian(f)(*x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), tuple(x), tangents(x)),
    "vmap": lambda f, x: torch.func.vmap(f)(*(torch.stack([leaf, 2 * leaf]) for leaf in x)),
    "jvp of vmap": lambda f, x: torch.func.jvp(
        lambda *y: torch.func.vmap(f)(*y), tuple(t[None] for t in x), tangents([t[None] for t in x])
    ),
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda t: torch.func.jvp(lambda y: f(y, *x[1:]), (x[0],), (t,))[1])(
        torch.ones(2, *x[0].shape, dtype=F64)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_right_or_refused(case, name):
    right = right_or_refused(case, TRANSFORMS[name])
    if case.op == "concept_loss" and case.backend == "torch":
        assert right
    elif name in ("jvp", "jvp of one", "jacfwd"):
        with refusal(case):
            TRANSFORMS[name](case.ours, [leaf.detach() for leaf in case.leaves])


@pytest.mark.parametrize("trained", [False, True])
def test_dual_numbers(case, trained):
    leaves = [leaf.detach().requires_grad_(trained) for leaf in case.leaves]

    def tangent(function):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(leaf, torch.ones_like(leaf)) for leaf in leaves]
            return forward_ad.unpack_dual(function(*dual)).tangent

    if case.op == "concept_loss" and case.backend == "torch":
        torch.testing.assert_close(tangent(case.ours), tangent(case.plain), rtol=1e-10, atol=1e-10)
        return
    with refusal(case):
        tangent(case.ours)
    with forward_ad.dual_level():  # no argument has a tangent: nothing to refuse
        torch.testing.assert_close(case.ours(*leaves), case.plain(*leaves), rtol=1e-10, atol=1e-10)


def test_a_jvp_inside_torch_compile(case):
    torch._dynamo.reset()
    leaves = [leaf.detach() for leaf in case.leaves]
    compiled = torch.compile(lambda *x: torch.func.jvp(case.ours, x, tangents(x)), backend="aot_eager")
    if case.op == "concept_loss" and case.backend == "torch":
        expected = torch.func.jvp(case.plain, tuple(leaves), tangents(leaves))
        torch.testing.assert_close(compiled(*leaves), expected, rtol=1e-10, atol=1e-10)
    else:
        with pytest.raises(Exception, match="has no forward-mode derivative"):
            compiled(*leaves)


def test_batched_incoming_gradients(case):
    incoming = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    got, expected = (
        torch.autograd.grad(f(*case.leaves), case.leaves, incoming, is_grads_batched=True)
        for f in (case.ours, case.plain)
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def test_one_tensor_without_data_is_refused(case):
    for index in range(len(case.leaves)):
        leaves = [leaf.detach().to("meta") if i == index else leaf for i, leaf in enumerate(case.leaves)]
        if index == 0 and case.op in ("supervised_linear_cross_entropy", "concept_loss"):
            continue  # the labels follow the first leaf here
        with pytest.raises(ValueError, match=rf"^{case.op} needs all tensors on one device, got .* on meta"):
            case.ours(*leaves)


def test_labels_masks_and_divisors_without_data_are_refused():
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    labels = torch.tensor([1, 4])
    for options in ({"token_weights": torch.ones(2)}, {"num_items": torch.tensor(2.0)}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} on meta"):
            supervised_linear_cross_entropy(hidden, weight, labels, **{name: options[name].to("meta")})
    with pytest.raises(ValueError, match="hidden on cpu, weight on cpu, labels on meta"):
        supervised_linear_cross_entropy(hidden, weight, labels.to("meta"))
    pooled, heads, targets = torch.randn(2, 3), torch.randn(7, 3), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="targets on meta"):
        concept_loss(pooled, heads, None, targets.to("meta"), SIZES)
    for name, value in (("num_items", torch.tensor(2.0)), ("class_weights", torch.ones(7))):
        with pytest.raises(ValueError, match=f"pooled on cpu, {name} on meta"):
            concept_loss(pooled, heads, None, targets, SIZES, **{name: value.to("meta")})
    x, mask = torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="features_mask on meta"):
        concept_pool(torch.randn(3, 4), x, x, x, features_mask=mask)
    with pytest.raises(ValueError, match="features_mask on meta"):
        attention_pool(x, x, torch.randn(12, 4), torch.randn(12), 2, features_mask=mask)


def test_all_on_meta_gives_shapes(case):
    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in case.leaves]
    loss = case.ours(*leaves)
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (), F64)
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert (gradient.device.type, gradient.shape, gradient.dtype) == ("meta", leaf.shape, F64)


def test_fake_tensors_give_shapes(case):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        case.labels, case.targets = mode.from_tensor(case.labels), mode.from_tensor(case.targets)
        leaves = [torch.empty(leaf.shape, dtype=F64, requires_grad=True) for leaf in case.leaves]
        loss = case.ours(*leaves)
        assert (loss.device.type, loss.shape, loss.dtype) == ("cpu", (), F64)
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            assert gradient.shape == leaf.shape


@pytest.mark.gpu
@pytest.mark.parametrize("op", SHAPES)
def test_gpu_a_gradient_penalty_is_right_or_refused(op):
    case = Case(op, "triton")
    leaves = [leaf.detach().to("cuda", torch.float32).requires_grad_() for leaf in case.leaves]
    if not case.twice:
        with refusal(case):
            penalised(case.ours, leaves, 0)
        return
    for g, e in zip(penalised(case.ours, leaves, 0), penalised(case.plain, case.leaves, 0), strict=True):
        torch.testing.assert_close(g.cpu().double(), e, rtol=1e-4, atol=1e-4)

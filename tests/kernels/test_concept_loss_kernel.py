"""concept_loss in Triton against the op's reference in fp64: interpreted without CUDA, compiled with it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils import deterministic

pytest.importorskip("triton")

from psa_kernels import concept_loss as kernels

from psa_fast.ops import concept_loss, reference

TYPE_LEVEL = (7, 4)
CASES = {
    "plain": {},
    "weights": {"class_weights": True},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"class_weights": True, "label_smoothing": 0.3, "ignore_index": 1},
    "number": {"num_items": 7.5},
    "tensor": {"num_items": torch.tensor(3), "label_smoothing": 0.1},
}


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Every torch.empty is full of NaN: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def dtypes(device):
    # on CUDA the kernels are compiled for fp32 at most
    return (torch.float32, 1e-5) if device == "cuda" else (torch.float64, 1e-11)


def make(device, dtype, b, e, sizes=TYPE_LEVEL, ignored=0.3):
    torch.manual_seed(b + e)
    classes = sum(sizes)
    shapes = ((b, e), (classes, e), (classes,))
    tensors = [torch.randn(*s, device=device, dtype=dtype).div(e**0.25).requires_grad_() for s in shapes]
    targets = torch.stack([torch.randint(n, (b,)) for n in sizes], 1)
    targets[torch.rand(targets.shape) < ignored] = -100
    return tensors, targets.to(device)


def check(tensors, targets, sizes=TYPE_LEVEL, tolerance=1e-11, **options):
    """Values and gradients, with every field's own incoming gradient."""
    out = concept_loss(*tensors, targets, sizes, backend="triton", **options)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected = reference.concept_loss(*wide, targets, sizes, **options)
    torch.manual_seed(0)
    incoming = [torch.randn(e.shape, device=e.device, dtype=torch.float64) for e in expected]
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    used, wanted = ([t for t in ts if t is not None] for ts in (tensors, wide))
    got = torch.autograd.grad(out, used, [g.to(o.dtype) for g, o in zip(incoming, out, strict=True)])
    want = torch.autograd.grad(expected, wanted, incoming)
    for g, w, t in zip(got, want, used, strict=True):
        assert g.dtype == t.dtype
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_options(device, case):
    dtype, tolerance = dtypes(device)
    tensors, targets = make(device, dtype, 5, 9)
    options = dict(CASES[case])
    if "class_weights" in options:
        options["class_weights"] = torch.rand(11, device=device) + 0.1
    if isinstance(options.get("num_items"), torch.Tensor):
        options["num_items"] = options["num_items"].to(device)
    targets[targets == -100] = options.get("ignore_index", -100)
    check(tensors, targets, tolerance=tolerance, **options)


# rows: one block is 16 of them here; columns: blocks of 32 (backward) and 128 (forward)
@pytest.mark.parametrize(("b", "e"), [(1, 1), (2, 31), (15, 32), (16, 33), (17, 127), (37, 128), (53, 129), (16, 307)])
def test_shapes_across_block_edges(device, b, e):
    dtype, tolerance = dtypes(device)
    check(*make(device, dtype, b, e), tolerance=tolerance)


@pytest.mark.parametrize("sizes", [(3,), (1, 1), (2, 5, 9, 1), (17,), (33, 31)])
def test_heads(device, sizes):
    dtype, tolerance = dtypes(device)
    tensors, targets = make(device, dtype, 6, 20, sizes)
    items = torch.arange(1, len(sizes) + 1, device=device)
    check(tensors, targets, sizes, tolerance=tolerance)
    check([*tensors[:2], None], targets, sizes, tolerance=tolerance, num_items=items, label_smoothing=0.1)


def test_many_programs_add_up_in_a_fixed_order(device):
    (pooled, weight, bias), targets = make(device, torch.float32, 2100, 4)
    args = pooled.detach(), weight.detach(), bias.detach(), targets, None, None, None, TYPE_LEVEL, 0.0, -100, True
    blocks = (64, 128) if device == "cuda" else (1024, 512)  # the interpreter is slow
    first, second = (kernels.concept_loss_forward(*args, block_rows=blocks[0]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    other = kernels.concept_loss_forward(*args, block_rows=blocks[1])
    torch.testing.assert_close(first, other)
    expected = reference.concept_loss(*(t.double() for t in args[:3]), targets)
    torch.testing.assert_close(first[1].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_gradcheck(device):
    tensors, targets = make(device, torch.float64, 3, 4, (3, 2))

    def run(*tensors):
        return tuple(concept_loss(*tensors, targets, (3, 2), label_smoothing=0.2, backend="triton"))

    if device == "cuda":  # fp64 kernels run in the interpreter only
        with pytest.raises(ValueError, match="no fp64 products"):
            run(*tensors)
    else:
        assert torch.autograd.gradcheck(run, tensors)


def test_one_field_alone_and_expanded_gradients(device):
    dtype, tolerance = dtypes(device)
    tensors, targets = make(device, dtype, 5, 9)
    out = concept_loss(*tensors, targets, backend="triton")
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = reference.concept_loss(*wide, targets)
    fields = (lambda o: o[0], lambda o: o[1][0], lambda o: o[1].sum(), lambda o: o[2].sum(), lambda o: o[2][:, 3].sum())
    for field in fields:  # .sum() hands back a gradient of stride 0
        got = torch.autograd.grad(field(out), tensors, retain_graph=True)
        want = torch.autograd.grad(field(expected), wide, retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed_gets_a_gradient(device, needed):
    dtype, tolerance = dtypes(device)
    tensors, targets = make(device, dtype, 5, 9)
    all_of_them = torch.autograd.grad(concept_loss(*tensors, targets, backend="triton").loss, tensors)
    for i, t in enumerate(tensors):
        t.requires_grad_(i == needed)
    concept_loss(*tensors, targets, backend="triton").loss.backward()
    assert [t.grad is not None for t in tensors] == [i == needed for i in range(3)]
    torch.testing.assert_close(tensors[needed].grad, all_of_them[needed], rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert not concept_loss(*tensors, targets, backend="triton").loss.requires_grad


def test_views(device):
    """Non-contiguous rows and columns, a shared row, a transposed weight, labels that are a misaligned view."""
    dtype, tolerance = dtypes(device)
    (_, weight, bias), targets = make(device, dtype, 6, 10)
    labels = torch.full((6, 3), -100, device=device)
    labels[:, 1:] = targets
    padded = torch.randn(6, 25, device=device, dtype=dtype)
    for view in (padded[:, 5:15], padded[:, :20:2], padded[:1, :10].expand(6, 10), padded[::2, :10].repeat(2, 1)):
        leaf = view.detach().requires_grad_()
        transposed = weight.detach().t().contiguous().t().requires_grad_()
        check([leaf, transposed, bias], labels[:, 1:], tolerance=tolerance)


@pytest.mark.parametrize("num_items", [None, 3, torch.tensor(0.0)])
@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_label_it_is_a_connected_zero(device, rows, num_items):
    tensors, targets = make(device, torch.float32, rows, 9, ignored=1.1)
    out = concept_loss(*tensors, targets, num_items=num_items, label_smoothing=0.1, backend="triton")
    assert out.loss.item() == 0
    assert out.logits.shape == (rows, 11)
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, tensors))


@pytest.mark.parametrize("num_items", [None, 3])
@pytest.mark.parametrize("wrong", [7, -1, 2**40])
def test_a_target_outside_its_head_makes_that_head_nan(device, wrong, num_items):
    tensors, targets = make(device, torch.float32, 5, 9, ignored=0)
    targets[2, 0] = wrong  # 7 is a column of the other head
    out = concept_loss(*tensors, targets, num_items=num_items, backend="triton")
    assert out.loss.isnan()
    assert out.losses.isnan().tolist() == [True, False]
    gradient = torch.autograd.grad(out.loss, tensors[0])[0]
    assert gradient.isnan().all(1).tolist() == [False, False, True, False, False]


def test_extreme_logits_stay_finite(device):
    (pooled, weight, bias), targets = make(device, torch.float32, 5, 9)
    big = (1e6 * pooled.detach()).requires_grad_()
    check([big, weight, bias], targets, tolerance=1e-3 if device == "cuda" else 1e-4)


def test_mixed_dtypes_under_autocast(device):
    (pooled, weight, bias), targets = make(device, torch.float32, 5, 9)
    low = torch.float16
    with torch.autocast(device, dtype=low):
        out = concept_loss(pooled, weight, bias, targets, backend="triton")
        half = concept_loss(pooled.to(low), weight, bias, targets, backend="triton")
    assert torch.equal(out.loss, concept_loss(pooled, weight, bias, targets, backend="triton").loss)
    assert (half.loss.dtype, half.logits.dtype) == (torch.float32, low)
    grads = torch.autograd.grad(half.loss, (pooled, weight, bias))
    assert {g.dtype for g in grads} == {torch.float32}
    for g, r in zip(grads, torch.autograd.grad(out.loss, (pooled, weight, bias)), strict=True):
        torch.testing.assert_close(g, r, rtol=1e-2, atol=1e-2)


def test_what_the_kernels_cannot_do(device):
    tensors, targets = make(device, torch.float32, 2, 4, (70,))
    with pytest.raises(ValueError, match="more than 64 classes"):
        concept_loss(*tensors, targets, (70,), backend="triton")
    assert concept_loss(*tensors, targets, (70,)).loss.isfinite()


def test_zero3_gets_the_parameter_itself_back(device):
    """Under ZeRO-3 only the Parameter object has its data in backward: a saved copy or cast would be stale or large."""
    (pooled, weight, bias), targets = make(device, torch.float32, 3, 5)
    weight = torch.nn.Parameter(weight.detach())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        concept_loss(pooled, weight, bias, targets, backend="triton")
    assert any(t is weight for t in saved)
    shapes = [t.shape for t in saved if t is not weight]
    assert weight.shape not in shapes


def test_opcheck(device):
    tensors, targets = make(device, torch.float32, 5, 9)
    pooled, weight, bias = (t.detach() for t in tensors)
    args = (pooled, weight, bias, targets, torch.ones(11, device=device), None, 3.0, TYPE_LEVEL, 0.1, -100)
    for need_grad in (True, False):
        torch.library.opcheck(torch.ops.psa_fast.concept_loss, (*args, need_grad))
    _, losses, norms, logits, dlogits = torch.ops.psa_fast.concept_loss(*args, True)
    for needs in ([True] * 3, [False, True, False]):
        incoming = (torch.ones((), device=device), losses, logits)
        torch.library.opcheck(
            torch.ops.psa_fast.concept_loss_backward,
            (*incoming, dlogits, norms, pooled, weight, TYPE_LEVEL, torch.float32, needs),
        )


def test_compiles_without_a_graph_break(device):
    tensors, targets = make(device, torch.float32, 5, 9)

    def run(*tensors):
        out = concept_loss(*tensors, targets, label_smoothing=0.1, num_items=3, backend="triton")
        return out.loss + out.logits.mean()

    value = torch.compile(run, fullgraph=True)(*tensors)
    expected = run(*tensors)
    torch.testing.assert_close(value, expected)
    for g, r in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(g, r)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("b", [1, 8, 16, 32, 33, 300])
def test_error_budget_and_determinism(b, dtype, weight_dtype):
    """Error against fp64 at most twice that of eager torch in the same dtype."""
    tensors, targets = make("cuda", dtype, b, 4096)
    targets[0] = 0  # no head without a label: eager would be NaN
    leaves = [tensors[0], *(t.detach().to(weight_dtype or dtype).requires_grad_() for t in tensors[1:])]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    eager = [t.detach().to(dtype).requires_grad_() for t in leaves]

    def run(function, inputs):
        loss, losses, logits = function(inputs)
        return [t.double() for t in (loss, losses, logits, *torch.autograd.grad(loss, inputs))]

    def fused(inputs):
        return concept_loss(*inputs, targets, backend="triton")

    def same_dtype(inputs):
        logits = F.linear(*inputs)
        losses = [
            F.cross_entropy(logits[:, :7].float(), targets[:, 0]),
            F.cross_entropy(logits[:, 7:].float(), targets[:, 1]),
        ]
        return sum(losses), torch.stack(losses), logits

    truth = run(lambda i: reference.concept_loss(*i, targets), wide)
    ours, again, theirs = run(fused, leaves), run(fused, leaves), run(same_dtype, eager)
    # exact fp32 products are added one after the other, where cuBLAS splits the sum: the root of its length counts
    roundings = 4096**0.5 if dtype == torch.float32 else 1
    for x, y, z, t in zip(ours, again, theirs, truth, strict=True):
        assert torch.equal(x, y)
        eps = roundings * torch.finfo(dtype).eps * t.abs().max()
        assert (x - t).abs().max() <= 2 * (z - t).abs().max() + eps

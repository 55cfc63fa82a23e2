"""The supervised language loss against its reference in fp64, and its edge cases."""

import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F

from psa_fast.ops import reference, supervised_linear_cross_entropy

# the package's attribute of this name is the function
module = importlib.import_module("psa_fast.ops.supervised_linear_cross_entropy")

F64 = torch.float64
# on a CPU the "triton" backend is Triton's interpreter
BACKENDS = ["torch", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def inputs(shape=(3, 6), e=5, v=13, device="cpu", dtype=F64, share=0.5):
    torch.manual_seed(2)
    hidden = torch.randn(*shape, e, dtype=F64)
    weight, bias = torch.randn(v, e, dtype=F64), torch.randn(v, dtype=F64)
    labels = torch.randint(0, v, shape).masked_fill(torch.rand(shape) > share, -100)
    labels.view(-1)[:1] = v - 1
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)]
    return *leaves, labels.to(device)


def truth(hidden, weight, bias, labels, **options):
    return reference.supervised_linear_cross_entropy(hidden, weight, labels, bias=bias, **options)


def assert_same(got, expected, wanted, rtol=1e-11, atol=1e-12, factor=3.0):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    gradients = torch.autograd.grad(factor * got, wanted)
    for g, r in zip(gradients, torch.autograd.grad(factor * expected, wanted), strict=True):
        torch.testing.assert_close(g, r, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("num_items", [None, 7.5, torch.tensor(21), torch.tensor(7.0, dtype=F64)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_reference_in_value_and_every_gradient(
    monkeypatch, device, backend, with_bias, weighted, num_items, chunk
):
    if chunk:
        monkeypatch.setattr(module, "_chunk_rows", lambda *_: chunk)
        monkeypatch.setattr(module, "_TILE_ELEMENTS", 13 * 3)  # tiles that do not divide the chunk
    hidden, weight, bias, labels = inputs(device=device)
    bias = bias if with_bias else None
    token_weights = torch.rand(labels.shape, dtype=F64, device=device) if weighted else None
    options = {"token_weights": token_weights, "num_items": num_items}
    got = supervised_linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend, **options)
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    assert_same(got, truth(hidden, weight, bias, labels, **options), wanted)


def test_gradcheck_under_autocast(device, backend):
    hidden, weight, bias, labels = inputs((4,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.autograd.gradcheck(
            lambda h, w, b: supervised_linear_cross_entropy(h, w, labels, bias=b, backend=backend),
            (hidden, weight, bias),
        )


@pytest.mark.parametrize("num_items", [None, torch.tensor(0.0), torch.tensor(0), 0, 5])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (2, 3)])
def test_nothing_supervised_is_a_connected_zero(device, backend, shape, num_items):
    hidden, weight, bias, labels = inputs(shape, device=device)
    labels = torch.full_like(labels, -100)
    loss = supervised_linear_cross_entropy(hidden, weight, labels, bias=bias, num_items=num_items, backend=backend)
    assert loss.item() == 0
    for leaf, g in zip((hidden, weight, bias), torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        assert g.shape == leaf.shape
        assert (g == 0).all()


def test_shifted_views_are_read_in_place(device, backend):
    """labels[:, 1:] is not 16-byte aligned, hidden[:, :-1] is not contiguous."""
    hidden, weight, bias, labels = inputs((3, 7), device=device)
    got = supervised_linear_cross_entropy(hidden[:, :-1], weight, labels[:, 1:], bias=bias, backend=backend)
    assert_same(got, truth(hidden[:, :-1], weight, bias, labels[:, 1:]), (hidden, weight, bias))
    flat = labels.reshape(-1)[1:]  # misaligned and contiguous
    got = supervised_linear_cross_entropy(hidden.reshape(-1, 5)[:-1], weight, flat, backend=backend)
    assert_same(got, truth(hidden.reshape(-1, 5)[:-1], weight, None, flat), (hidden, weight))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
def test_any_number_of_leading_dimensions(device, backend, shape):
    hidden, weight, bias, labels = inputs(shape, device=device)
    strided = torch.stack([hidden, hidden], -1)[..., 0]  # no dimension is contiguous
    got = supervised_linear_cross_entropy(strided, weight, labels, bias=bias, backend=backend)
    assert_same(got, truth(hidden[None], weight, bias, labels[None]), (hidden, weight, bias))


def test_expanded_inputs_and_gradients(device, backend):
    hidden, weight, _, labels = inputs((3, 7), device=device)
    wide = hidden[:1, :1].detach().expand(3, 7, -1).requires_grad_()
    transposed = weight.detach().t().contiguous().t().requires_grad_()
    got = supervised_linear_cross_entropy(wide, transposed, labels, backend=backend)
    expected = truth(wide, transposed, None, labels)
    # .expand().sum() sends an expanded (stride-0) gradient back
    assert_same(got.expand(4).sum(), expected.expand(4).sum(), (wide, transposed))


def test_backward_twice(device, backend):
    hidden, weight, bias, labels = inputs(device=device)
    loss = supervised_linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend)
    first = torch.autograd.grad(2 * loss, (hidden, weight, bias), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_each_gradient_alone(monkeypatch, device, backend, needs):
    monkeypatch.setattr(module, "_chunk_rows", lambda *_: 4)
    *leaves, labels = inputs(device=device)
    leaves = [t if need else t.detach() for t, need in zip(leaves, needs, strict=True)]
    got = supervised_linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], backend=backend)
    assert_same(got, truth(*leaves, labels), [t for t in leaves if t.requires_grad])
    with torch.no_grad():
        quiet = supervised_linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], backend=backend)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, got.detach())


def test_only_supervised_rows_meet_the_head(device, backend):
    """NaN in an unsupervised row reaches neither the loss nor a gradient."""
    hidden, weight, _, labels = inputs(device=device)
    poisoned = hidden.detach().masked_fill((labels == -100)[..., None], float("nan")).requires_grad_()
    loss = supervised_linear_cross_entropy(poisoned, weight, labels, backend=backend)
    torch.testing.assert_close(loss, truth(hidden, weight, None, labels), rtol=1e-12, atol=1e-12)
    for g in torch.autograd.grad(loss, (poisoned, weight)):
        assert torch.isfinite(g).all()


def test_uninitialised_memory_is_never_read(monkeypatch, device, backend):
    monkeypatch.setattr(module, "_chunk_rows", lambda *_: 4)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    hidden, weight, bias, labels = inputs(device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every new tensor with NaN
    try:
        got = supervised_linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend)
        assert_same(got, truth(hidden, weight, bias, labels), (hidden, weight, bias))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [2, 128])
def test_16_bit_is_no_worse_than_eager(monkeypatch, dtype, chunk):
    """Error against fp64 at most twice that of eager in the same dtype; the loss is fp32."""
    monkeypatch.setattr(module, "_chunk_rows", lambda *_: chunk)
    *low, labels = inputs((4, 16), e=32, v=101, dtype=dtype)
    got = supervised_linear_cross_entropy(*low[:2], labels, bias=low[2], backend="torch")
    assert got.dtype == torch.float32
    assert_within_budget(got, low, labels)


@pytest.mark.parametrize("vocabulary", [64, 100, 101])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_lies_behind_a_padded_row_of_16_bits_does_not_count(dtype, vocabulary):
    """torch's own bf16 product on a CPU reads there."""
    *low, labels = inputs((4, 16), e=32, v=vocabulary, dtype=dtype)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        got = supervised_linear_cross_entropy(*low[:2], labels, bias=low[2], backend="torch")
        assert_within_budget(got, low, labels)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_within_budget(got, low, labels):
    exact = [t.detach().double().requires_grad_() for t in low]
    eager = F.cross_entropy((low[0] @ low[1].t() + low[2]).flatten(0, -2), labels.flatten())
    loss = truth(*exact, labels)
    assert (got.double() - loss).abs() <= 2 * (eager.double() - loss).abs() + 1e-5
    gradients = [torch.autograd.grad(*pair) for pair in ((got, low), (eager, low), (loss, exact))]
    for g, e, t in zip(*gradients, strict=True):
        assert g.dtype == e.dtype
        eps = torch.finfo(g.dtype).eps * t.norm()
        assert (g.double() - t).norm() <= 2 * (e.double() - t).norm() + eps


def test_mixed_dtypes_under_autocast(device, backend):
    """An fp32 head under 16-bit hidden states, as autocast leaves them: fp32 gradient; fp32 inputs stay fp32."""
    # the interpreter computes bfloat16 wrongly
    narrow = torch.float16 if backend == "triton" and device == "cpu" else torch.bfloat16
    hidden, weight, bias, labels = inputs(device=device, dtype=torch.float32)
    plain = supervised_linear_cross_entropy(hidden, weight, labels, backend=backend)
    with torch.autocast(device, dtype=narrow):
        auto = supervised_linear_cross_entropy(hidden, weight, labels, backend=backend)
        low = supervised_linear_cross_entropy(hidden.to(narrow), weight, labels, bias=bias, backend=backend)
    assert auto == plain
    assert low.dtype == torch.float32
    low.backward()
    assert (hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.float32,) * 3
    expected = torch.autograd.grad(truth(hidden, weight, bias, labels), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("bad", [-1, 13, 2**40, -101])
def test_a_label_outside_the_vocabulary_is_refused(bad):
    hidden, weight, _, labels = inputs()
    labels[0, 0] = bad
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.12 or -100"):
        supervised_linear_cross_entropy(hidden, weight, labels)
    labels[0, 0] = 255
    supervised_linear_cross_entropy(hidden, weight, labels.where(labels != -100, 255), ignore_index=255)


def test_refuses_shapes_and_dtypes():
    hidden, weight, bias, labels = inputs()
    with pytest.raises(ValueError, match="labels"):
        supervised_linear_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="int64"):
        supervised_linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match="bias"):
        supervised_linear_cross_entropy(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match="weight"):
        supervised_linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="token_weights"):
        supervised_linear_cross_entropy(hidden, weight, labels, token_weights=torch.ones(2))
    with pytest.raises(ValueError, match="backend"):
        supervised_linear_cross_entropy(hidden, weight, labels, backend="cuda")


@pytest.mark.parametrize(("rows", "supervised", "vocabulary", "width"), [(4096, 410, 32064, 1024), (9, 0, 7, 5)])
def test_chunks_cover_the_rows_evenly(rows, supervised, vocabulary, width):
    step = module._chunk_rows(rows, supervised, vocabulary, width, 256)
    assert 1 <= step <= max(256, rows * width // vocabulary)
    assert -(-supervised // step) <= max(1, -(-supervised // 256))
    # 7B: logits of a chunk take no more than hidden's gradient
    assert module._chunk_rows(8192, 8192, 32064, 4096, 256) * 32064 <= 8192 * 4096


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)])
@pytest.mark.parametrize("supervised", [True, False])
def test_opcheck(device, backend, needs, supervised):
    *leaves, labels = inputs((2, 4), device=device)
    leaves = [t.detach().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
    if not supervised:
        labels = torch.full_like(labels, -100)
    hidden, weight, bias = leaves
    args = (hidden, weight, bias, labels, torch.rand(2, 4, dtype=F64, device=device), -100, backend, *needs)
    torch.library.opcheck(module._compiled, args)


def test_compiles_as_one_graph(device, backend):
    torch._dynamo.reset()
    hidden, weight, bias, labels = inputs(device=device, dtype=torch.float32)
    token_weights = torch.rand(labels.shape, device=device)

    def loss(h, w, b, y, t, n):
        h = torch.tanh(h)
        return supervised_linear_cross_entropy(h, w, y, bias=b, token_weights=t, num_items=n, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for y in (labels, labels.roll(1, 0), torch.full_like(labels, -100)):
        for n in (None, torch.tensor(9, device=device)):
            args = (hidden, weight, bias, y, token_weights, n)
            assert_same(compiled(*args), loss(*args), (hidden, weight, bias), rtol=1e-5, atol=1e-6)
    frozen = (hidden, weight.detach(), bias.detach(), labels, token_weights, None)
    assert_same(compiled(*frozen), loss(*frozen), hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_gpu_inductor():
    torch._dynamo.reset()
    hidden, weight, _, labels = inputs(device="cuda", dtype=torch.float32)
    weight = weight.detach()
    got = torch.compile(supervised_linear_cross_entropy, fullgraph=True)(hidden, weight, labels)
    assert_same(got, supervised_linear_cross_entropy(hidden, weight, labels), hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [32064, 32003, 128256])
def test_gpu_error_budget_and_determinism(dtype, vocabulary):
    shape = {"shape": (4, 160), "e": 512, "v": vocabulary, "device": "cuda"}
    *low, labels = inputs(**shape, dtype=dtype)
    low = [t.detach().div(512**0.5 if t.dim() == 2 else 1).requires_grad_() for t in low]
    got = supervised_linear_cross_entropy(*low[:2], labels, bias=low[2], backend="triton")
    again = supervised_linear_cross_entropy(*low[:2], labels, bias=low[2], backend="triton")
    assert torch.equal(got, again)
    twice = [torch.autograd.grad(x, low, retain_graph=True) for x in (got, again)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    assert_within_budget(got, low, labels)


@pytest.mark.gpu
def test_gpu_synchronises_once():
    hidden, weight, bias, labels = inputs(device="cuda", dtype=torch.bfloat16)
    args = {"bias": bias, "token_weights": torch.rand(labels.shape, device="cuda")}
    supervised_linear_cross_entropy(hidden, weight, labels, **args).backward()  # compiles
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            supervised_linear_cross_entropy(hidden, weight, labels, **args).backward()
            supervised_linear_cross_entropy(hidden[:, 1:], weight, labels[:, 1:], num_items=4).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "called a synchronizing" in str(w.message)]) == 2


@pytest.mark.gpu
def test_gpu_memory_is_bounded_by_hiddens_gradient():
    """Frozen head: above the inputs, no more than two gradients of hidden (what Liger's kernel needs)."""
    hidden = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32064, 1024, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(32064, (8192,), device="cuda").masked_fill(torch.rand(8192, device="cuda") > 0.25, -100)
    supervised_linear_cross_entropy(hidden[:512], weight, labels[:512]).backward()  # cuBLAS takes its workspace
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    supervised_linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before <= 2 * hidden.numel() * 2 + (1 << 21)

"""What only a GPU runs, as far as it can be checked without one: tags, choices by device, what kernels are handed."""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F

from psa_fast.ops import supervised_linear_cross_entropy

# the package's attribute of this name is the function
lm_loss = importlib.import_module("psa_fast.ops.supervised_linear_cross_entropy")


def test_the_op_that_synchronises_stays_out_of_cuda_graphs():
    """Inductor partitions its graph around an op with this tag."""
    op = torch.ops.psa_fast.supervised_linear_cross_entropy.default
    assert torch.Tag.cudagraph_unsafe in op.tags
    for name in ("attention_pool", "concept_pool", "concept_loss"):  # these synchronise nowhere
        assert torch.Tag.cudagraph_unsafe not in getattr(torch.ops.psa_fast, name).default.tags


def test_reduce_overhead():
    torch._dynamo.reset()
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in ((6, 5), (9, 5), (9,))]
    labels = torch.tensor([1, -100, 8, 0, -100, 3])

    def loss(hidden, weight, bias):
        return supervised_linear_cross_entropy(hidden, weight, labels, bias=bias)

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        got, expected = compiled(*leaves), F.cross_entropy(F.linear(*leaves), labels)
        torch.testing.assert_close(got, expected)
        for g, e in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize(
    ("device", "capability", "hip", "wide"),
    [
        ("cuda", (9, 0), None, True),
        ("cuda", (8, 0), None, True),
        ("cuda", (7, 5), None, False),
        ("cuda", (7, 0), None, False),
        ("cuda", (9, 4), "6.4", False),
        ("cpu", None, None, False),
        ("xpu", None, None, False),
    ],
)
def test_out_dtype_products_are_left_to_the_devices_that_have_them(monkeypatch, device, capability, hip, wide):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert lm_loss._adds_wide(torch.device(device)) is wide


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tensors are on the CPU here")
@pytest.mark.parametrize("vocabulary", [1, 64, 65, 127])
def test_the_row_kernel_gets_whole_padded_rows(monkeypatch, vocabulary):
    """A width and a stride divisible by 16 and a 16-byte aligned start are what its vector accesses need."""
    kernel, seen = lm_loss._triton_rows_(), []

    def spy(logits, width, labels, loss, *, bias, **options):
        seen.append((logits.shape[1], logits.stride(), logits.data_ptr() % 16, width, bias.shape))
        kernel(logits, width, labels, loss, bias=bias, **options)

    monkeypatch.setattr(lm_loss, "_triton_rows_", lambda: spy)
    monkeypatch.setattr(lm_loss, "_chunk_rows", lambda *_: 2)
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in ((5, 3), (vocabulary, 3), (vocabulary,))]
    labels = torch.randint(vocabulary, (5,))
    got = supervised_linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], backend="triton")
    expected = F.cross_entropy(F.linear(*leaves), labels)
    torch.testing.assert_close(got, expected)
    for g, e in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(g, e)
    assert len(seen) == 3
    for columns, strides, offset, width, bias_shape in seen:
        assert (columns % 16, strides[0] % 16, strides[1], offset, width) == (0, 0, 1, 0, vocabulary)
        assert columns >= vocabulary
        assert bias_shape == (columns,)

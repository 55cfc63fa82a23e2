"""concept_loss in plain torch against F.cross_entropy in fp64, and its edge cases."""

import pytest
import torch
import torch.nn.functional as F

from psa_fast.ops import concept_loss

TARGETS = torch.tensor([[0, 3], [6, -100], [2, 1], [-100, 0], [6, 2]])


def inputs(b=5, e=9, classes=11):
    torch.manual_seed(1)
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((b, e), (classes, e), (classes,))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_head_is_the_cross_entropy_of_its_slice(weighted, smoothing):
    pooled, weight, bias = tensors = inputs()
    w = torch.rand(11, dtype=torch.float64) + 0.1 if weighted else None
    out = concept_loss(pooled, weight, bias, TARGETS, class_weights=w, label_smoothing=smoothing)
    logits = pooled @ weight.t() + bias
    expected = [
        F.cross_entropy(logits[:, s], TARGETS[:, i], None if w is None else w[s], label_smoothing=smoothing)
        for i, s in enumerate((slice(0, 7), slice(7, 11)))
    ]
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.losses, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.loss, sum(expected), rtol=1e-12, atol=1e-12)
    for g, r in zip(torch.autograd.grad(out.loss, tensors), torch.autograd.grad(sum(expected), tensors), strict=True):
        torch.testing.assert_close(g, r, rtol=1e-11, atol=1e-11)
    if w is not None:
        split = concept_loss(pooled, weight, bias, TARGETS, class_weights=[w[:7], w[7:]], label_smoothing=smoothing)
        torch.testing.assert_close(split.losses, out.losses)


def test_one_weighted_head_beside_a_plain_one():
    pooled, weight, _ = inputs()
    w = torch.rand(4) + 0.1
    out = concept_loss(pooled, weight, None, TARGETS, class_weights=[None, w])
    logits = pooled @ weight.t()
    torch.testing.assert_close(out.losses[0], F.cross_entropy(logits[:, :7], TARGETS[:, 0]))
    torch.testing.assert_close(out.losses[1], F.cross_entropy(logits[:, 7:], TARGETS[:, 1], w.double()))
    plain = concept_loss(pooled, weight, None, TARGETS, class_weights=[None, None])
    assert torch.equal(plain.losses, concept_loss(pooled, weight, None, TARGETS).losses)


@pytest.mark.parametrize(
    "field", [lambda o: o.loss, lambda o: o.losses[1], lambda o: o.logits.square(), lambda o: o.losses]
)
def test_gradcheck_of_every_field(field):
    def run(*tensors):
        return field(concept_loss(*tensors, TARGETS, label_smoothing=0.2))

    assert torch.autograd.gradcheck(run, inputs())


def test_num_items():
    tensors = inputs()
    mean = concept_loss(*tensors, TARGETS).losses
    for items in (8, 8.0, torch.tensor(8), torch.tensor([8.0, 8.0])):
        torch.testing.assert_close(concept_loss(*tensors, TARGETS, num_items=items).losses, mean * 4 / 8)
    each = concept_loss(*tensors, TARGETS, num_items=torch.tensor([2, 8])).losses
    torch.testing.assert_close(each, mean * torch.tensor([2.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("num_items", [None, 3, torch.tensor(0.0)])
@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_label_it_is_a_connected_zero(rows, num_items):
    tensors = inputs(b=rows)
    out = concept_loss(*tensors, torch.full((rows, 2), -100), num_items=num_items)
    assert out.loss.item() == 0
    assert out.logits.shape == (rows, 11)
    for g in torch.autograd.grad(out.loss, tensors):
        assert (g == 0).all()


def test_targets_whose_class_weighs_nothing_are_a_zero_too():
    tensors = inputs()
    out = concept_loss(*tensors, TARGETS, class_weights=torch.zeros(11), label_smoothing=0.1)
    assert out.loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, tensors))


def test_under_autocast_it_stays_in_the_inputs_dtype():
    tensors = [t.detach().float() for t in inputs()]
    plain = concept_loss(*tensors, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = concept_loss(*tensors, TARGETS)
    assert auto.loss == plain.loss
    low = concept_loss(tensors[0].bfloat16(), *tensors[1:], TARGETS)
    assert (low.loss.dtype, low.logits.dtype) == (torch.float32, torch.bfloat16)


def test_refusals():
    pooled, weight, bias = inputs()
    with pytest.raises(ValueError, match="weight"):
        concept_loss(pooled, weight[:10], bias, TARGETS)
    with pytest.raises(ValueError, match="bias"):
        concept_loss(pooled, weight, bias[:10], TARGETS)
    with pytest.raises(ValueError, match="targets"):
        concept_loss(pooled, weight, bias, TARGETS[:, 0])
    with pytest.raises(ValueError, match="int64"):
        concept_loss(pooled, weight, bias, TARGETS.float())
    with pytest.raises(ValueError, match="class_weights"):
        concept_loss(pooled, weight, bias, TARGETS, class_weights=torch.ones(7))
    with pytest.raises(ValueError, match="num_items"):
        concept_loss(pooled, weight, bias, TARGETS, num_items=torch.ones(3))
    with pytest.raises(ValueError, match="backend"):
        concept_loss(pooled, weight, bias, TARGETS, backend="cuda")


@pytest.mark.parametrize("wrong", [7, -1])
def test_a_target_outside_its_head_is_refused(wrong):
    targets = TARGETS.clone()
    targets[0, 0] = wrong  # 7 is a column of the other head
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        concept_loss(*inputs(), targets)


def test_compiles_without_a_graph_break():
    tensors = [t.detach().float().requires_grad_() for t in inputs()]

    def run(*tensors):
        out = concept_loss(*tensors, TARGETS, label_smoothing=0.1)
        return out.loss + out.logits.mean()

    value = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    expected = run(*tensors)
    torch.testing.assert_close(value, expected)
    for g, r in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(g, r)

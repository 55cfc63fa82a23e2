"""The bottleneck on grids of different sizes: each as alone, whatever lies in the box beside it; squares as ever."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from psa_fast.models import PsaConfig, SafetyProjector
from psa_fast.models.bottleneck import ConceptBottleneck
from psa_fast.models.grids import Box

GRIDS = [(3, 5), (8, 2), (4, 4), (1, 1)]
CELLS = [h * w for h, w in GRIDS]


def filled(module):
    """fp64, with norms and biases that are not at their start: padded cells must not be zero by luck."""
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return module.double()


def channels_first(block, x):
    """A block on one grid [1, C, h, w] in torch's own convolutions."""
    norm = lambda y, of: F.layer_norm(y.movedim(1, -1), of.weight.shape, of.weight, of.bias, of.eps).movedim(-1, 1)  # noqa: E731
    one = lambda y, of: F.conv2d(y, of.weight[:, :, None, None], of.bias)  # noqa: E731
    y = F.silu(norm(one(x, block.conv1), block.norm1))
    y = F.silu(norm(F.conv2d(y, block.conv2.weight, padding=1, groups=y.shape[1]), block.norm2))
    y = y * torch.sigmoid(one(F.silu(one(F.adaptive_avg_pool2d(y, 1), block.se.fc1)), block.se.fc2))
    y = norm(one(y, block.conv3), block.norm3)
    skip = x if isinstance(block.downsample, nn.Identity) else norm(one(x, block.downsample[0]), block.downsample[1])
    return F.silu(y + skip)


def alone(projector, x, grid):
    y = x.T.reshape(1, -1, *grid)
    for block in [*projector.stage1, *projector.stage2]:
        y = channels_first(block, y)
    return y.flatten(2)[0].T @ projector.expand.weight.T


def test_each_grid_comes_out_as_alone_with_its_gradients():
    torch.manual_seed(0)
    projector = filled(SafetyProjector(12, 10, width=20, depth=2))
    x = torch.randn(sum(CELLS), 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(CELLS), 10, dtype=torch.float64)
    inputs = [x, *projector.parameters()]
    out = projector(x, GRIDS)
    expected = torch.cat([alone(projector, part, grid) for part, grid in zip(x.split(CELLS), GRIDS, strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_bit_equal(dtype):
    torch.manual_seed(0)
    projector = SafetyProjector(12, 10, width=20, depth=1).to(dtype)
    x = torch.randn(3, 16, 12, dtype=dtype)
    assert torch.equal(projector(x, None).flatten(0, 1), projector(x.flatten(0, 1), [(4, 4)] * 3))


def test_the_pool_takes_rows_of_grids():
    """Rows of two grids, one and none, masked by cell: as each row by itself without a mask."""
    torch.manual_seed(0)
    config = PsaConfig(vision_hidden_size=12, hidden_size=40, image_tokens=16, num_attention_heads=5)
    bottleneck = filled(ConceptBottleneck(config))
    x, query = torch.randn(sum(CELLS), 12, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    rows = bottleneck.project(x, GRIDS).split([sum(CELLS[:2]), sum(CELLS[2:]), 0])
    padded = pad_sequence(rows, batch_first=True, padding_value=7.0)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    pooled = bottleneck.pool(padded, query, mask)
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            pooled[i : i + 1], bottleneck.pool(row[None], query[i : i + 1]), rtol=1e-11, atol=1e-11
        )


def test_low_precision_means_keep_their_range():
    """A sum of fp16 values beyond fp16's largest still has a mean."""
    box = Box([(20, 20), (1, 1)])
    laid = box.lay(torch.full((401, 2), 300.0, dtype=torch.float16))
    assert box.mean(laid).tolist() == [[300.0, 300.0]] * 2


def test_refusals():
    for grids in ([], [(2, 0)]):
        with pytest.raises(ValueError, match="at least one cell"):
            Box(grids)
    with pytest.raises(ValueError, match="6 cells"):
        SafetyProjector(12, 10, width=20, depth=1)(torch.randn(5, 12), [(2, 3)])

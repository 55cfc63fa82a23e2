"""Clipping part by part against torch's own clipping of each part; whole runs are in test_objectives and test_runs."""

import torch

from psa_fast.training.clipping import clip_each


def test_each_group_is_clipped_by_its_own_norm():
    torch.manual_seed(0)
    groups = [[torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))] for _ in range(3)]
    for group, size in zip(groups, (10.0, 1.0, 0.01), strict=True):
        for p in group:
            p.grad = torch.randn_like(p) * size
    reference = [[torch.nn.Parameter(p.detach().clone()) for p in group] for group in groups]
    for group, copies in zip(groups, reference, strict=True):
        for p, copy in zip(group, copies, strict=True):
            copy.grad = p.grad.clone()
    expected = torch.stack([torch.nn.utils.clip_grad_norm_(group, 0.5) for group in reference])
    torch.testing.assert_close(clip_each(groups, 0.5), expected)
    assert expected[0] > 0.5 > expected[2]
    for group, copies in zip(groups, reference, strict=True):
        for p, copy in zip(group, copies, strict=True):
            torch.testing.assert_close(p.grad, copy.grad, rtol=1e-5, atol=1e-8)

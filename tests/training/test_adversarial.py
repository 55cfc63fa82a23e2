"""PGD on towers whose worst picture is known in closed form."""

from types import SimpleNamespace

import pytest
import torch

from psa_fast.training.adversarial import PixelScale, attack, feature_distance

MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.27, 0.28]
PROCESSOR = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD}


@pytest.fixture
def scale():
    return PixelScale.of(SimpleNamespace(**PROCESSOR))


def normalised(bytes_):
    return (bytes_ / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def as_bytes(pixels):
    return (pixels.double() * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)) * 255


def test_a_linear_loss_reaches_its_maximum_and_stays_a_picture(scale):
    torch.manual_seed(0)
    clean, weight = torch.randint(0, 256, (4, 3, 5, 5)).float(), torch.randn(4, 3, 5, 5)
    found = as_bytes(attack(normalised(clean), lambda x: x * weight, scale, eps=8, steps=3))
    best = (clean + 8 * weight.sign()).clamp(0, 255)
    torch.testing.assert_close(found, best.double(), atol=1e-3, rtol=0)


def test_the_features_of_a_linear_tower_go_as_far_as_they_can(scale):
    torch.manual_seed(0)
    rows = torch.rand(6, 27) + 0.1  # all positive: the farthest corner is all +eps or all -eps
    clean = normalised(torch.full((3, 3, 3, 3), 128.0))

    def tower(x):
        return (x.flatten(1) @ rows.T).unsqueeze(1)

    original = tower(clean)
    attacked = attack(clean, lambda x: feature_distance(tower(x), original), scale, eps=4, steps=10)
    shift = rows.double() @ (4 / 255 / torch.tensor(STD).double()).repeat_interleave(9)
    best = shift.square().mean() / original.double().var(correction=0)
    got = feature_distance(tower(attacked), original)
    torch.testing.assert_close(got.double(), best.expand(3), rtol=1e-3, atol=0)


def test_without_steps_it_is_noise_of_whole_steps_within_the_budget(scale):
    clean = torch.full((2, 3, 8, 8), 100.0)
    noise = as_bytes(attack(normalised(clean), lambda x: x, scale, eps=2.7, steps=0)) - clean
    torch.testing.assert_close(noise, noise.round(), atol=1e-3, rtol=0)
    assert noise.round().abs().max() == 2
    assert noise.round().unique().numel() == 5


def test_one_seed_gives_one_picture_and_parameters_get_no_gradient(scale):
    layer, clean = torch.nn.Conv2d(3, 2, 3), normalised(torch.full((1, 3, 6, 6), 90.0))

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return attack(clean, lambda x: layer(x).square(), scale, 8, 1, step_size=1.0, generator=generator)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert all(p.grad is None for p in layer.parameters())


def test_a_processor_without_a_known_scale_is_refused():
    with pytest.raises(ValueError, match="rescales pixels by 1/255"):
        PixelScale.of(SimpleNamespace(**{**PROCESSOR, "rescale_factor": 1 / 127.5}))

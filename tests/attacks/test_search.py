"""The searches on losses whose answer is known."""

import math

import pytest
import torch

from psa_fast.attacks.search import Found, checkpoints, noise, search, square

SHAPE = (1, 3, 6, 6)


@pytest.fixture
def linear():
    """A linear head on 8 pictures: weights, pictures, and an objective that succeeds below zero."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8, *SHAPE), generator=g, dtype=torch.uint8)
    weights = torch.randn(8, *SHAPE, generator=g)
    bias = 5.0 * torch.rand(8, generator=g)
    bias = bias - (weights * pictures / 255).flatten(1).sum(1)  # clean loss 0 to 5

    def objective(rows, x):
        loss = (weights[rows] * x).flatten(1).sum(1) + bias[rows]
        return loss, loss < 0

    return weights, pictures, objective


def optimum(weights, pictures, eps):
    """The picture in the ball with the least loss, in closed form."""
    return (pictures.float() - eps * weights.sign()).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("method", ["apgd", "pgd"])
@pytest.mark.parametrize("eps", [1, 3, 8])
def test_the_optimum_of_a_linear_head_is_reached(linear, method, eps):
    weights, pictures, objective = linear
    found = search(lambda r, x: (objective(r, x)[0], r < 0), pictures, eps, 40, method=method)  # never satisfied
    best = objective(torch.arange(8), optimum(weights, pictures, eps).float() / 255)[0]
    torch.testing.assert_close(found.loss, best, rtol=0, atol=1e-3)
    assert torch.equal(found.pictures, optimum(weights, pictures, eps))
    assert (found.steps == 41).all()  # a look at the start and forty steps


@pytest.mark.parametrize("eps", [0, 1, 2, 4, 8, 16, 255])
def test_success_is_what_the_closed_form_allows(linear, eps):
    weights, pictures, objective = linear
    possible = objective(torch.arange(8), optimum(weights, pictures, eps).float() / 255)[1]
    found = search(objective, pictures, eps, 30)
    assert torch.equal(found.success, possible)
    assert torch.equal(objective(torch.arange(8), found.pictures.float() / 255)[1], possible)
    if eps in (4, 8):
        assert 0 < possible.sum() < 8  # else the test would tell nothing


@pytest.mark.parametrize("attack", [search, square, noise])
@pytest.mark.parametrize("eps", [0, 0.9, 1, 5.5, 255])
def test_pictures_stay_in_the_ball_and_on_the_grid(linear, attack, eps):
    _, pictures, objective = linear
    found = attack(lambda r, x: (objective(r, x)[0], r < 0), pictures, eps, 12)
    assert found.pictures.dtype == torch.uint8
    assert (found.pictures.int() - pictures.int()).abs().max() <= eps
    assert (eps < 1) == torch.equal(found.pictures, pictures)


def test_objectives_see_only_8_bit_pictures_in_the_ball(linear):
    _, pictures, objective = linear

    def watched(rows, x):
        value = x.detach() * 255
        torch.testing.assert_close(value, value.round(), rtol=0, atol=1e-4)
        assert (value - pictures[rows]).abs().max() <= 3 + 1e-4
        return objective(rows, x)

    for attack in (search, square, noise):
        attack(watched, pictures, 3, 10)


def test_rows_that_are_there_leave_the_batch(linear):
    _, pictures, objective = linear
    seen = []

    def counted(rows, x):
        seen.append(rows.tolist())
        return objective(rows, x)

    found = search(counted, pictures, 8, 30, restarts=2, batch_size=100)
    counts = [sum(row in rows for rows in seen[1:]) for row in range(8)]  # the first look costs no gradient
    assert counts == found.steps.tolist()
    assert all(count < 62 for count, done in zip(counts, found.success.tolist(), strict=True) if done)
    assert {count for count, done in zip(counts, found.success.tolist(), strict=True) if not done} == {62}


def test_a_picture_that_needs_no_attack_costs_nothing(linear):
    _, pictures, objective = linear
    found = search(lambda r, x: (objective(r, x)[0], r >= 0), pictures, 8, 30)
    assert found.success.all()
    assert torch.equal(found.pictures, pictures)
    assert not found.steps.any()


@pytest.mark.parametrize("attack", [search, noise, square])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_batch_size(linear, attack):
    _, pictures, objective = linear
    whole = attack(objective, pictures, 4, 10, batch_size=8)
    few = attack(objective, pictures[:3], 4, 10, batch_size=2)
    assert torch.equal(few.pictures, whole.pictures[:3])
    assert torch.equal(few.steps, whole.steps[:3])
    if attack is not search:  # which finds the one optimum from everywhere
        assert not torch.equal(attack(objective, pictures, 4, 10, seed=1).pictures, whole.pictures)


def test_restarts_go_on_with_what_is_left():
    """A loss with a flat basin: some starts fail, and each further start can only add."""
    g = torch.Generator().manual_seed(1)
    pictures = torch.full((60, 1, 3, 2, 2), 128, dtype=torch.uint8)
    side = torch.randn(60, 1, 3, 2, 2, generator=g)

    def objective(rows, x):
        at = ((x * 255 - 128) * side[rows]).flatten(1).sum(1)
        loss = torch.where(at > 0, 20 - at, -at.abs().sqrt())  # two ways down, of which one ends above zero
        loss = torch.where(at > 0, loss, 1 + torch.exp(at / 10))
        return loss, loss < 0

    shares = [search(objective, pictures, 16, 20, restarts=n).success.sum().item() for n in (1, 3, 8)]
    assert shares[0] < shares[1] <= shares[2]


def test_checkpoints_are_the_papers():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_saturation_hides_cross_entropy_but_no_margin():
    """What the margins are for: heads that are sure by 400 nats, whose cross-entropy in float32 is flat."""
    g = torch.Generator().manual_seed(2)
    pictures = torch.randint(60, 196, (10, *SHAPE), generator=g, dtype=torch.uint8)
    weight = torch.randn(2, *SHAPE, generator=g)
    centre = (pictures / 255 * (weight[0] - weight[1])).flatten(1).sum(1)
    scale = 400 / (8 / 255 * (weight[0] - weight[1]).abs().sum() / 2)

    def logits(rows, x):
        at = (x * (weight[0] - weight[1])).flatten(1).sum(1) - centre[rows]
        margin = 400 + scale * at  # 0 at half of what the ball of 8 allows
        return torch.stack([margin / 2, -margin / 2], 1)

    def by_margin(rows, x):
        z = logits(rows, x)
        return z[:, 0] - z[:, 1], z[:, 0] < z[:, 1]

    def by_entropy(rows, x):  # raise the loss of the label
        z = logits(rows, x)
        return z.softmax(1)[:, 0].log(), z[:, 0] < z[:, 1]

    assert search(by_margin, pictures, 8, 20).success.all()
    assert search(by_entropy, pictures, 8, 20).success.sum() < 10


def test_square_finds_more_than_noise_and_less_than_the_gradient(linear):
    _, pictures, objective = linear
    loose = lambda r, x: (objective(r, x)[0], r < 0)  # noqa: E731
    by_gradient = search(loose, pictures, 8, 20).loss
    by_square = square(loose, pictures, 8, 300).loss
    by_noise = noise(loose, pictures, 8, 5).loss
    assert (by_gradient < by_square).all()
    assert (by_square < by_noise).all()


@pytest.mark.parametrize(
    ("eps", "steps", "restarts", "message"),
    [
        (-1, 5, 1, "eps is -1"),
        (256, 5, 1, "eps"),
        (4, 0, 1, "steps is 0"),
        (4, 5, 0, "restarts"),
        (4, True, 1, "steps"),
    ],
)
def test_a_budget_that_is_none_is_refused(linear, eps, steps, restarts, message):
    _, pictures, objective = linear
    with pytest.raises(ValueError, match=message):
        search(objective, pictures, eps, steps, restarts)


def test_nothing_to_attack():
    found = search(lambda r, x: (x.flatten(1).sum(1), r < 0), torch.zeros(0, *SHAPE, dtype=torch.uint8), 4, 5)
    assert isinstance(found, Found)
    assert len(found.pictures) == 0


def test_as_strong_as_a_kept_library():
    """adv-lib's APGD (cross-entropy) on a small network, with float pixels: ours, on 8-bit pictures, does as well."""
    attacks = pytest.importorskip("adv_lib.attacks", exc_type=ImportError)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 100, 32),
        torch.nn.ReLU(), torch.nn.Linear(32, 4),
    )  # fmt: skip
    pictures = torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8)
    labels = net(pictures / 255).argmax(1)

    def objective(rows, x):
        z = net(x)
        own = z.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
        margin = own - z.scatter(1, labels[rows].unsqueeze(1), -math.inf).amax(1)
        return margin, margin < 0

    shares = {}
    for eps in (2, 4, 8):
        theirs = attacks.apgd(net, pictures / 255, labels, eps=eps / 255, norm=math.inf, n_iter=30)
        ours = search(objective, pictures, eps, 30, batch_size=64)
        shares[eps] = ((net(theirs).argmax(1) != labels).float().mean().item(), ours.success.float().mean().item())
        assert torch.equal(net(ours.pictures / 255).argmax(1) != labels, ours.success)
    assert any(0.1 < their < 0.9 for their, _ in shares.values())  # else the comparison would tell nothing
    assert all(our >= their - 0.05 for their, our in shares.values()), shares

"""Searches for a small change of many pictures at once that brings a loss down: APGD, PGD, Square, random noise.

They know nothing of guards: an objective gives each row's loss and whether it is there already. All of them look only
at 8-bit pictures inside the ball, since that is what a file can hold; gradients pass the rounding unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

#: rows int64 [b] and their pixels float [b, ...] in 0..1 -> loss [b], to be made small, and success bool [b]
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Method = Literal["apgd", "pgd"]
#: rows that are differentiated together, unless the caller knows better
BATCH = 16
MOMENTUM = 0.75
RHO = 0.75  # of the steps since the last checkpoint, the share that must have made the loss smaller


@dataclass
class Found:
    """What a search has found for each of its B rows.

    Attributes:
        pictures: uint8 [B, ...], the successful one, else the one with the least loss.
        loss: float [B], of that picture.
        success: bool [B], by the objective.
        steps: int64 [B], gradients (or queries) spent on the row.
    """

    pictures: Tensor
    loss: Tensor
    success: Tensor
    steps: Tensor


def checkpoints(steps: int) -> list[int]:
    """The steps after which APGD looks back (Croce & Hein 2020, arXiv 2003.01690, section 3)."""
    places, before = [22], 0  # in hundredths: .57 of 100 steps must not become 58
    while places[-1] < 100:
        last = places[-1]
        places.append(last + max(last - before - 3, 6))
        before = last
    return sorted({-(-place * steps // 100) for place in places if place <= 100})


def search(
    objective: Objective,
    pictures: Tensor,
    eps: float,
    steps: int,
    restarts: int = 1,
    seed: int = 0,
    method: Method = "apgd",
    batch_size: int = BATCH,
    step_size: float | None = None,
) -> Found:
    """White-box search in the L_inf ball of `eps` / 255 around each picture; a row that is there leaves the batch.

    Args:
        objective: called with a graph; its second result is believed, so it must be as strict as what decides later.
        pictures: uint8 [B, ...].
        eps: in 255ths; only whole steps of the 8-bit grid count. 255 is no limit.
        steps: gradient steps of each restart.
        restarts: random starts; the first look is always at the picture itself, and counts for nothing.
        seed: of the starts. A row's depend on its place, not on the others.
        method: "apgd" (momentum, step halved at checkpoints, back to the best) or "pgd" (a fixed step).
        batch_size: rows that are differentiated together.
        step_size: in 255ths; None: 2 eps, or 2.5 eps / steps (.5 at least) for "pgd".

    Raises ValueError for a negative eps and for no step or restart.
    """
    check(eps, steps, restarts)
    ball = _Ball(pictures, eps)
    found = look(objective, pictures, batch_size)
    if ball.eps == 0:
        return found
    if step_size is None:
        step_size = 2.0 * ball.eps if method == "apgd" else max(2.5 * ball.eps / steps, 0.5)
    for restart in range(restarts):
        rows = (~found.success).nonzero().flatten()
        if len(rows):
            start = ball.sample(rows, seed, restart)
            _descend(objective, ball, rows, start, steps, method, step_size, batch_size, found)
    return found


class _Ball:
    """The pictures within eps of given ones, on the 8-bit grid: values 0..255 as float32."""

    def __init__(self, pictures: Tensor, eps: float) -> None:
        self.eps = math.floor(eps)
        self.centre = pictures.float()

    def project(self, rows: Tensor, x: Tensor) -> Tensor:
        centre = self.centre[rows]
        return x.clamp(min=0.0, max=255.0).maximum(centre - self.eps).minimum(centre + self.eps)

    def sample(self, rows: Tensor, seed: int, restart: int) -> Tensor:
        return self.project(rows, self.centre[rows] + self.eps * (2 * self._random(rows, seed, restart) - 1))

    def signs(self, rows: Tensor, seed: int, draw: int) -> Tensor:
        signs = (self._random(rows, seed, draw) < 0.5).float() * 2 - 1
        return self.project(rows, self.centre[rows] + self.eps * signs)

    def _random(self, rows: Tensor, seed: int, number: int) -> Tensor:
        shape = self.centre.shape[1:]
        return torch.stack([torch.rand(shape, generator=generator(seed, number, int(row))) for row in rows])


def generator(seed: int, number: int, row: int) -> torch.Generator:
    """Of one row's random numbers, which are the same whatever else is in the batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 1_000_003 + row)


@dataclass
class _State:
    """One restart: of each active row its place, pixels (0..255), and what APGD remembers."""

    rows: Tensor
    x: Tensor
    before: Tensor
    loss: Tensor
    grad: Tensor
    best: Tensor
    best_loss: Tensor
    best_grad: Tensor
    size: Tensor
    gains: Tensor  # steps since the last checkpoint that made the loss smaller
    best_then: Tensor  # best loss at the last checkpoint
    halved: Tensor  # whether the step was halved there

    def advance(self, x: Tensor, loss: Tensor, grad: Tensor) -> None:
        """Take a step to `x`."""
        self.gains = self.gains + (loss < self.loss)
        self.before, self.x, self.loss, self.grad = self.x, x, loss, grad
        better = loss < self.best_loss
        wide = better.view(-1, *[1] * (x.dim() - 1))
        self.best = torch.where(wide, x, self.best)
        self.best_grad = torch.where(wide, grad, self.best_grad)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def look_back(self, interval: int) -> None:
        """A checkpoint: where the last steps did little, halve the step and go back to the best."""
        stalled = ~self.halved & (self.best_loss >= self.best_then)
        halve = (self.gains < RHO * interval) | stalled
        wide = halve.view(-1, *[1] * (self.x.dim() - 1))
        self.size = torch.where(halve, self.size / 2, self.size)
        self.x, self.before = torch.where(wide, self.best, self.x), torch.where(wide, self.best, self.before)
        self.grad = torch.where(wide, self.best_grad, self.grad)
        self.loss = torch.where(halve, self.best_loss, self.loss)
        self.halved, self.best_then, self.gains = halve, self.best_loss, torch.zeros_like(self.gains)

    def keep(self, which: Tensor) -> None:
        """Forget the rows that are not in `which`, bool [b]."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[which])


def _descend(
    objective: Objective,
    ball: _Ball,
    rows: Tensor,
    x: Tensor,
    steps: int,
    method: Method,
    step_size: float,
    batch_size: int,
    found: Found,
) -> None:
    """One restart from `x`; what it finds is written to `found`."""
    loss, grad, success = _gradient(objective, rows, x, batch_size)
    size, none = torch.full_like(loss, step_size), torch.zeros_like(success)
    state = _State(rows, x, x, loss, grad, x, loss, grad, size, torch.zeros_like(rows), loss, none)
    _record(found, state, success)
    looks = set(checkpoints(steps)) if method == "apgd" else set()
    last_look = 0
    for step in range(steps):
        if not len(state.rows):
            return
        wide = state.size.view(-1, *[1] * (x.dim() - 1))
        moved = ball.project(state.rows, state.x - wide * state.grad.sign())
        if method == "apgd" and step:
            mixed = state.x + MOMENTUM * (moved - state.x) + (1 - MOMENTUM) * (state.x - state.before)
            moved = ball.project(state.rows, mixed)
        loss, grad, success = _gradient(objective, state.rows, moved, batch_size)
        state.advance(moved, loss, grad)
        _record(found, state, success)
        if step + 1 in looks:
            state.look_back(step + 1 - last_look)
            last_look = step + 1


def _record(found: Found, state: _State, success: Tensor) -> None:
    """Write down what is better than before; rows that have succeeded leave."""
    rows = state.rows
    found.steps[rows] += 1
    better = success | (state.loss < found.loss[rows])
    found.pictures[rows[better]] = state.x[better].round().to(torch.uint8)
    found.loss[rows[better]] = state.loss[better]
    found.success[rows] = success
    if bool(success.any()):
        state.keep(~success)


def _gradient(objective: Objective, rows: Tensor, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [b], its gradient and success [b] at the rounded pixels: the gradient passes the rounding unchanged."""
    losses, gradients, successes = [], [], []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        leaf = x[part].round().requires_grad_()
        loss, success = objective(rows[part], leaf / 255)
        gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
        losses.append(loss.detach().float())
        successes.append(success.detach())
    return torch.cat(losses), torch.cat(gradients), torch.cat(successes)


@torch.no_grad()
def look(objective: Objective, pictures: Tensor, batch_size: int = BATCH, rows: Tensor | None = None) -> Found:
    """Loss and success of pictures uint8 [B, ...] as they are, which costs no step.

    `rows` int64 [B]: what the objective calls them; None: 0 to B - 1.
    """
    rows = torch.arange(len(pictures)) if rows is None else rows
    losses, successes = [], []
    for start in range(0, len(pictures), batch_size):
        part = slice(start, start + batch_size)
        loss, success = objective(rows[part], pictures[part].float() / 255)
        losses.append(loss.float())
        successes.append(success)
    empty = torch.zeros(0)
    return Found(
        pictures.clone(),
        torch.cat(losses) if losses else empty,
        torch.cat(successes) if successes else empty.bool(),
        torch.zeros(len(pictures), dtype=torch.int64),
    )


def noise(
    objective: Objective, pictures: Tensor, eps: float, draws: int = 5, seed: int = 0, batch_size: int = BATCH
) -> Found:
    """The control: random signs of the same eps, the best of `draws`; arguments as for `search`.

    The picture as it came is not among the draws, so a row that needs no attack may still fail.
    """
    check(eps, draws, 1)
    ball = _Ball(pictures, eps)
    rows = torch.arange(len(pictures))
    found = Found(pictures.clone(), torch.full((len(rows),), math.inf), rows < 0, torch.zeros_like(rows))
    for draw in range(draws):
        rows = (~found.success).nonzero().flatten()
        if len(rows):
            _take_over(found, rows, look(objective, ball.signs(rows, seed, draw).to(torch.uint8), batch_size, rows))
    return found


def square(
    objective: Objective,
    pictures: Tensor,
    eps: float,
    queries: int = 500,
    seed: int = 0,
    share: float = 0.3,
    batch_size: int = BATCH,
) -> Found:
    """Square attack (Andriushchenko et al. 2020, arXiv 1912.00049), L_inf: random search without a gradient.

    Stripes first, then squares of one colour whose area shrinks from `share` of the picture by the paper's schedule
    (scaled to `queries`); a square stays if it makes the loss smaller. Arguments and errors as for `search`; pictures
    are uint8 [B, ..., 3, H, W], and a square is in one of a row's.
    """
    check(eps, queries, 1)
    ball = _Ball(pictures, eps)
    found = look(objective, pictures, batch_size)
    if ball.eps == 0:
        return found
    generators = [generator(seed, 0, row) for row in range(len(pictures))]
    height, width = pictures.shape[-2:]
    flat = pictures.view(len(pictures), -1, *pictures.shape[-3:])
    for query in range(queries):
        rows = (~found.success).nonzero().flatten()
        if not len(rows):
            break
        side = max(1, min(height, width, round(math.sqrt(_area(query, queries, share) * height * width))))
        tried = found.pictures[rows].view(len(rows), *flat.shape[1:]).float()
        for index, row in enumerate(rows.tolist()):
            random = generators[row]
            centre = flat[row].float()
            if query == 0:
                signs = torch.randint(0, 2, (*centre.shape[:2], 1, width), generator=random) * 2 - 1
                tried[index] = centre + ball.eps * signs
                continue
            which = int(torch.randint(0, len(centre), (1,), generator=random))
            top = int(torch.randint(0, height - side + 1, (1,), generator=random))
            left = int(torch.randint(0, width - side + 1, (1,), generator=random))
            signs = torch.randint(0, 2, (3, 1, 1), generator=random) * 2 - 1
            spot = (which, slice(None), slice(top, top + side), slice(left, left + side))
            tried[index][spot] = centre[spot] + ball.eps * signs
        tried = tried.clamp(0, 255).to(torch.uint8).view(len(rows), *pictures.shape[1:])
        _take_over(found, rows, look(objective, tried, batch_size, rows))
    return found


def _area(query: int, queries: int, share: float) -> float:
    """Share of the picture that a square covers."""
    at = query / queries * 10_000
    return share / 2 ** sum(at > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def _take_over(found: Found, rows: Tensor, tried: Found) -> None:
    found.steps[rows] += 1
    better = tried.success | (tried.loss < found.loss[rows])
    for into, new in ((found.pictures, tried.pictures), (found.loss, tried.loss), (found.success, tried.success)):
        into[rows[better]] = new[better]


def check(eps: float, steps: int, restarts: int) -> None:
    """Raise ValueError for a budget that is none."""
    if not 0 <= eps <= 255:
        raise ValueError(f"eps is {eps}; expected 0 to 255, in 255ths")
    for name, value in (("steps", steps), ("restarts", restarts)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1")

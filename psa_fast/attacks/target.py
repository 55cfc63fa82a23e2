"""A guard as its attacker sees it: every reading it takes, differentiable down to the pixels, and its own last word.

Nothing here approximates the guard: the same weights, the same queries (only what does not depend on the pixels is
computed once), the same worst-of rule in log-odds instead of probabilities, which saturate. Whether an attack has
succeeded is never decided here but by the guard itself, from the PNG of the attacked picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from psa_fast.attacks.frame import Frame
from psa_fast.data.chat import Encoded, ImageInputs, encode
from psa_fast.data.records import Turn
from psa_fast.safety.plain import PlainVLM
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Answer, Verdict
from psa_fast.taxonomy import IGNORE_INDEX, PSA, RISK_LEVELS, RISK_TYPES

if TYPE_CHECKING:
    from psa_fast.safety.guard import Guard
    from psa_fast.safety.policy import Policy

# in double precision a probability is 1 from about these log-odds on: what a threshold of 1 comes to
SATURATED = 36.7


@dataclass(frozen=True)
class Asked:
    """A request as the head is asked about it; `Target.ask` makes it.

    Attributes:
        request: as the user sent it, with pictures of any size.
        pictures: uint8 [P, 3, H, W], what is left of them after the processor's resizing.
        prompt: of the language model, without a hint.
        shown: for each way of showing the pictures (all, then each alone) their places.
        queries: for each of these the queries that ask, float [Q, E].
    """

    request: Request
    pictures: Tensor
    prompt: Encoded
    shown: tuple[tuple[int, ...], ...]
    queries: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """Pictures of the request, P."""
        return len(self.pictures)


class Readings(NamedTuple):
    """All R readings of B requests: logits float [B, R, 7 + 4], `valid` bool [B, R] (requests have different ones)."""

    logits: Tensor
    valid: Tensor


def require_one_threshold(policy: Policy) -> None:
    """Raise ValueError for a policy with more thresholds than one, or a memory: an attack climbs above a single one."""
    if policy.type_thresholds is not None:
        raise ValueError("attacks on pixels need a policy with one unsafe_threshold; this one has type_thresholds")
    if policy.memory is not None:
        raise ValueError("attacks on pixels need a policy with one unsafe_threshold; this one has a memory")


class Target:
    """A guard, opened for attacks on pixels.

    Args:
        guard: with a concept head, or a base without one (`load_plain`), of which only answers can be attacked.

    Raises ValueError for an image processor whose work on a picture of the tower's size is more than 8-bit values,
    scaled and normalised: an attack could not know what the guard sees; and for a policy with type_thresholds.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.model: Any = guard.model
        self.frame = Frame(guard.processor)
        if guard.policy is not None:
            guard.policy.require_taxonomy(PSA, "an attack's margins")
            require_one_threshold(guard.policy)
            self._temperatures = guard.policy.temperatures
            self._types = guard.policy.types
            self._enabled = [i for i, name in enumerate(RISK_TYPES) if self._types.get(name, False)]
            threshold = guard.policy.unsafe_threshold
            odds = math.log(threshold) - math.log1p(-threshold) if threshold < 1.0 else SATURATED
            self.threshold = min(odds, SATURATED)

    @property
    def has_head(self) -> bool:
        """Whether there is a verdict to attack."""
        return self.guard.has_head

    @torch.no_grad()
    def ask(self, request: Request) -> Asked:
        """What does not depend on the pixels: prompts and queries.

        Raises ValueError for a request that the guard does not read, or that has no picture.
        """
        pictures = self.frame.pictures(request.pictures()) if request.images else None
        if pictures is None:
            raise ValueError("the request has no picture, so there are no pixels to attack")
        request = replace(request, images=tuple(self.frame.pil(picture) for picture in pictures))
        asked = self.guard.prepare(request)
        found: dict[tuple[int, ...], list[Tensor]] = {}
        if self.has_head:
            for question in asked.questions(0):
                ids = torch.tensor([question.prompt.input_ids], device=self.device)
                masks = torch.zeros(1, 1 + len(question.parts), ids.shape[1], dtype=torch.bool)
                masks[0, 0] = torch.tensor(question.prompt.query_mask)
                for number, part in enumerate(question.parts, 1):
                    masks[0, number, list(part.positions)] = True
                embeds = self.model.family.embed(self.model.vlm, ids)
                text = self.model.query_text(ids, query_mask=masks.to(self.device))
                found.setdefault(tuple(question.images), []).append(self.model.bottleneck.queries(embeds, text)[0])
        queries = tuple(torch.cat(each) for each in found.values())
        return Asked(request, pictures, asked.prompt, tuple(found), queries)

    def batch_size(self, count: int) -> int:
        """Requests of `count` pictures to differentiate together: 32 small ones, fewer of CLIP-L's size."""
        height, width = self.frame.size
        return max(1, min(32, 32 * 112 * 112 // (height * width * count)))

    @property
    def slack(self) -> float:
        """Nats beyond the threshold that make sure of a success: the guard reads in another batch, by other digits."""
        return 0.1 if next(self.model.parameters()).dtype in (torch.float16, torch.bfloat16) else 1e-3

    @property
    def device(self) -> torch.device:
        """The guard's."""
        return next(self.model.parameters()).device

    def features(self, pixels: Tensor) -> Tensor:
        """h_o of the pixels float [B, P, 3, H, W] in 0..1, which need not be 8-bit values: [B, P, S, Dv]."""
        with _frozen(self.model):
            vision = self.model.family.vision_features(self.model.vlm, self._values(pixels).flatten(0, 1))
        return vision.unflatten(0, pixels.shape[:2])

    def read(self, asked: Sequence[Asked], pixels: Tensor) -> Readings:
        """Every reading that the guard takes of these requests, by all queries, with all pictures and each alone.

        Args:
            asked: B requests with equally many pictures P.
            pixels: float [B, P, 3, H, W] in 0..1, which replace their pictures.
        """
        return self.read_features(asked, self.features(pixels))

    def read_features(self, asked: Sequence[Asked], features: Tensor) -> Readings:
        """As `read`, from features [B, P, S, Dv]."""
        shown = max((one.shown for one in asked), key=len)  # a request without words is not read by them
        logits, valid = [], []
        bottleneck = self.model.bottleneck
        with _frozen(self.model):
            projected = bottleneck.project(features.flatten(0, 1)).unflatten(0, features.shape[:2])
            for number, places in enumerate(shown):
                queries = [one.queries[number] if number < len(one.shown) else one.queries[0][:0] for one in asked]
                most = max(map(len, queries))
                padded = torch.stack([torch.cat([q, q.new_zeros(most - len(q), q.shape[1])]) for q in queries])
                seen = projected[:, list(places)].flatten(1, 2)
                pooled = bottleneck.pool(seen, padded) if places else bottleneck.read_words(padded)
                logits.append(bottleneck.heads(pooled))
                valid.append(torch.tensor([[i < len(q) for i in range(most)] for q in queries]))
        # in float32 at least: losses compare margins whose differences are small
        wide = torch.cat(logits, 1)
        return Readings(wide.to(torch.promote_types(wide.dtype, torch.float32)), torch.cat(valid, 1).to(wide.device))

    def margins(self, readings: Readings) -> Tensor:
        """By how much each head calls each reading unsafe, in log-odds above the policy's threshold: [B, R, 2].

        The guard finds a request unsafe if and only if any is at least 0. Types that the policy switches off count as
        it counts them. Readings that a request does not have are -inf.
        """
        types, levels = readings.logits.split([len(RISK_TYPES), len(RISK_LEVELS)], dim=-1)
        types, levels = types / self._temperatures[0], levels / self._temperatures[1]
        rest = [i for i in range(len(RISK_TYPES)) if i not in self._enabled]
        if not self._enabled:
            return torch.full((*types.shape[:2], 2), -math.inf, device=types.device)
        enabled = types[..., self._enabled].logsumexp(-1)
        by_type = enabled - types[..., rest].logsumexp(-1)
        risky = levels[..., 1:].logsumexp(-1)
        off = [i for i, name in enumerate(RISK_TYPES) if i in rest and self._types.get(name) is False]
        if off:
            both = torch.logaddexp(enabled, types[..., off].logsumexp(-1))
            lost = risky + types[..., off].logsumexp(-1) - both
            by_level = risky + enabled - both - torch.logaddexp(levels[..., 0], lost)
        else:
            by_level = risky - levels[..., 0]
        found = torch.stack([by_type, by_level], -1) - self.threshold
        return found.masked_fill(~readings.valid.unsqueeze(-1), -math.inf)

    def answer_loss(
        self, asked: Sequence[Asked], targets: Sequence[Tensor], pixels: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """How far the language model is from answering, without a hint, with the targets.

        Args:
            asked: B requests with equally many pictures.
            targets: the answers' tokens, from `tokens`.
            pixels: float [B, P, 3, H, W] in 0..1.
            features: of these pixels, if they are there already.

        Returns the mean negative log-likelihood [B] of each target's tokens, the closing one included, and whether the
        target is the greedy answer, bool [B].
        """
        pairs = list(zip(asked, targets, strict=True))
        rows = [one.prompt.input_ids + target.tolist() for one, target in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        owner = [row for row, target in enumerate(targets) for _ in target]
        # the token before predicts
        place = [
            len(one.prompt.input_ids) + i - 1 for one, t in zip(asked, targets, strict=True) for i in range(len(t))
        ]
        with _frozen(self.model):
            if isinstance(self.model, PlainVLM):
                vlm: Any = self.model.vlm
                values = self._values(pixels).flatten(0, 1)
                logits = vlm(input_ids=ids, attention_mask=mask, pixel_values=values, use_cache=False).logits
                logits = logits[owner, place]
            else:
                features = self.features(pixels) if features is None else features
                model, family, vlm = self.model, self.model.family, self.model.vlm
                projected = family.project(vlm, features.flatten(0, 1))
                embeds = family.embed(vlm, ids)
                embeds = model.insert_images(embeds, ids, projected)
                positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
                hidden = family.hidden_states(vlm, embeds, mask, positions)
                logits = family.module(vlm, "lm_head")(hidden[owner, place])
        wanted = torch.cat(list(targets)).to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        index = torch.tensor(owner, device=losses.device)
        lengths = torch.tensor([len(target) for target in targets], device=losses.device)
        missed = torch.zeros_like(lengths).index_add(0, index, (logits.argmax(-1) != wanted).long())
        return losses.new_zeros(len(rows)).index_add(0, index, losses) / lengths, missed == 0

    def tokens(self, asked: Asked, answer: str) -> Tensor:
        """The answer's tokens int64 as training has them, to the one that closes it.

        Raises ValueError if the conversation with this answer is another prompt.
        """
        turns = [*asked.request.turns, Turn("assistant", answer)]
        prepared = ImageInputs(asked.pictures, self.frame.placeholders(asked.count))
        row = encode(turns, self.guard.processor, images=prepared)
        start = len(asked.prompt.input_ids)
        if row.input_ids[:start] != asked.prompt.input_ids or row.labels[start] == IGNORE_INDEX:
            raise ValueError("the answer's tokens do not follow the prompt's, so it cannot be the target of an attack")
        return torch.tensor([token for token in row.labels[start:] if token != IGNORE_INDEX])

    def requests(self, asked: Sequence[Asked], pictures: Tensor) -> list[Request]:
        """The requests with other pictures, uint8 [B, P, 3, H, W], as the bytes of PNG files."""
        return [
            replace(one.request, images=tuple(map(self.frame.png, row)))
            for one, row in zip(asked, pictures, strict=True)
        ]

    def answer(
        self, asked: Sequence[Asked], pictures: Tensor, guarded: bool = True, max_new_tokens: int = 32
    ) -> list[Answer]:
        """The real guard's answers to the requests with these pictures: the last word on any success."""
        if not len(asked):
            return []
        return self.guard.answer(self.requests(asked, pictures), guarded, max_new_tokens, on_error="raise")

    def verdicts(self, asked: Sequence[Asked], pictures: Tensor, batch_size: int = 16) -> list[Verdict]:
        """The real guard's verdicts alone, which cost no generation."""
        return self.guard.verdicts(self.requests(asked, pictures), batch_size, on_error="raise")

    def _values(self, pixels: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        return self.frame.values(pixels.to(weight.device)).to(weight.dtype)


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: nothing is kept for it, which saves half of a step's memory and some time."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)

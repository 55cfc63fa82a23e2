"""Guarded generation: images -> concept probabilities -> policy -> prompt with a hint -> answer, in one vision pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from psa_fast.data.chat import Encoded, ImageInputs, encode, prepare_images, stop_token_ids
from psa_fast.data.records import IMAGE_MARK, Turn
from psa_fast.safety.plain import PlainVLM
from psa_fast.safety.policy import Action, Decision, Policy
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

if TYPE_CHECKING:
    from PIL import Image

    from psa_fast.models import PsaVLM


@dataclass(frozen=True)
class Request:
    """A conversation that ends with the user's turn, and the images of its `<image>` marks.

    A plain string is one user turn; it may leave the marks out, the images then come first.
    """

    prompt: str | tuple[Turn, ...]
    images: tuple[Image.Image, ...] = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns with one mark per image. Raises ValueError if they do not fit or nothing is asked."""
        turns = self.prompt
        if isinstance(turns, str):
            marks = "" if IMAGE_MARK in turns else f"{IMAGE_MARK}\n" * len(self.images)
            turns = (Turn("user", marks + turns),)
        count = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if count != len(self.images):
            raise ValueError(f"the prompt has {count} {IMAGE_MARK} mark(s), but {len(self.images)} image(s) were given")
        if not turns or turns[-1].role != "user" or not turns[-1].text.replace(IMAGE_MARK, "").strip():
            raise ValueError("a request ends with a user's turn that holds text")
        return turns


@dataclass(frozen=True)
class Verdict:
    """What the concept head read and what the policy did with it; names as in the taxonomy.

    `checked` is False where there is nothing to read (no image, no concept head), `rule` then says so. `applied` is
    False for unguarded generation: action and hint are what the policy would have done. Probabilities and score are
    None if they were not read or are not finite.
    """

    checked: bool
    applied: bool
    unsafe: bool
    action: Action
    rule: str
    type: str | None = None
    level: str | None = None
    unsafe_score: float | None = None
    type_probs: dict[str, float] | None = None
    level_probs: dict[str, float] | None = None
    hint: str | None = None
    policy_hash: str | None = None
    model_hash: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """The answer and the verdict it was given under."""

    text: str
    verdict: Verdict


class Guard:
    """A model behind a policy.

    Args:
        model: a PsaVLM, or a PlainVLM: a base without an add-on, which only answers unguarded.
        processor: the model's own, from `psa_fast.models.load_processor`.
        policy: None with a PlainVLM, else a Policy (default: the shipped one).
        model_hash: identifies the weights in every verdict, as `psa_fast.safety.load.addon_hash` gives it.

    Raises ValueError for a model whose concepts are not those of the taxonomy, which the policy decides on.
    """

    def __init__(
        self, model: PsaVLM | PlainVLM, processor: Any, policy: Policy | None = None, model_hash: str | None = None
    ) -> None:
        self.has_head = not isinstance(model, PlainVLM)
        if not isinstance(model, PlainVLM):
            names = tuple(model.config.risk_types), tuple(model.config.risk_levels)
            if names != (RISK_TYPES, RISK_LEVELS):
                raise ValueError(f"the model's risk types and levels are {names}; the policy knows only the taxonomy's")
            policy = policy or Policy.load()
        elif policy is not None:
            raise ValueError("a base without an add-on has no concept head, so no policy can be applied to it")
        self.model = model
        self.processor = processor
        self.policy = policy
        self.model_hash = model_hash
        self._stop_ids = stop_token_ids(processor)
        model.eval()

    def answer(
        self, requests: Sequence[Request], guarded: bool = True, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[Answer]:
        """Answer requests greedily, in their order.

        `guarded=False` is plain generation with the safety tokens and weights; its verdicts are reported, not applied.
        Raises ValueError for guarded generation without a concept head.
        """
        return [
            answer
            for start in range(0, len(requests), batch_size)
            for (answer,) in self._answer(requests[start : start + batch_size], (guarded,), max_new_tokens, batch_size)
        ]

    def answer_both(
        self, requests: Sequence[Request], max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[tuple[Answer, Answer]]:
        """(guarded, unguarded) answers of each request from one vision pass; one generation where the policy allows."""
        return [
            (guarded, plain)
            for start in range(0, len(requests), batch_size)
            for guarded, plain in self._answer(
                requests[start : start + batch_size], (True, False), max_new_tokens, batch_size
            )
        ]

    @torch.inference_mode()
    def _answer(
        self, requests: Sequence[Request], modes: tuple[bool, ...], max_new_tokens: int, batch_size: int
    ) -> list[tuple[Answer, ...]]:
        if True in modes and not self.has_head:
            raise ValueError("this model has no concept head: it can only answer unguarded")
        turns = [request.turns for request in requests]
        counts = [len(request.images) for request in requests]
        everything = [image for request in requests for image in request.images]
        prepared = prepare_images(everything, self.processor) if everything else None
        features = self._encode_images(prepared)
        images = [_slice(prepared, sum(counts[:row]), count) for row, count in enumerate(counts)]

        def prompt(row: int, hint: str | None = None) -> Encoded:
            return encode(turns[row], self.processor, images=images[row], hint=hint, add_generation_prompt=True)

        prompts = [prompt(row) for row in range(len(requests))]
        readings = self._read(prompts, counts, features)

        # what to generate: (row, hint), each once however many modes ask for it
        jobs: dict[tuple[int, str | None], str] = {}
        for row, (_, decision) in enumerate(readings):
            for guarded in modes:
                if not guarded or decision.response is None:
                    jobs[row, decision.hint if guarded else None] = ""
        keys = list(jobs)
        for start in range(0, len(keys), batch_size):
            chunk = keys[start : start + batch_size]
            encoded = [prompts[row] if hint is None else prompt(row, hint) for row, hint in chunk]
            texts = self._generate(encoded, [row for row, _ in chunk], counts, features, max_new_tokens)
            jobs.update(zip(chunk, texts, strict=True))

        answers = []
        for row, (verdict, decision) in enumerate(readings):
            both = []
            for guarded in modes:
                text = decision.response if guarded else None
                if text is None:
                    text = jobs[row, decision.hint if guarded else None]
                both.append(Answer(text, replace(verdict, applied=guarded and verdict.checked)))
            answers.append(tuple(both))
        return answers

    def _encode_images(self, prepared: ImageInputs | None) -> Any:
        """Features of all images, in order, from the one vision pass; None without images."""
        if prepared is None:
            return None
        weight = next(self.model.parameters())
        return self.model.encode_images(prepared.pixel_values.to(weight.device, weight.dtype))

    def _read(self, prompts: Sequence[Encoded], counts: list[int], features: Any) -> list[tuple[Verdict, Decision]]:
        """Per row its verdict and the policy's decision. The query is the prompt without a hint."""
        rows = []
        with_image = [row for row, count in enumerate(counts) if count]
        probs: dict[int, tuple[list[float], list[float]]] = {}
        if with_image and not isinstance(self.model, PlainVLM):
            # padded on the right, as in training: position 0 is the prompt's first token for query="first"
            chosen = [prompts[row] for row in with_image]
            ids = self._pad([p.input_ids for p in chosen], self._pad_id, "right")
            mask = self._pad([p.query_mask for p in chosen], 0, "right").bool()
            images = torch.tensor([counts[row] for row in with_image], device=ids.device)
            logits = self.model.concept_logits(features, images, ids, mask).double()
            types, levels = logits.split([len(RISK_TYPES), len(RISK_LEVELS)], dim=-1)
            both = zip(types.softmax(-1).tolist(), levels.softmax(-1).tolist(), strict=True)
            probs = dict(zip(with_image, both, strict=True))
        policy_hash = self.policy.hash if self.policy else None
        for row, count in enumerate(counts):
            if row not in probs or self.policy is None:
                reason = (
                    "the model has no concept head" if count else "the concept head reads images, and there is none"
                )
                decision = Decision("allow", None, None, f"unchecked: {reason}", None)
                verdict = Verdict(False, False, False, "allow", decision.rule)
            else:
                decision = self.policy.decide(*probs[row])
                finite = decision.unsafe_score is not None
                verdict = Verdict(
                    checked=True,
                    applied=True,
                    unsafe=decision.unsafe,
                    action=decision.action,
                    rule=decision.rule,
                    type=None if decision.type is None else RISK_TYPES[decision.type],
                    level=None if decision.level is None else RISK_LEVELS[decision.level],
                    unsafe_score=decision.unsafe_score,
                    type_probs=dict(zip(RISK_TYPES, probs[row][0], strict=True)) if finite else None,
                    level_probs=dict(zip(RISK_LEVELS, probs[row][1], strict=True)) if finite else None,
                    hint=decision.hint,
                )
            rows.append((replace(verdict, policy_hash=policy_hash, model_hash=self.model_hash), decision))
        return rows

    def _generate(
        self, encoded: Sequence[Encoded], rows: list[int], counts: list[int], features: Any, max_new_tokens: int
    ) -> list[str]:
        ids = self._pad([e.input_ids for e in encoded], self._pad_id, "left")
        mask = self._pad([[1] * len(e.input_ids) for e in encoded], 0, "left")
        first = [sum(counts[:row]) for row in range(len(counts))]
        images = [first[row] + i for row in rows for i in range(counts[row])]
        new_ids = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            features=_take(features, images) if images else None,
            image_counts=torch.tensor([counts[row] for row in rows], device=ids.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._pad_id,
            eos_token_id=self._stop_ids,
        )
        texts = self.processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @property
    def _pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _pad(self, rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:  # -> [rows, longest] int64
        longest = max(map(len, rows))
        filled = [
            [*row, *[value] * (longest - len(row))] if side == "right" else [*[value] * (longest - len(row)), *row]
            for row in rows
        ]
        return torch.tensor(filled, dtype=torch.int64, device=next(self.model.parameters()).device)


def _slice(prepared: ImageInputs | None, start: int, count: int) -> ImageInputs | None:
    if prepared is None or not count:
        return None
    return ImageInputs(prepared.pixel_values[start : start + count], prepared.placeholders[start : start + count])


def _take(features: Any, images: list[int]) -> Any:
    """The features of some images (a row may come twice: with and without its hint)."""
    if isinstance(features, torch.Tensor):
        return features[images]
    return type(features)(*(tensor[images] for tensor in features))

"""Guarded generation: images -> concept probabilities -> policy -> prompt with a hint -> answer, in one vision pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from psa_fast.data.chat import Encoded, ImageInputs, encode
from psa_fast.data.records import IMAGE_MARK, Turn
from psa_fast.files import shorten
from psa_fast.pictures import join
from psa_fast.safety.plain import PlainVLM
from psa_fast.safety.policy import Decision, Policy, require_policy
from psa_fast.safety.prepared import Prepared
from psa_fast.safety.reading import NEUTRAL_QUESTION, Question, Reading, parts_of, read_head, require_turns
from psa_fast.safety.request import (
    OnError,
    Prompter,
    Request,
    check_count,
    checked,
    keep_mark,
    length_limit,
    text_positions,
)
from psa_fast.safety.verdict import Answer, Verdict, as_applied, decided, refusing_verdict, unread_verdict
from psa_fast.safety.writing import Generated, Job, OwnWriter, Writer, pad
from psa_fast.taxonomy import PSA

if TYPE_CHECKING:
    from psa_fast.models import PsaVLM

__all__ = ["Answer", "Guard", "Request", "Verdict"]

UNCHECKED = "I am sorry, but this request cannot be answered, because it could not be read."


class Guard:
    """A model behind a policy.

    Args:
        model: a PsaVLM, or a PlainVLM: a base without an add-on, which only answers unguarded.
        processor: the model's own, from `psa_fast.models.load_processor`.
        policy: None with a PlainVLM, else a Policy (default: the shipped one).
        model_hash: identifies the weights in every verdict, as `psa_fast.safety.load.addon_hash` gives it.
        max_length: the most tokens of prompt and answer together; None: the positions of the base's language model.
        neutral_question: asked of the concept head beside the request's own words (reading.py); None: not asked. A
            model whose query is no text (query="first") is never asked it, nor one whose learned query asks alone.

    Raises ValueError for a model of another taxonomy than the policy's, for one
    that a calibrated policy was not fitted to, and for a `max_length` or question that the model cannot take.
    """

    def __init__(
        self,
        model: PsaVLM | PlainVLM,
        processor: Any,
        policy: Policy | None = None,
        model_hash: str | None = None,
        max_length: int | None = None,
        neutral_question: str | None = NEUTRAL_QUESTION,
    ) -> None:
        self.has_head = not isinstance(model, PlainVLM)
        require_policy(policy)
        if neutral_question is not None and not isinstance(neutral_question, str):
            raise ValueError(f"neutral_question is {shorten(neutral_question)}; expected a line of text")
        if not isinstance(model, PlainVLM):
            policy = policy or Policy.load()
            policy.require_taxonomy(model.config.concepts, "the model")
            if model.config.query != "prompt" or model.config.neutral_query:
                neutral_question = None
            policy.require_model(model_hash)
            require_turns(policy, model.config)
        elif policy is not None:
            raise ValueError("a base without an add-on has no concept head, so no policy can be applied to it")
        self.model = model
        self.processor = processor
        self.policy = policy
        self.neutral_question = neutral_question if self.has_head else None
        self._prompter = Prompter(processor, length_limit(max_length, text_positions(model.vlm.config)))
        self.model_hash = model_hash
        self._policy_hash = policy.hash if policy else None
        #: what writes the answers; another one may take its place
        self.writer: Writer | None = None  # None: the model itself, whichever it is when it is asked
        self._neutral_prompts: dict[tuple[str, ...], Encoded] = {}
        if self.neutral_question is not None and not Request(self.neutral_question).turns[0].text.isprintable():
            raise ValueError(f"neutral_question is {shorten(self.neutral_question)}; expected a line of text")
        model.eval()

    @property
    def max_length(self) -> int | None:
        """The most tokens of prompt and answer together; None: the model names no limit."""
        return self._prompter.max_length

    def answer(
        self,
        requests: Sequence[Request],
        guarded: bool = True,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        on_error: OnError = "block",
    ) -> list[Answer]:
        """Answer requests greedily, in their order.

        A request that cannot be read (its images, its marks, its length) is answered with a block, and its verdict's
        `error` says why; the others are answered. `on_error="raise"` raises a ValueError for the first such instead.
        What the head does not read (see `Policy.on_error`) is answered with a block too, unless the policy allows it.
        `guarded=False` is plain generation with the safety tokens and weights; its verdicts are reported, not applied.

        Raises ValueError for guarded generation without a concept head, and for numbers below 1.
        """
        return [answer for (answer,) in self._batches(requests, (guarded,), max_new_tokens, batch_size, on_error)]

    def answer_both(
        self,
        requests: Sequence[Request],
        max_new_tokens: int = 64,
        batch_size: int = 16,
        on_error: OnError = "block",
    ) -> list[tuple[Answer, Answer]]:
        """(guarded, unguarded) answers of each request from one vision pass; one generation where the policy allows.

        Arguments and errors as for `answer`.
        """
        rows = self._batches(requests, (True, False), max_new_tokens, batch_size, on_error)
        return [(guarded, plain) for guarded, plain in rows]

    @torch.inference_mode()
    def verdicts(self, requests: Sequence[Request], batch_size: int = 16, on_error: OnError = "block") -> list[Verdict]:
        """The verdicts that guarded answers would have, without generating any.

        A request that cannot be read is blocked, and its verdict's `error` says why; `on_error="raise"` raises a
        ValueError that names its place in the list instead.
        """
        found: dict[int, Verdict] = {}
        for batch, refused in self._prepared(requests, batch_size, on_error):
            read = self._read(batch, self._encode_images(batch))
            found |= refused
            found.update((one.number, as_applied(*result)) for one, result in zip(batch, read, strict=True))
        return [found[number] for number in range(len(found))]

    @torch.inference_mode()
    def readings(self, requests: Sequence[Request], batch_size: int = 16) -> list[list[Reading]]:
        """All readings of each request, of which the worst decides; none of what the head does not read.

        Raises ValueError, naming its place in the list, for a request that cannot be read.
        """
        found = []
        for batch, _ in self._prepared(requests, batch_size, "raise"):
            readings = self._ask(batch, self._encode_images(batch))
            found += [readings.get(one.number, []) if one.readable else [] for one in batch]
        return found

    def _prepared(
        self, requests: Sequence[Request], batch_size: int, on_error: OnError
    ) -> Iterator[tuple[list[Prepared], dict[int, Verdict]]]:
        """Batches ready to be asked, and the verdicts of requests that cannot be read, by their places in the list."""
        requests = checked(requests, batch_size, on_error)
        for start in range(0, len(requests), batch_size):
            batch: list[Prepared] = []
            refused: dict[int, Verdict] = {}
            for number, request in enumerate(requests[start : start + batch_size], start):
                try:
                    batch.append(self.prepare(request, number=number))
                except ValueError as error:
                    if on_error == "raise":
                        raise ValueError(f"request {number}: {error}") from error
                    refused[number] = self._signed(refusing_verdict(number, str(error)))
            yield batch, refused

    def _batches(
        self,
        requests: Sequence[Request],
        modes: tuple[bool, ...],
        max_new_tokens: int,
        batch_size: int,
        on_error: OnError,
    ) -> list[tuple[Answer, ...]]:
        check_count("max_new_tokens", max_new_tokens)
        requests = checked(requests, batch_size, on_error)
        if not all(isinstance(guarded, bool) for guarded in modes):  # what is merely false would turn the guard off
            raise ValueError(f"guarded is {shorten(modes[0])}; expected True or False")
        if True not in modes and any(isinstance(one, Request) and one.intervention for one in requests):
            raise ValueError("an intervention does nothing to an unguarded answer")
        if True in modes and not self.has_head:
            raise ValueError("this model has no concept head: it can only answer unguarded")
        answers: list[tuple[Answer, ...]] = []
        for start in range(0, len(requests), batch_size):
            batch = dict(enumerate(requests[start : start + batch_size], start))
            answers += self._answer(batch, modes, max_new_tokens, batch_size, on_error)
        return answers

    @torch.inference_mode()
    def _answer(
        self,
        requests: dict[int, Request],
        modes: tuple[bool, ...],
        max_new_tokens: int,
        batch_size: int,
        on_error: OnError,
    ) -> list[tuple[Answer, ...]]:
        """Answer one batch; the requests come with their places in the caller's list."""
        answers: dict[int, tuple[Answer, ...]] = {}

        def refuse(number: int, error: ValueError) -> None:
            if on_error == "raise":
                raise ValueError(f"request {number}: {error}") from error
            text = self.policy.responses.unchecked if self.policy else UNCHECKED
            answers[number] = (Answer(text, self._signed(refusing_verdict(number, str(error)))),) * len(modes)

        # one by one, so that a request that cannot be read takes no other with it
        asked = []
        for number, request in requests.items():
            try:
                asked.append(self.prepare(request, max_new_tokens, number))
            except ValueError as error:
                refuse(number, error)
        features = self._encode_images(asked)
        readings = self._read(asked, features)

        # what to generate: (row, hint), each once however many modes ask for it
        jobs: dict[tuple[int, str | None], Encoded] = {}
        for row, (one, (_, decision)) in enumerate(zip(asked, readings, strict=True)):
            hints = {decision.hint if guarded else None for guarded in modes if not (guarded and decision.response)}
            try:
                for hint in hints:
                    jobs[row, hint] = self._with_hint(one, hint, max_new_tokens)
            except ValueError as error:
                refuse(one.number, error)
        keys = [key for key in jobs if asked[key[0]].number not in answers]
        texts: dict[tuple[int, str | None], Generated] = {}
        first = [sum(one.count for one in asked[:row]) for row in range(len(asked))]
        places = [list(range(start, start + one.count)) for start, one in zip(first, asked, strict=True)]
        for start in range(0, len(keys), batch_size):
            chunk = keys[start : start + batch_size]
            work = [Job(jobs[row, hint], asked[row].turns, hint, places[row]) for row, hint in chunk]
            writer = self.writer or OwnWriter(self.model, self.processor)
            new = writer.write(work, features, max_new_tokens)
            texts.update(zip(chunk, new, strict=True))

        for row, (one, (verdict, decision)) in enumerate(zip(asked, readings, strict=True)):
            if one.number not in answers:
                answers[one.number] = tuple(
                    Answer(decision.response, as_applied(verdict, decision))
                    if guarded and decision.response
                    else Answer(
                        verdict=as_applied(verdict, decision) if guarded else replace(verdict, applied=False),
                        **texts[row, decision.hint if guarded else None]._asdict(),
                    )
                    for guarded in modes
                )
        return [answers[number] for number in requests]

    def prepare(self, request: Request, max_new_tokens: int = 1, number: int = 0) -> Prepared:
        """Check and encode a request, which takes `number` for its place. Raises ValueError if it cannot be asked."""
        if not isinstance(request, Request):
            raise ValueError(f"it is a {type(request).__name__}; expected a Request")
        found = self._prepare(request, max_new_tokens, number)
        if request.intervention is not None and not found.readable:
            raise ValueError("the concept head does not read it, so there is no concept to intervene on")
        if request.intervention is not None and self.policy is not None:
            self.policy.require_taxonomy(PSA, "an intervention")
        return replace(found, intervention=request.intervention)

    def _prepare(self, request: Request, max_new_tokens: int, number: int) -> Prepared:
        turns = request.turns
        images = self._prompter.prepare(request)
        prompt = self._prompter.prompt(turns, images, max_new_tokens)
        neutral = self._neutral_prompt(images)
        if isinstance(self.model, PlainVLM):
            return Prepared(number, turns, images, prompt, neutral, readable=False)
        config = self.model.config
        readable = bool(prompt.image_count or config.reads_text)
        if config.neutral_query or config.query_window or config.reads_text:
            learned = bool(config.neutral_query and prompt.image_count)
            parts = parts_of(prompt, self.model.family.image_token_id, config.query_window or 0, learned)
            words = bool(config.num_text_tokens) and any(prompt.query_mask)
            return Prepared(number, turns, images, prompt, neutral, parts=tuple(parts), words=words, readable=readable)
        if images is None or prompt.image_count < 2:
            return Prepared(number, turns, images, prompt, neutral, readable=readable)
        alone = []
        for place in range(prompt.image_count):
            image = images.only(place)
            own = self._prompter.prompt(keep_mark(turns, place, NEUTRAL_QUESTION), image, max_new_tokens)
            alone.append((replace(own, pixel_values=None, position_ids=None), self._neutral_prompt(image)))
        return Prepared(number, turns, images, prompt, neutral, tuple(alone))

    def _with_hint(self, request: Prepared, hint: str | None, max_new_tokens: int) -> Encoded:
        if hint is None:
            return request.prompt
        return self._prompter.prompt(request.turns, request.images, max_new_tokens, hint)

    def _encode_images(self, asked: Sequence[Prepared]) -> Any:
        """Features of all images, in order, from the one vision pass; None without images."""
        found = [request.images.pixel_values for request in asked if request.images is not None]
        pixels = [images for images in found if images is not None]
        if not pixels:
            return None
        weight = next(self.model.parameters())
        return self.model.encode_images(join(pixels).to(weight.device, weight.dtype))

    def _neutral_prompt(self, images: ImageInputs | None) -> Encoded | None:
        """The neutral question about the images, in the layout of training's records; None without images."""
        if self.neutral_question is None or images is None:
            return None
        if images.placeholders not in self._neutral_prompts:
            if len(self._neutral_prompts) > 1000:  # of images that differ in their tokens there is no end
                self._neutral_prompts.clear()
            turns = [Turn("user", f"{IMAGE_MARK}\n" * len(images.placeholders) + self.neutral_question)]
            # the language model never sees it, so no length can be too much
            encoded = encode(turns, self.processor, images=images, add_generation_prompt=True)
            self._neutral_prompts[images.placeholders] = replace(encoded, pixel_values=None)
        return self._neutral_prompts[images.placeholders]

    def _signed(self, verdict: Verdict) -> Verdict:
        return replace(verdict, policy_hash=self._policy_hash, model_hash=self.model_hash)

    def _ask(self, asked: Sequence[Prepared], features: Any) -> dict[int, list[Reading]]:
        """All readings of each request, by its number."""
        readings: dict[int, list[Reading]] = {}
        if not isinstance(self.model, PlainVLM):
            questions: list[Question] = []
            owners: list[int] = []
            first = 0
            for request in asked:
                mine = request.questions(first)
                questions += mine
                owners += [request.number] * sum(1 + len(question.parts) for question in mine)
                first += request.count
            temperatures = self.policy.temperatures if self.policy else (1.0, 1.0)
            found = read_head(self.model, questions, features, self._pad_right, temperatures)
            for number, reading in zip(owners, found, strict=True):
                readings.setdefault(number, []).append(reading)
        return readings

    def _read(self, asked: Sequence[Prepared], features: Any) -> list[tuple[Verdict, Decision]]:
        """Per request its verdict and the policy's decision, by the worst of the readings."""
        readings = self._ask(asked, features)
        rows = []
        for request in asked:
            if self.policy is None or not request.readable:
                action = "allow" if self.policy is None else self.policy.on_error
                verdict = unread_verdict("no_image" if self.has_head or not request.count else "no_head", action)
                response = self.policy.responses.unchecked if self.policy and action == "block" else None
                decision = Decision(action, None, None, verdict.rule, None, response=response, code=verdict.code)
            else:
                verdict, decision = decided(self.policy, readings[request.number], request.intervention)
            rows.append((self._signed(verdict), decision))
        return rows

    def _pad_right(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        return pad(rows, value, "right", next(self.model.parameters()).device)

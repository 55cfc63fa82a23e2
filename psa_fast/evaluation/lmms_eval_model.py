"""The model `psa` of lmms-eval, in its process: the guard, or the same model without it, answers a task's requests.

    lmms-eval --model psa --model_args addon=RUN/stage2 --tasks mme --batch_size 8
    lmms-eval --model psa --model_args addon=RUN/stage2,guarded=False --tasks mme --batch_size 8

Written for lmms_eval 0.7.3, which imports this file through its entry point.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from psa_fast.data.fields import IMAGE_MARK, Turn
from psa_fast.files import shorten
from psa_fast.safety.guard import Request
from psa_fast.safety.load import load_guard, load_plain
from psa_fast.safety.policy import Policy

LONGEST = 1024  # tokens of an answer, where the task names no number
_TRUE, _FALSE = (True, "True", "true"), (False, "False", "false")
# what a task may say of its generation; a greedy answer has no use for the last ones, which sampling alone reads
_READ = ("max_new_tokens", "until", "temperature", "do_sample", "num_beams")
_SAMPLING = ("top_p", "top_k", "seed")


class Psa(lmms):
    """Answers chat tasks greedily, by the guard or without it.

    Args:
        addon: the add-on's folder; without one the base answers, which has no guard.
        base: base VLM, in the place of the one that the add-on names.
        policy: the guard's policy file; the shipped one by default.
        guarded: False for plain generation with the add-on's safety tokens and weights.
        batch_size: requests at once.
        max_batch_size, device: lmms-eval's own; the device is the first GPU if there is one.

    Raises:
        ValueError: arguments that do not fit, a model that cannot be loaded, or several processes.
    """

    is_simple = False

    def __init__(
        self,
        addon: str | None = None,
        base: str | None = None,
        policy: str | None = None,
        guarded: bool | str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: Any = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"--model psa takes addon, base, policy and guarded, not {', '.join(unknown)}")
        if guarded not in (None, *_TRUE, *_FALSE):
            raise ValueError(f"guarded is {shorten(guarded)}; expected True or False")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("--model psa runs in one process; start lmms-eval without a launcher")
        self.batch_size = 1 if batch_size is None else int(batch_size)
        self.guarded = addon is not None if guarded is None else guarded in _TRUE
        if addon is None:
            if base is None or self.guarded or policy is not None:
                raise ValueError("--model psa needs addon=DIR; base=PATH alone is asked without a guard and a policy")
            self.guard = load_plain(base)
        else:
            self.guard = load_guard(addon, base, Policy.load(policy))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer the requests of tasks, in their order; what the policy refuses is answered with its refusal.

        Raises ValueError, with task and number, for a request that cannot be asked: it is never scored as an answer.
        """
        by_length: dict[int, list[int]] = {}
        asked = [self._asked(request) for request in requests]
        for place, (_, tokens, _) in enumerate(asked):
            by_length.setdefault(tokens, []).append(place)
        answers: dict[int, str] = {}
        for tokens, places in by_length.items():
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                found = self.guard.answer([asked[place][0] for place in batch], self.guarded, tokens, self.batch_size)
                for place, answer in zip(batch, found, strict=True):
                    if answer.verdict.error is not None:
                        raise ValueError(f"{_name(requests[place])}: {answer.verdict.error}")
                    answers[place] = _cut(answer.text, asked[place][2])
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answers[place])
        return [answers[place] for place in range(len(asked))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: raises NotImplementedError."""
        raise NotImplementedError("--model psa answers tasks of one round")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered, since a guard answers and scores no answers of others: raises NotImplementedError."""
        raise NotImplementedError("--model psa gives answers; tasks that score log-likelihoods cannot be asked")

    def _asked(self, request: Any) -> tuple[Request, int, tuple[str, ...]]:
        """What a request asks: conversation with images, longest answer, texts that end it."""
        _, doc_to_messages, settings, number, task, split = request.args
        try:
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number])).messages
            return _request(messages), *_generation(settings)
        except ValueError as error:
            raise ValueError(f"{_name(request)}: {error}") from error


def _name(request: Any) -> str:
    return f"task {request.args[4]}, {request.args[5]}, number {request.args[3]}"


def _request(messages: Sequence[Any]) -> Request:
    """The conversation of chat messages. Marks of images that stand in a text are no images, and left out."""
    turns, images = [], []
    for message in messages:
        if message.role not in ("user", "assistant"):
            raise ValueError(f"a message of the role {message.role}; --model psa takes user and assistant")
        parts = []
        for content in message.content:
            if content.type == "text":
                parts.append(content.text.replace(IMAGE_MARK, "").strip())
            elif content.type == "image":
                parts.append(IMAGE_MARK)
                images.append(content.url)
            else:
                raise ValueError(f"a message with {content.type}; --model psa takes text and images")
        turns.append(Turn(message.role, "\n".join(part for part in parts if part)))
    return Request(tuple(turns), tuple(images))


def _generation(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Longest answer and texts that end it. Raises ValueError for what is not greedy, or not known."""
    if unknown := [name for name in settings if name not in (*_READ, *_SAMPLING)]:
        raise ValueError(f"the task's generation_kwargs have {', '.join(unknown)}, which --model psa does not know")
    if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) != 1:
        raise ValueError(
            "the task asks for sampling or beams, and --model psa answers greedily; "
            "give --gen_kwargs temperature=0,do_sample=False,num_beams=1"
        )
    until = settings.get("until") or ()
    return int(settings.get("max_new_tokens") or LONGEST), (until,) if isinstance(until, str) else tuple(until)


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        if end:
            text = text.partition(end)[0]
    return text

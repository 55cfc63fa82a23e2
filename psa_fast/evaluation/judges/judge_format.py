"""How a kind of judging model is asked and read: what the formats of this folder have in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping

from psa_fast.data.records import IMAGE_MARK
from psa_fast.evaluation.judges.contract import Answered, Opinion, Prompt, Reply
from psa_fast.evaluation.judges.wording import fill


class Format(ABC):
    """Asks a kind of judging model about an answer, and reads its reply.

    `sees_pictures`: the images go with the question. `own_wording`: the model was trained on one wording, which has to
    be given. `wording` is as wording.py has it; without one the conversation itself is sent, and the model's own chat
    template asks. `max_tokens` and `top_logprobs` are of the reply.
    """

    name: str
    tells_refusals = False
    harmless = True
    sees_pictures = False
    own_wording = False
    wording: Mapping[str, str] | None = None
    max_tokens = 32
    top_logprobs = 0

    def __init__(self, wording: Mapping[str, str] | None = None) -> None:
        if wording is not None:
            self.wording = wording

    def prompt(self, answered: Answered) -> Prompt:
        """What to ask about an answer. Without a wording there is no system prompt: guard models have their own."""
        prompt = Prompt(_turns(answered)) if self.wording is None else fill(self.wording, answered)
        return dataclasses.replace(
            prompt,
            pictures=answered.pictures if self.sees_pictures else (),
            max_tokens=self.max_tokens,
            top_logprobs=self.top_logprobs,
        )

    def parse(self, reply: Reply, answered: Answered) -> Opinion:
        """What a reply means; anything that is not exactly of the format is `unparsed`."""
        return self._read(reply, answered) or unparsed(reply, "the reply is not of the format")

    @abstractmethod
    def _read(self, reply: Reply, answered: Answered) -> Opinion | None:
        """The opinion that a reply states; None if it is not of the format."""


def unparsed(reply: Reply, reason: str) -> Opinion:
    """The opinion of a reply that says nothing one could count on."""
    return Opinion("unparsed", reply.text, reason=reason)


def _turns(answered: Answered) -> tuple[dict[str, str], ...]:
    """The request's turns without image marks, and the answer as the assistant's last one."""
    asked = [
        {"role": role, "content": " ".join(text.replace(IMAGE_MARK, " ").split())} for role, text in answered.request
    ]
    return (*asked, {"role": "assistant", "content": answered.answer})

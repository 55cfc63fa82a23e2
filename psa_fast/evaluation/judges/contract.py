"""What a judge is given, what it says, and how a judging model is asked: the contract of this folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from psa_fast.data.records import IMAGE_MARK

# safe: answered, nothing harmful in it; partial: refused in part, or answered with a warning; controversial: harmful by
# one policy and not by another; unparsed: the reply is not exactly of the judge's format; failed: there was no reply
Verdict = Literal["safe", "unsafe", "refusal", "partial", "controversial", "unparsed", "failed"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
NO_VERDICT = ("unparsed", "failed")  # in no share, never safe


@dataclass(frozen=True)
class Answered:
    """One answer and what it answers.

    `request` holds (role, text) by turn, `<image>` marks in the text; `pictures` are the images' names. `risky` says
    whether the request has to be refused, `level` how risky it is (0 to 3, None where that is not known).
    """

    request: tuple[tuple[str, str], ...]
    pictures: tuple[str, ...]
    answer: str
    risky: bool
    level: int | None = None

    @property
    def question(self) -> str:
        """The request as text without marks; turns before the last one are shown with their role."""
        texts = [(role, " ".join(text.replace(IMAGE_MARK, " ").split())) for role, text in self.request]
        return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)


@dataclass(frozen=True)
class Opinion:
    """What a judge says of one answer.

    Args:
        verdict: one of VERDICTS.
        reply: what it said, to the letter; None where nothing was said.
        score: its probability or rating of harm in [0, 1], where it has one.
        categories: of harm, in the judge's own names.
        reason: why there is no verdict.
    """

    verdict: Verdict
    reply: str | None = None
    score: float | None = None
    categories: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What a judging model is asked: chat messages, or one text that it goes on with.

    A message's content is a text; `pictures` are names of images that go with the last user message.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    text: str | None = None
    pictures: tuple[str, ...] = ()
    max_tokens: int = 64
    top_logprobs: int = 0

    def to_json(self) -> dict[str, Any]:
        """All that the reply depends on, but for the pixels."""
        return {
            "messages": [dict(message) for message in self.messages],
            "text": self.text,
            "max_tokens": self.max_tokens,
            "top_logprobs": self.top_logprobs,
        }


@dataclass(frozen=True)
class Reply:
    """What a judging model said; `logprobs` are the likeliest first tokens (natural logarithms), where asked for."""

    text: str
    logprobs: tuple[tuple[str, float], ...] = ()


class NoReply(Exception):
    """A judging model gave no reply: the reason is its text."""


class Asker(Protocol):
    """A model that can be asked. `model` names it; `workers` prompts may be asked at once."""

    model: str
    workers: int

    def __call__(self, prompt: Prompt) -> Reply:
        """The model's reply. Raises NoReply if there is none."""

    def digest(self, prompt: Prompt) -> str:
        """What of a prompt `Prompt.to_json` does not hold: a hash of the pictures' bytes, empty without any."""


class Judge(Protocol):
    """Gives its opinion of answers.

    `name` is that of its files. `tells_refusals`: whether it sees refusals; over-refusal is counted by the refusal list
    otherwise. `harmless`: whether it can be asked about answers to harmless requests.
    """

    name: str
    tells_refusals: bool
    harmless: bool

    def judge(self, answers: Iterable[Answered]) -> Iterator[Opinion | None]:
        """One opinion for each answer, in order; None for an answer that was not put before it."""

    def provenance(self) -> dict[str, Any]:
        """What makes its figures comparable: model, format, wording, settings."""

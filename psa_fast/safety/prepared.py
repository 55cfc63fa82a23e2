"""A request as the concept head is asked about it: by which prompts, shown which of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psa_fast.data.chat import Encoded, ImageInputs
from psa_fast.data.records import Turn
from psa_fast.safety.intervention import Intervention
from psa_fast.safety.reading import Part, Query, Question


@dataclass(frozen=True)
class Prepared:
    """A request that can be asked: its place in the caller's list, its turns, images and prompt; the guard makes it.

    `neutral` is the neutral question about its images, None where none is asked. `alone` holds both for each image,
    as if it had come alone, where there are several and the add-on has none of the readings of `parts`: those are the
    further queries of the prompt, of all its images and of each. `words` tells whether its words are read by themselves
    besides, `readable` whether the head reads it at all. `intervention` is what is done to its readings by hand.
    """

    number: int
    turns: tuple[Turn, ...]
    images: ImageInputs | None
    prompt: Encoded
    neutral: Encoded | None
    alone: tuple[tuple[Encoded, Encoded | None], ...] = ()
    parts: tuple[Part, ...] | None = None
    words: bool = False
    readable: bool = True
    intervention: Intervention | None = None

    @property
    def count(self) -> int:
        """The request's images."""
        return self.prompt.image_count

    def questions(self, first: int) -> list[Question]:
        """What the concept head is asked, `first` being the place of the request's first image in the features."""
        images = range(first, first + self.count)
        asked: list[tuple[Query, Encoded | None, Sequence[int], int | None]] = []
        if self.parts is not None:
            if not self.readable:
                return []
            shown: list[tuple[Sequence[int], int | None]] = [(images, None)]
            if self.count > 1:
                shown += [(images[place : place + 1], place) for place in range(self.count)]
            found = [Question("prompt", self.prompt, chosen, place, self.parts) for chosen, place in shown]
            if self.words and self.count:
                by_words = [part for part in self.parts if part.query != "neutral"]
                found.append(Question("prompt", self.prompt, (), None, by_words))
            if self.neutral is not None:  # an add-on that reads text, but whose learned query never asked alone
                found += [Question("neutral", self.neutral, chosen, place) for chosen, place in shown]
            return found
        if self.count:
            asked += [("prompt", self.prompt, images, None), ("neutral", self.neutral, images, None)]
        for place, (own, neutral) in enumerate(self.alone):
            asked += [("prompt", own, images[place : place + 1], place)]
            asked += [("neutral", neutral, images[place : place + 1], place)]
        return [Question(query, prompt, chosen, place) for query, prompt, chosen, place in asked if prompt is not None]

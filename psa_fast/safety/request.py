"""The request: a conversation and its images, checked before anything is asked, and its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from psa_fast.data.chat import Encoded, ImageInputs, encode, prepare_images
from psa_fast.data.images import ImageError, to_rgb
from psa_fast.data.records import IMAGE_MARK, Turn
from psa_fast.files import shorten, unwritable_text
from psa_fast.safety.intervention import Intervention

Picture = bytes | Path | Image.Image
# what becomes of a request that cannot be read
OnError = Literal["block", "raise"]


@dataclass(frozen=True)
class Request:
    """A conversation that ends with the user's turn, and the images of its `<image>` marks.

    A plain string is one user turn; it may leave the marks out, the images then come first. An image is the bytes of a
    file, a Path or a PIL image, and is seen as training would see the same file. A str is none: what a client sends as
    text is never opened or fetched. An intervention is an operator's, never the client's: see there.

    Raises ValueError for a prompt or images of another type; what they hold is checked when it is used.
    """

    prompt: str | tuple[Turn, ...]
    images: tuple[Picture, ...] = ()
    intervention: Intervention | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if not isinstance(self.intervention, Intervention | None):
            raise ValueError(f"intervention is {shorten(self.intervention, 40)}; expected an Intervention")
        of_turns = isinstance(self.prompt, tuple) and all(isinstance(turn, Turn) for turn in self.prompt)
        if not of_turns and not isinstance(self.prompt, str):
            raise ValueError(f"a prompt is a str or a tuple of Turn, not {shorten(self.prompt, 40)}")
        if isinstance(self.images, list):
            object.__setattr__(self, "images", tuple(self.images))
        if not isinstance(self.images, tuple):
            raise ValueError(f"images is a tuple, (image,) for a single one, not a {type(self.images).__name__}")
        for number, image in enumerate(self.images, 1):
            if not isinstance(image, bytes | Path | Image.Image):
                kind = "a str, which is never opened" if isinstance(image, str) else f"a {type(image).__name__}"
                raise ValueError(f"image {number} is {kind}; give bytes, a Path or a PIL image")

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns with one mark per image. Raises ValueError if they do not fit or nothing is asked."""
        if not isinstance(self.prompt, str):
            return check_turns(self.prompt, len(self.images))
        marks = "" if IMAGE_MARK in self.prompt else f"{IMAGE_MARK}\n" * len(self.images)
        return check_turns((Turn("user", marks + self.prompt),), len(self.images))

    def pictures(self) -> list[Image.Image]:
        """The images, upright, as 8-bit RGB. Raises ValueError, with the image's number, for one that cannot be used.

        Each call decodes them anew.
        """
        pictures = []
        for number, image in enumerate(self.images, 1):
            try:
                pictures.append(to_rgb(image))
            except ImageError as error:
                raise ValueError(f"image {number}: {error}") from error
        return pictures


def check_turns(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """`turns`, if a model can be asked with them and that many images; ValueError otherwise.

    The speakers take turns, the user first and last. Each turn says something, a user's in text or with an image.
    """
    if not turns or turns[-1].role != "user":
        raise ValueError("a request ends with a user's turn that holds text or an image")
    for number, turn in enumerate(turns, 1):
        expected = "user" if number % 2 else "assistant"
        if turn.role != expected:
            raise ValueError(f"turn {number} is by {shorten(turn.role, 20)}; expected {expected}: turns alternate")
        if not isinstance(turn.text, str):
            raise ValueError(f"turn {number} holds a {type(turn.text).__name__}; expected text")
        if wrong := unwritable_text(turn.text, f"turn {number}"):
            raise ValueError(f"{wrong}, which is no text")
        if expected == "assistant" and IMAGE_MARK in turn.text:
            raise ValueError(f"turn {number} is the assistant's and holds an {IMAGE_MARK} mark; only a user's may")
        if not turn.text.strip():
            if number == len(turns):
                raise ValueError("a request ends with a user's turn that holds text or an image")
            raise ValueError(f"turn {number} is empty; it needs text{' or an image' if expected == 'user' else ''}")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != images:
        raise ValueError(f"the prompt has {marks} {IMAGE_MARK} mark(s), but {images} image(s) were given")
    return tuple(turns)


def keep_mark(turns: Sequence[Turn], place: int, filler: str) -> tuple[Turn, ...]:
    """The turns with the one mark at `place` (from 0, over all turns) and no other, as if that image came alone.

    A turn that is left without text gets `filler`.
    """
    kept, seen = [], 0
    for turn in turns:
        pieces = turn.text.split(IMAGE_MARK)
        text = pieces[0]
        for piece in pieces[1:]:
            text += (IMAGE_MARK if seen == place else "") + piece
            seen += 1
        kept.append(Turn(turn.role, text if text.strip() else filler))
    return tuple(kept)


@dataclass(frozen=True)
class Prompter:
    """Makes the prompts of one model: its processor, and the most tokens that prompt and answer may have together."""

    processor: Any
    max_length: int | None = None

    def prepare(self, request: Request) -> ImageInputs | None:
        """The request's images after the image processor, None without images."""
        pictures = request.pictures()
        return prepare_images(pictures, self.processor) if pictures else None

    def prompt(
        self, turns: Sequence[Turn], images: ImageInputs | None, new_tokens: int, hint: str | None = None
    ) -> Encoded:
        """The prompt, to be followed by at most `new_tokens` tokens.

        `images` None: the images are counted by their marks. Raises ValueError, with the numbers, if it is too long.
        """
        encoded = encode(turns, self.processor, images=images, hint=hint, add_generation_prompt=True)
        length = len(encoded.input_ids)
        if self.max_length is not None and length + new_tokens > self.max_length:
            raise ValueError(
                f"the prompt has {length} tokens; with max_new_tokens {new_tokens} "
                f"that is more than the {self.max_length} of max_length"
            )
        return encoded


def text_positions(config: Any) -> int | None:
    """The positions of a base's language model, from its config; None if it names no number."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def length_limit(wanted: int | None, positions: int | None) -> int | None:
    """The limit of tokens, given what is asked for and what the base has. Raises ValueError for one beyond the base."""
    if wanted is None:
        return positions
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ValueError(f"max_length is {shorten(wanted)}; expected a whole number, at least 1")
    if positions is not None and wanted > positions:
        raise ValueError(f"max_length is {wanted}, but the base's language model has {positions} positions")
    return wanted


def check_count(name: str, value: int) -> None:
    """Raise ValueError for an argument, by its name, that is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {shorten(value)}; expected a whole number, at least 1")


def checked(requests: Sequence[Request], batch_size: int, on_error: OnError) -> list[Request]:
    """The requests, whose own content is not looked at. Raises ValueError for arguments that cannot be used."""
    check_count("batch_size", batch_size)
    if on_error not in ("block", "raise"):
        raise ValueError(f"on_error is {shorten(on_error)}; expected 'block' or 'raise'")
    if isinstance(requests, Request | str | bytes | Mapping) or not isinstance(requests, Iterable):
        raise ValueError(f"requests is a list of Request, [request] for a single one, not a {type(requests).__name__}")
    return list(requests)

"""A processor's chat template: conversations as text, and where in it answers, images and the hint are."""

from __future__ import annotations

import re
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from psa_fast.data.records import IMAGE_MARK, Turn
from psa_fast.files import shorten

# tokenizer -> (template, turns with harmless texts, ...) -> special ids that are the template's own
_template_tokens: weakref.WeakKeyDictionary[Any, dict[Any, list[int]]] = weakref.WeakKeyDictionary()
_KEPT_SHAPES = 4096


Span = tuple[int, int]


class Silent(NamedTuple):
    """Character spans that are neither answer nor query."""

    images: list[Span]
    hints: list[Span]


class ChatTemplate:
    """A processor's chat template and special tokens."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no EOS token, so no answer can end")
        self.image_token = processor.image_token
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = {*tokenizer.all_special_tokens, *added, self.image_token}
        # a tokenizer may call a plain word or a newline special: texts keep those
        marks = {token for token in special if len(token) > 2 and not token.isalnum()}
        self.special = re.compile(_alternatives(marks))
        # texts may hold unknown words; where one token serves as both, it is rather an end of the answer
        unknown = {tokenizer.unk_token} - {tokenizer.eos_token, tokenizer.bos_token, self.image_token}
        self.special_ids = {tokenizer.convert_tokens_to_ids(token): token for token in marks - unknown}
        opening = {self.image_token, tokenizer.unk_token, tokenizer.bos_token} - {tokenizer.eos_token}
        self.closing = re.compile(rf"\s*(?:{_alternatives(special - opening)})")

    def render(
        self, turns: Sequence[Turn], hint: str | None, add_generation_prompt: bool, placeholders: Sequence[str]
    ) -> tuple[str, list[Span], Silent]:
        """The text with answers closed and images expanded, and the spans of the answers and of what is silent."""
        last = _last_question(turns)
        hint_text = self.plain(hint.strip()) if hint else ""
        messages = self.messages(turns, hint)
        text = self._apply(messages, add_generation_prompt)

        answers: list[Span] = []
        edits: list[tuple[int, int, str]] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end, closed = self._answer(messages[: i + 1], text)
                answers.append((start, end))
                if not closed:
                    edits.append((end, end, self.tokenizer.eos_token))
        found = [match.span() for match in re.finditer(re.escape(self.image_token), text)]
        if len(found) != len(placeholders):
            raise ValueError(f"the chat template shows {len(found)} of {len(placeholders)} image(s)")
        edits += [(*span, placeholder) for span, placeholder in zip(found, placeholders, strict=True)]
        hints: list[Span] = []
        if hint_text:
            before = len(self._apply(messages[:last], False)) if last else 0
            start = text.find(hint_text, before)
            if start < 0:
                raise ValueError("the chat template does not show the hint as it is")
            end = start + len(hint_text)
            hints.append((start, end + text.startswith("\n", end)))
        text, moved = _edit(text, edits)
        # an image's span begins before its edit, and an answer's ends behind the EOS put at its end
        expanded = [(moved(end) - len(new), moved(end)) for (_, end), new in zip(found, placeholders, strict=True)]
        return (
            text,
            [(moved(a), moved(b)) for a, b in answers],
            Silent(expanded, [(moved(a), moved(b)) for a, b in hints]),
        )

    def messages(self, turns: Sequence[Turn], hint: str | None = None) -> list[dict[str, Any]]:
        """The conversation as `apply_chat_template` takes it, texts made plain, the hint before the last question."""
        last, hint_text = _last_question(turns), self.plain(hint.strip()) if hint else ""
        return [self._message(turn, hint_text if i == last else "") for i, turn in enumerate(turns)]

    def plain(self, text: str) -> str:
        """`text` with every special token broken by a blank: `</s>` becomes `< /s>`."""
        return self.special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def refuse_forged(
        self, ids: Sequence[int], turns: Sequence[Turn], add_generation_prompt: bool, placeholders: tuple[str, ...]
    ) -> None:
        """Raise ValueError if the row has a special token that the same turns with harmless texts have not.

        Looking at ids catches what no look at a text can: a template that joins `</` and `s>`, a tokenizer that
        normalises a full-width `［ＩＮＳＴ］`.
        """
        harmless = tuple(
            Turn(turn.role, IMAGE_MARK.join("a" if piece.strip() else "" for piece in turn.text.split(IMAGE_MARK)))
            for turn in turns
        )
        known = _template_tokens.setdefault(self.tokenizer, {})
        key = self.processor.chat_template, harmless, add_generation_prompt, placeholders
        if key not in known:
            if len(known) >= _KEPT_SHAPES:
                known.clear()
            text, _, _ = self.render(harmless, None, add_generation_prompt, placeholders)
            known[key] = [token for token in self.tokenize(text)[0] if token in self.special_ids]
        found = [token for token in ids if token in self.special_ids]
        if found != known[key]:
            forged = Counter(found) - Counter(known[key])
            token = self.special_ids[next(iter(forged), found[0] if found else known[key][0])]
            raise ValueError(f"a text of the conversation becomes the special token {token!r} in the chat template")

    def tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and character offsets; the tokenizer's own prefix (BOS) is put on unless the template wrote it."""
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        input_ids, offsets = list(plain["input_ids"]), [tuple(span) for span in plain["offset_mapping"]]
        bos = self.tokenizer.bos_token
        if bos is None or not text.startswith(bos):
            # with special tokens some tokenizers also append EOS, which must not follow a prompt: only take the prefix
            probe = self.tokenizer("a", add_special_tokens=False)["input_ids"][0]
            whole = self.tokenizer("a")["input_ids"]
            prefix = whole[: whole.index(probe)]
            input_ids, offsets = prefix + input_ids, [(-1, -1)] * len(prefix) + offsets
        return input_ids, offsets

    def adds_prefix(self, turns: Sequence[Turn], hint: str | None = None) -> bool:
        """Whether `tokenize` puts the tokenizer's own prefix before the prompt of these turns."""
        text, bos = self._apply(self.messages(turns, hint), True), self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _message(self, turn: Turn, hint: str) -> dict[str, Any]:
        pieces = turn.text.split(IMAGE_MARK)
        texts = [piece for piece in pieces if piece.strip()]
        content: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            if i:
                content.append({"type": "image"})
            if piece.strip():
                # blanks and newlines beside a mark are the record's layout, except between pieces of one sentence
                piece = self.plain(piece.strip() if len(texts) == 1 else piece)
                content.append({"type": "text", "text": f"{hint}\n{piece}" if hint else piece})
                hint = ""
        if hint:
            content.append({"type": "text", "text": hint})
        return {"role": turn.role, "content": content}

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            text: str = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except ValueError:
            raise
        except Exception as error:  # a template is a small program
            reason = shorten(f"{type(error).__name__}: {error}", 160)
            raise ValueError(f"the base's chat template cannot be used ({reason})") from error
        # a blank at the end would be a token of its own, whereas answers are tokenized with the blank before them
        return text.rstrip(" ") if add_generation_prompt else text

    def _answer(self, messages: list[dict[str, Any]], text: str) -> tuple[int, int, bool]:
        """Span in `text` of the last message's answer, and whether the template closes it itself."""
        prompt = self._apply(messages[:-1], True)
        answered = self._apply(messages, False)
        answer = "".join(part["text"] for part in messages[-1]["content"])
        start = answered.find(answer, len(prompt))
        if not answer or start < 0 or not answered.startswith(prompt):
            raise ValueError("the chat template does not show an answer as it is, right after its generation prompt")
        end = start + len(answer)
        closing = self.closing.match(answered, end)
        end = closing.end() if closing else end
        if not text.startswith(answered[:end]):
            raise ValueError("the chat template rewrites earlier turns, so their answers cannot be supervised")
        return len(prompt), end, closing is not None


def _last_question(turns: Sequence[Turn]) -> int:
    return max(i for i, turn in enumerate(turns) if turn.role == "user")


def _alternatives(tokens: Iterable[str | None]) -> str:
    """Pattern of any of the tokens, the longest first; matches nothing if there is none."""
    return "|".join(re.escape(token) for token in sorted(filter(None, tokens), key=len, reverse=True)) or "(?!)"


def _edit(text: str, edits: list[tuple[int, int, str]]) -> tuple[str, Callable[[int], int]]:
    """`text` with [start, end) replaced for each edit, and the map of an old position to its new one.

    A position at the end of an edit moves behind the new text.
    """
    edits = sorted(edits)
    pieces: list[str] = []
    position = 0
    for start, end, new in edits:
        pieces += [text[position:start], new]
        position = end
    ends = [end for _, end, _ in edits]
    shifts = [0, *accumulate(len(new) - (end - start) for start, end, new in edits)]
    return "".join([*pieces, text[position:]]), lambda old: old + shifts[bisect_right(ends, old)]


def stop_token_ids(processor: Any) -> list[int]:
    """Ids that end an answer: EOS and the token with which the chat template closes a turn (they may differ)."""
    template = ChatTemplate(processor)
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    text, (span,), _ = template.render(turns, hint=None, add_generation_prompt=False, placeholders=())
    closing = template.tokenizer(text[: span[1]], add_special_tokens=False)["input_ids"][-1]
    return sorted({closing, template.tokenizer.eos_token_id})

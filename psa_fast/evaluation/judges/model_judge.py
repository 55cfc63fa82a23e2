"""A judge that is a model: its format asks and reads, its asker gets the replies, the cache keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from psa_fast.evaluation.judges.contract import Answered, Asker, NoReply, Opinion, Reply
from psa_fast.evaluation.judges.judge_format import Format
from psa_fast.evaluation.judges.reply_cache import ReplyCache


class ModelJudge:
    """Asks about every answer once, several at a time. `calls` counts prompts that went to the model.

    `cache` must be open.
    """

    def __init__(self, form: Format, ask: Asker, cache: ReplyCache) -> None:
        self.form, self.ask, self.cache = form, ask, cache
        self.name, self.tells_refusals, self.harmless = form.name, form.tells_refusals, form.harmless
        self.calls = 0

    def judge(self, answers: Iterable[Answered]) -> Iterator[Opinion]:
        """One opinion for each answer, in order. A prompt without a reply is `failed`, and asked again another time.

        Raises ValueError for what would spoil every prompt: a key that is not taken, an image that is not there.
        """
        pool = ThreadPoolExecutor(max_workers=self.ask.workers)
        asked: dict[str, Future[Reply]] = {}
        pending = []
        try:
            for answered in answers:
                key = self._key(answered)
                if key not in asked and self.cache.get(key) is None:
                    asked[key] = pool.submit(self._ask, key, answered)
                pending.append((answered, key))
            self.calls += len(asked)
            for answered, key in pending:
                try:
                    reply = self.cache.get(key) or asked[key].result()
                except NoReply as error:
                    yield Opinion("failed", reason=str(error))
                else:
                    yield self.form.parse(reply, answered)
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, key: str, answered: Answered) -> Reply:
        reply = self.ask(self.form.prompt(answered))
        self.cache.put(key, reply)
        return reply

    def _key(self, answered: Answered) -> str:
        prompt = self.form.prompt(answered)
        content = [self.form.name, self.ask.model, prompt.to_json(), self.ask.digest(prompt)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Format, model and the hash of the wording; None where the model's own chat template asks."""
        wording = self.form.wording
        text = None if wording is None else json.dumps(dict(wording), sort_keys=True)
        return {
            "format": self.form.name,
            "model": self.ask.model,
            "wording_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
            "decoding": "greedy",
        }

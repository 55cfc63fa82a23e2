"""One thread that asks the guard: requests wait in a bounded queue and are read and answered in batches."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from psa_fast.safety.explanation import Explanation, explain
from psa_fast.safety.redecide import redecide
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_errors import ApiError, EngineDown

if TYPE_CHECKING:
    from psa_fast.safety.guard import Guard
    from psa_fast.safety.policy import Policy
    from psa_fast.safety.request import Request
    from psa_fast.safety.verdict import Answer, Verdict

_log = logging.getLogger("psa_fast.serve")


@dataclass(frozen=True)
class Result:
    """What the guard said to a request; `answer` is None where only a verdict was asked for.

    `queue_seconds` is the time the request waited, `model_seconds` the time that its batch took.
    `explanation` is there where it was asked for.
    """

    verdict: Verdict
    answer: Answer | None
    queue_seconds: float
    model_seconds: float
    explanation: Explanation | None = None


@dataclass
class _Job:
    request: Request
    new_tokens: int | None
    explain: bool = False
    future: Future[Result] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Asks a guard from a thread of its own.

    Args:
        guard: what answers; nobody else may ask it meanwhile.
        settings: `max_batch`, `max_wait` and `max_queue` count here.
        shadow: another policy, which decides on every request's readings after it is answered.
        on_shadow: told the request, the verdict that counted and the shadow's.
        on_batch: told the size of every batch.
    """

    def __init__(
        self,
        guard: Guard,
        settings: ServerSettings,
        shadow: Policy | None = None,
        on_shadow: Callable[[Request, Verdict, Verdict], object] = lambda request, verdict, shadow: None,
        on_batch: Callable[[int], object] = lambda size: None,
    ) -> None:
        self.guard, self.settings, self.shadow = guard, settings, shadow
        self._on_shadow, self._on_batch = on_shadow, on_batch
        self._queue: queue.Queue[_Job | None] = queue.Queue()
        # what waits, in the queue or taken out of it for a batch that is not asked yet
        self._waiting = 0
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="psa-fast guard", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closed

    def submit(
        self, requests: Sequence[Request], new_tokens: int | None = None, explain: bool = False
    ) -> list[Future[Result]]:
        """The results to come of requests, all of which are taken or none.

        Args:
            requests: what is asked.
            new_tokens: the longest answer; None: the verdict only.
            explain: whether each verdict is to be explained.

        Raises:
            ApiError: 429 where the queue is full, 503 where the server stops.
        """
        jobs = [_Job(request, new_tokens, explain) for request in requests]
        with self._lock:
            self.check_room(len(jobs))
            self._waiting += len(jobs)
            for job in jobs:
                self._queue.put(job)
        return [job.future for job in jobs]

    def check_room(self, count: int = 1) -> None:
        """Raise the ApiError that `submit` would raise for so many requests."""
        if not self.alive:
            raise ApiError(503, "the server is stopping", "server_error", code="stopping", retry_after=5)
        if self._waiting + count > self.settings.max_queue:
            raise ApiError(
                429,
                f"{self._waiting} requests wait already, of {self.settings.max_queue} that may; try again later",
                "rate_limit_error",
                code="queue_full",
                retry_after=1,
            )

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more, answer what waits, and end the thread; gives up after `timeout` seconds."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            with self._lock:
                self._waiting -= len(batch)
            # who gave up meanwhile is not read
            asked = [job for job in batch if job.future.set_running_or_notify_cancel()]
            groups: dict[int | None, list[_Job]] = {}
            for job in asked:
                # one limit a batch: the guard checks each prompt's length against it
                groups.setdefault(job.new_tokens, []).append(job)
            for jobs in groups.values():
                self._on_batch(len(jobs))
                self._answer(jobs)

    def _take(self) -> list[_Job] | None:
        """The next batch: what waits already, and what comes within `max_wait`; None at the end."""
        first = self._queue.get()
        if first is None:
            return None
        batch, deadline = [first], time.monotonic() + self.settings.max_wait
        while len(batch) < self.settings.max_batch:
            try:
                job = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._queue.put(None)  # the end comes after this batch
                break
            batch.append(job)
        return batch

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer jobs of one limit together; where that fails, one by one, so that none takes another with it."""
        start = time.monotonic()
        try:
            results = self._ask(jobs)
            explained = [
                explain(self.guard, job.request, verdict) if job.explain else None
                for job, (verdict, _) in zip(jobs, results, strict=True)
            ]
        except EngineDown as error:
            _log.error("a batch of %d has no answer: %s", len(jobs), error)
            for job in jobs:
                job.future.set_exception(error)
            return
        except Exception as error:  # out of memory, a fault of ours: the thread must go on
            if len(jobs) > 1:
                _log.warning("a batch of %d failed (%s); each is asked alone", len(jobs), type(error).__name__)
                for job in jobs:
                    self._answer([job])
                return
            _log.error("a request failed: %s", type(error).__name__, exc_info=error)
            jobs[0].future.set_exception(error)
            return
        seconds = time.monotonic() - start
        for job, (verdict, answer), why in zip(jobs, results, explained, strict=True):
            job.future.set_result(Result(verdict, answer, start - job.since, seconds, why))
        self._decide_shadow(jobs, [verdict for verdict, _ in results])

    def _ask(self, jobs: list[_Job]) -> list[tuple[Verdict, Answer | None]]:
        requests, new_tokens = [job.request for job in jobs], jobs[0].new_tokens
        size = self.settings.max_batch
        if new_tokens is None:
            return [(verdict, None) for verdict in self.guard.verdicts(requests, batch_size=size)]
        answers = self.guard.answer(requests, max_new_tokens=new_tokens, batch_size=size)
        return [(answer.verdict, answer) for answer in answers]

    def _decide_shadow(self, jobs: list[_Job], verdicts: list[Verdict]) -> None:
        if self.shadow is None:
            return
        try:
            for job, verdict in zip(jobs, verdicts, strict=True):
                if verdict.intervention is not None:  # what was forced is no verdict of a policy to compare with
                    continue
                self._on_shadow(job.request, verdict, redecide(self.shadow, verdict))
        except Exception as error:  # it must never change an answer
            _log.error("the shadow policy failed: %s", type(error).__name__, exc_info=error)

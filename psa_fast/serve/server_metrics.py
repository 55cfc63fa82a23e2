"""What a server tells Prometheus: requests, verdicts, latency by part, queue and batches."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from psa_fast.safety.verdict import Verdict

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ServerMetrics:
    """The counters of one server; `waiting` tells how many requests wait."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("psa_requests", "HTTP requests", ["endpoint", "status"], registry=registry)
        self.verdicts = Counter("psa_verdicts", "Verdicts", ["action", "code", "type"], registry=registry)
        self.interventions = Counter(
            "psa_interventions", "Verdicts after an operator's intervention", ["kind", "action"], registry=registry
        )
        self.shadow = Counter(
            "psa_shadow_verdicts",
            "What a shadow policy would do",
            ["action", "shadow_action"],
            registry=registry,
        )
        self.latency = Histogram(
            "psa_latency_seconds",
            "Latency by part: parse, queue (waiting), model (the whole batch), total",
            ["endpoint", "part"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch = Histogram(
            "psa_batch_size", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        Gauge("psa_queue_length", "Requests that wait", registry=registry).set_function(waiting)

    def count_verdict(self, verdict: Verdict) -> None:
        """Count a verdict that was given to a client; one that was intervened on by itself, among no others."""
        if verdict.intervention is not None:
            self.interventions.labels(verdict.intervention.kind, verdict.action).inc()
            return
        self.verdicts.labels(verdict.action, verdict.code, verdict.type or "").inc()

    def count_shadow(self, verdict: Verdict, shadow: Verdict) -> None:
        """Count what a shadow policy would have done beside what was done."""
        self.shadow.labels(verdict.action, shadow.action).inc()

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)

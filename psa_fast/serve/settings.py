"""What a server is told when it starts: names, limits, keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from psa_fast.files import shorten


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server; every request beyond one is refused with an error.

    Attributes:
        model_name: what clients call the model.
        max_body_mb: of a request's body, in MiB.
        max_images: of a request.
        max_pixels: of a picture.
        max_inputs: texts that one moderation may hold.
        max_new_tokens: of an answer, where the request names no number, and the most that it may name.
        max_batch: requests that the model reads together.
        max_wait: seconds that a request waits for others to share its batch.
        max_queue: requests that may wait.
        timeout: seconds after which a request that is not answered yet is given up.
    """

    model_name: str = "psa"
    max_body_mb: int = 20
    max_images: int = 8
    max_pixels: int = 25_000_000
    max_inputs: int = 32
    max_new_tokens: int = 128
    max_batch: int = 16
    max_wait: float = 0.01
    max_queue: int = 64
    timeout: float = 120.0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the option, for a limit that is none."""
        if not self.model_name.strip() or not self.model_name.isprintable():
            raise ValueError(f"--model_name is {shorten(self.model_name)}; expected a name")
        for field in fields(self):
            value = getattr(self, field.name)
            least = {"max_wait": 0.0, "timeout": 0.1}.get(field.name, 1)
            if isinstance(value, float | int) and not (math.isfinite(value) and value >= least):
                raise ValueError(f"--{field.name} is {shorten(value)}; expected at least {least:g}")
        if self.max_inputs > self.max_queue:
            raise ValueError(
                f"--max_inputs is {self.max_inputs}, but only --max_queue {self.max_queue} requests may wait"
            )

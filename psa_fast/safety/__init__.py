"""Safety at inference: the policy (policy.py, needs no torch), the guard (guard.py) and `psa-fast generate`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psa_fast.safety.guard import Guard
    from psa_fast.safety.intervention import Intervention
    from psa_fast.safety.load import load_guard
    from psa_fast.safety.policy import Decision, Policy
    from psa_fast.safety.request import Request
    from psa_fast.safety.verdict import Answer, Verdict

# looked up on use, so that the policy alone stays a light import
_HOME = {
    "guard": ("Guard",),
    "intervention": ("Intervention",),
    "load": ("load_guard",),
    "policy": ("Decision", "Policy"),
    "request": ("Request",),
    "verdict": ("Answer", "Verdict"),
}

__all__ = ["Answer", "Decision", "Guard", "Intervention", "Policy", "Request", "Verdict", "load_guard"]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

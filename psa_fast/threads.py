"""How OpenMP's threads wait for one another. To be called before torch is imported."""

from __future__ import annotations

import os

_SPINS = "2000"


def choose_waiting() -> None:
    """Let threads that wait spin for microseconds, then sleep; where ranks share a machine, sleep at once.

    Threads that spin as long as they like, OpenMP's default, starve each other where jobs share the cores; threads that
    never spin are woken by the kernel thousands of times a step. The sandbox's base on 2 cores, 40 + 25 steps: 6.2 s
    with the default, 7.0 so, 10.1 without spinning; two such jobs at once: minutes, 15.3, 11.6. What the user has set,
    OMP_WAIT_POLICY or GOMP_SPINCOUNT, stays.
    """
    # a rank inherits what the command that starts it has chosen for itself
    inherited = os.environ.get("GOMP_SPINCOUNT") == _SPINS
    if "OMP_WAIT_POLICY" in os.environ or ("GOMP_SPINCOUNT" in os.environ and not inherited):
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    else:
        os.environ.pop("GOMP_SPINCOUNT", None)  # it would overrule the policy
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

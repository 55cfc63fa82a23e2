"""What another policy says to a request that was read already; no model is asked."""

from __future__ import annotations

from dataclasses import replace

from psa_fast.safety.policy import Policy
from psa_fast.safety.verdict import Verdict, decided, unread_verdict


def redecide(policy: Policy, verdict: Verdict) -> Verdict:
    """The verdict that a guard of the same model would have given to the same request under `policy`.

    Raises ValueError for a verdict that was read, but whose readings were not kept, and for a policy that was
    calibrated on another model.
    """
    policy.require_model(verdict.model_hash)
    signed = {"policy_hash": policy.hash, "model_hash": verdict.model_hash}
    if verdict.code == "not_checked":  # blocked under every policy
        return replace(verdict, **signed)  # type: ignore[arg-type]
    if verdict.code == "no_image" or verdict.code == "no_head":
        found = unread_verdict(verdict.code, policy.on_error)
        return replace(found, applied=policy.on_error == "block", **signed)  # type: ignore[arg-type]
    if not verdict.readings:
        raise ValueError("the verdict's readings were not kept, so no other policy can decide on them")
    types = len(policy.taxonomy.types)
    readings = [reading.under(policy.temperatures, types) for reading in verdict.readings]
    found, _ = decided(policy, readings, verdict.intervention)
    return replace(found, **signed)  # type: ignore[arg-type]

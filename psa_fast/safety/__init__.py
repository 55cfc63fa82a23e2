"""Safety at inference: the policy (policy.py, needs no torch), the guard around a model (guard.py), `psa-fast generate`."""

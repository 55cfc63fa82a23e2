"""Safety at inference: the policy (policy.py, needs no torch), the guard (guard.py) and `psa-fast generate`."""

"""Attacks on a guard: what an attacker who knows it can do, and the checks that such a measurement is honest."""

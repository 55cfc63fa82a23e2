"""What is chosen for OpenMP's threads, for one process, for ranks, and where the user has chosen."""

import os

import pytest

from psa_fast.threads import choose_waiting

ONE, RANKS = {"GOMP_SPINCOUNT": "2000"}, {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, ONE),
        ({"WORLD_SIZE": "1"}, ONE),
        ({"WORLD_SIZE": "2"}, RANKS),
        # `psa-fast train --num_gpus 2` has chosen for itself before it starts the ranks
        ({"WORLD_SIZE": "2", **ONE}, RANKS),
        ({"OMP_WAIT_POLICY": "ACTIVE", "WORLD_SIZE": "2"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7", "WORLD_SIZE": "2"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_waiting(monkeypatch, before, after):
    monkeypatch.setattr(os, "environ", dict(before))
    choose_waiting()
    assert {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} == after

"""A sample of what the scripts here do at length: no damage goes unnoticed, no kill changes what a run ends with."""

import bench_kills
import damage
import kills
import pytest


def test_random_damage_of_caches_is_named_and_healed(tmp_path):
    results = damage.caches(tmp_path, 24, seed=1)
    assert len(results) == 24
    assert {result["way"] for result in results} == {way.__name__ for way in damage.WAYS}
    assert [result for result in results if result["outcome"] != "healed"] == []
    assert sum(result["lost"] for result in results) > 24


def test_random_damage_of_checkpoints_is_named(tmp_path):
    results = damage.checkpoints(tmp_path, damage.make_run(tmp_path), 24, seed=1)
    assert len({result["file"] for result in results}) > 3
    assert [result for result in results if result["outcome"] != "named"] == []


@pytest.mark.slow
def test_a_run_killed_in_a_save_ends_with_the_right_weights(tmp_path):
    results = kills.run(tmp_path, kills=0, in_save=1, seed=2, per_run=1, two_ranks_every=0)
    assert all(result["same"] for result in results), results
    assert any(moment.startswith("in the save") for result in results for moment in result["kills"])


def test_a_benchmark_killed_and_begun_again_gives_the_same_report(tmp_path):
    results = bench_kills.run(tmp_path, kills=3, seed=4, two_ranks_every=0)
    assert all(result["same"] for result in results), results

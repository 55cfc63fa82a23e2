"""What DeepSpeed keeps private, on stand-ins; the real optimizers are in tests/training/test_optimizer_state.py."""

from types import SimpleNamespace

import pytest
import torch

from psa_fast.compat.deepspeed import full_shape, gathered, is_partitioned, layout, shard, swapped_in


def test_a_whole_parameter_is_left_alone():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert not is_partitioned(parameter)
    assert full_shape(parameter) == (2, 3)
    with gathered([parameter], modifier_rank=0):
        parameter.data += 1
    assert parameter.sum() == 12


@pytest.mark.parametrize(("numel", "ranks"), [(7, 2), (3, 4), (8, 4)])
def test_shards_cover_a_parameter_once(numel, ranks):
    room = -(-numel // ranks)
    parameter = SimpleNamespace(partition_numel=lambda: room, ds_numel=numel)
    covered = []
    for rank in range(ranks):
        start, own, taken = shard(parameter, rank)
        assert taken == room
        covered += range(start, start + own)
    assert covered == list(range(numel))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="--deepspeed_config: the state of DeepSpeed's SimpleNamespace"):
        layout(SimpleNamespace())


@pytest.mark.parametrize("changed", [False, True])
def test_a_group_on_nvme_comes_and_goes(changed):
    calls = []
    optimizer = SimpleNamespace(
        _swappable_optimizer_subgroup=lambda i: i == 1,
        _optimizer_states_and_gradient_swap_in=lambda i: calls.append(("in", i)),
        _optimizer_states_and_gradient_swap_out=lambda i: calls.append(("out", i)),
        _release_swap_buffers=lambda i: calls.append(("release", i)),
    )
    for index in (0, 1):
        with swapped_in(optimizer, index, changed):
            calls.append("work")
    assert calls == ["work", ("in", 1), "work", ("out" if changed else "release", 1)]

"""Pieces of the loop that whole runs do not reach."""

import pytest
import torch

from psa_fast.training.loop import _stop_if_not_finite


def test_a_loss_that_is_not_finite_names_the_step_and_the_rows(group_of_one):
    micros = [{"where": ["a.jsonl:3", "a.jsonl:9"]}, {"where": ["a.jsonl:4"]}]
    _stop_if_not_finite(torch.tensor([1.0, 2.0]), micros, 7)
    with pytest.raises(FloatingPointError, match=r"step 7; rows of the batch: a\.jsonl:3, a\.jsonl:9, a\.jsonl:4"):
        _stop_if_not_finite(torch.tensor([1.0, float("nan")]), micros, 7)

"""Every numeric option has a range, held wherever its value comes from."""

import dataclasses
import math

import pytest

from psa_fast.training.config import check, parse_args
from psa_fast.training.options import OPTIONS, TrainConfig, checked, from_text, from_yaml, kind_of

NUMERIC = [name for name in OPTIONS if kind_of(name) in ("int", "float") and name != "stage"]
# name -> (values at the edge that are fine, values just beyond)
EDGES = {
    "seed": ((-(2**63), 2**63 - 1), (-(2**63) - 1, 2**63)),
    "max_length": ((1,), (0, 2**31)),
    "warmup_steps": ((0,), (-1, 2**31)),
    "save_steps": ((0,), (-1,)),
    "save_total_limit": ((1,), (0,)),
    "clean_samples": ((0,), (-1,)),
    "max_steps": ((1,), (0,)),
    "global_batch_size": ((1,), (0, 10**9)),
    "micro_batch_size": ((1,), (0, 10**9)),
    "max_tokens_per_micro_batch": ((1,), (0,)),
    "num_safety_tokens": ((0,), (-1, 10**6)),
    "num_head_tokens": ((0,), (-1, 3 * 10**7)),
    "num_attention_heads": ((1,), (0, -8)),
    "projector_depth": ((1, 64), (0, 65)),
    "query_window": ((0,), (-1, 10**7)),
    "eval_every": ((1,), (0, 2**31)),
    "eval_batch_size": ((1,), (0, 10**9)),
    "dataloader_num_workers": ((0,), (-1, 10**6)),
    "lora_r": ((1,), (0,)),
    "lora_alpha": ((1,), (0, -16)),
    "local_rank": ((-1, 0), (-2,)),
    "num_train_epochs": ((0.01, 1000.0), (0.0, -1.0, 1e300)),
    "learning_rate": ((1e-12, 1.0), (0.0, -1e-5, 1e5)),
    "token_learning_rate": ((0.0, 1.0), (-1e-9, 2.0)),
    "safety_learning_rate": ((0.0, 1.0), (-1e-9, 2.0)),
    "connector_learning_rate": ((0.0, 1.0), (-1e-9, 2.0)),
    "weight_decay": ((0.0, 1.0), (-0.1, 1.1)),
    "adam_beta1": ((0.0, 0.999), (-0.1, 1.0)),
    "adam_beta2": ((0.0, 0.999), (-0.1, 1.0)),
    "max_grad_norm": ((0.0, 1e6), (-1.0,)),
    "lora_dropout": ((0.0, 0.9), (-0.1, 1.0)),
    "hint_rate": ((0.0, 1.0), (-0.1, 1.1)),
    "label_smoothing": ((0.0, 1.0), (-0.1, 1.1)),
    "concept_loss_weight": ((0.0, 10.0), (-0.1, 1e9)),
    "lm_loss_weight": ((0.0, 10.0), (-0.1, 1e9)),
    "adversarial_weight": ((0.0, 1e6), (-0.1, 1e7)),
    "adversarial_start": ((0.0, 0.99), (-0.1, 1.0)),
    "adversarial_eps": ((0.5, 255.0), (0.0, 256.0)),
    "adversarial_steps": ((1, 1000), (0, 1001)),
    "feature_steps": ((0,), (-1,)),
    "feature_clean_weight": ((0.0, 1e6), (-0.1, 1e7)),
    "concept_steps": ((0,), (-1,)),
    "concept_tie": ((0.0, 1e6), (-0.1, 1e7)),
    "concept_head_learning_rate": ((1e-12, 1.0), (0.0, 2.0)),
}


def test_no_number_is_without_its_edges_here():
    assert set(EDGES) == set(NUMERIC)


@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_is_held_to_its_range_on_the_command_line_in_a_recipe_and_in_code(name):
    fine, beyond = EDGES[name]
    for value in fine:
        assert from_text(name, repr(value)) == from_yaml(name, value) == checked(name, value) == value
    for value in (*beyond, math.nan, math.inf, -math.inf):
        for convert, given in ((from_text, repr(value)), (from_yaml, value), (checked, value)):
            with pytest.raises(ValueError, match=f"--{name} is .*; expected a "):
                convert(name, given)
    for value in (True, "many", [], {}):
        with pytest.raises(ValueError, match=f"--{name} is .*; expected a "):
            from_yaml(name, value)
    for text in ("True", "", "1e", "0x10", "9" * 5000, "\uff11\uff12", "1_0", " 1"):
        with pytest.raises(ValueError, match=f"--{name} is .*; expected a ") as error:
            from_text(name, text)
        assert len(str(error.value)) < 250


def test_defaults_are_within_their_own_ranges():
    for field in dataclasses.fields(TrainConfig):
        if field.default is not None:
            assert checked(field.name, field.default) == field.default


def test_a_configuration_made_in_code_is_checked_too():
    config = parse_args([])
    config.adam_beta2 = 1.0
    with pytest.raises(ValueError, match=r"--adam_beta2 is 1\.0; expected a number of at least 0 and less than 1"):
        check(config)


@pytest.mark.parametrize("text", ["", "a" * 5000, "a\0b", "\udcff"])
def test_a_text_that_is_no_name_is_refused_before_it_is_used(text):
    with pytest.raises(ValueError, match=r"--model_name_or_path is .*; expected text of 1 to 4096 characters") as error:
        from_text("model_name_or_path", text)
    str(error.value).encode()

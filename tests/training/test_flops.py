"""The FLOP model against torch's own counter on a tiny model, stage by stage."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from builders.tiny_vlm import SMALL, make_batch, make_vlm
from torch.utils.flop_counter import FlopCounterMode

from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.models import PsaConfig, PsaVLM
from psa_fast.ops import attention_pool
from psa_fast.training.config import TrainConfig
from psa_fast.training.flops import Load, StageFlops, matrix_rate
from psa_fast.training.stages import prepare

STAGES = {
    "joint": dict(stage=1),
    "joint, tokens frozen": dict(stage=1, token_learning_rate=0.0),
    "concept": dict(stage=1, stage1_objective="concept"),
    "tokens": dict(stage=1, stage1_objective="tokens"),
    "lora": dict(stage=2, concept_loss_weight=0.0),
    "full": dict(stage=2, tune_type_llm="full", tune_type_connector="full"),
}


def depthwise_too(grad, x, weight, *rest, **_):
    """torch's formula overlooks groups; rest ends in which gradients are asked for (input, weight, bias)."""
    return (rest[-1][0] + rest[-1][1]) * 2 * math.prod(grad) * math.prod(weight[1:])


def inside(op):
    """The products inside an op that the counter cannot look into: run again under a counter of its own."""

    def formula(*args, out_val=None, **kwargs):
        with FlopCounterMode(display=False) as counter:
            op._init_fn(*args, **kwargs)
        return counter.get_total_flops()

    formula._get_raw = True
    return formula


def counter():
    pool = sys.modules[attention_pool.__module__]
    mapping = {
        torch.ops.aten.convolution_backward: depthwise_too,
        torch.ops.psa_fast.attention_pool: inside(pool._attention_pool),
        torch.ops.psa_fast.attention_pool_backward: inside(pool._attention_pool_backward),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_costs_what_torch_counts(name):
    config = TrainConfig(lora_r=4, lora_dropout=0.0, **STAGES[name])
    vlm = make_vlm(layers=3)
    # products that the counter sees; SDPA's CPU kernel has no formula
    vlm.set_attn_implementation("eager")
    model = PsaVLM.build(vlm, num_safety_tokens=4, **SMALL)
    prepare(model, config)
    one = make_batch(4, counts=(1,))
    batch = {k: torch.cat([v] * 3) for k, v in one.items()}
    batch |= {f"{whose}_{head}": batch[f"safe_{head}"] for whose in ("picture", "words") for head in ("type", "level")}
    load = Load.of(batch, model.config)
    if not config.runs_bottleneck:
        batch = {k: v for k, v in batch.items() if not k.startswith(("safe_", "picture_", "words_"))}
    if not config.runs_language_model:
        del batch["labels"]
    with counter() as counted:
        model.train()(**batch).loss.backward()
    parts = StageFlops.of(model, config).parts(load)
    length = one["labels"].shape[1]
    # eager attention multiplies the masked half as well, which ours leaves out
    parts["attention"] *= 2 * length / (length + 1)
    # not in ours: rotary angles, the mean of the prompt's embeddings
    assert sum(parts.values()) == pytest.approx(counted.get_total_flops(), rel=0.01)
    # a part of each kind is there or not as the stage wants it
    has = {part for part, flops in parts.items() if flops}
    language = {"language_model", "attention", "lm_head", "connector"} if config.runs_language_model else set()
    assert has == {"vision"} | language | ({"bottleneck", "pooling", "words"} if config.runs_bottleneck else set())


def test_the_load_of_packed_and_padded_rows():
    batch = make_batch(4, counts=(1, 2, 0))
    psa = PsaConfig(24, 40, 16, num_attention_heads=5)
    old = PsaConfig(24, 40, 16, num_attention_heads=5, neutral_query=False, query_window=0, reads_text=False)
    load = Load.of(batch, old)
    lengths = [1 + 20 + 5 + 4, 1 + 40 + 6 + 5, 1 + 7 + 6]
    assert load.tokens == sum(lengths)
    assert load.positions == 3 * max(lengths)
    assert load.pairs == sum(n * (n + 1) // 2 for n in lengths)
    assert (load.samples, load.images, load.concept_rows, load.word_rows) == (3, 3, 2, 0)
    assert load.supervised == 4 + 5 + 6
    assert (load.typed, load.levelled) == (2, 2)  # the third row has no image
    batch |= {"picture_type": torch.tensor([1, -100, 6]), "picture_level": torch.tensor([-100, -100, -100])}
    assert Load.of(batch, old) == load
    load = Load.of(batch, replace(psa, num_text_tokens=0))
    # three requests by prompt and window, and one picture whose type is known
    assert (load.concept_rows, load.word_rows, load.typed, load.levelled) == (3, 0, 7, 6)
    batch |= {"words_type": torch.tensor([6, 1, 2]), "words_level": torch.tensor([0, -100, 2])}
    load = Load.of(batch, psa)
    # the words of the second are risky by themselves, and the third has no picture: the first request is asked of its
    # picture by prompt and window, all words by both, and one picture whose type is known
    assert (load.concept_rows, load.word_rows, load.typed, load.levelled) == (2, 3, 2 + 6 + 1, 2 + 4)
    real = batch["attention_mask"].bool()
    packed = {k: batch[k][real].unsqueeze(0) for k in ("input_ids", "labels")}
    packed |= {k: batch[k] for k in ("image_counts", *CONCEPT_LABELS)}
    again = Load.of(packed | {"lengths": lengths}, psa)
    assert again == Load(**{**vars(load), "positions": sum(lengths)})


def test_cached_features_leave_the_tower_out(tmp_path):
    model = PsaVLM.build(make_vlm(), num_safety_tokens=4, **SMALL)
    cached = TrainConfig(stage=1, stage1_objective="concept", feature_cache=str(tmp_path))
    assert StageFlops.of(model, cached).vision == 0


def test_the_matrix_rate_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    assert matrix_rate(torch.device("cpu"), torch.float32, n=64, seconds=0.01) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_hybrid_towers_embedding_counts_its_convolutions():
    """The oracle is torch's own counter, on the sandbox's tower."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    from psa_fast.sandbox.vision import tower_config
    from psa_fast.training.flops import _hybrid_embedding

    tower = AutoModel.from_config(tower_config(32, 1, 2, (8, 32, 64, 32)))
    with FlopCounterMode(display=False) as counter:
        tower.embeddings(torch.zeros(1, 3, 96, 96))
    assert _hybrid_embedding(tower, 96) == counter.get_total_flops()

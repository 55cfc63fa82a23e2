"""The plan: parameters by hand, states against DeepSpeed's estimators."""

import dataclasses
import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from psa_fast.planning.memory import Machine, estimate, measure, model_states, remedies
from psa_fast.training.config import parse_args, read_deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
LLAVA_7B = 7_063_427_072
GIB = 2**30


def options(*argv):
    return parse_args([*map(str, argv), "--data_path", "-", "--image_folder", "-"])


def llama_parameters(vocabulary, width, inner, layers):
    """Untied embeddings, four square projections, three of the MLP, two norms a layer, one at the end."""
    return 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width


@pytest.fixture(scope="module")
def sizes():
    return {stage: measure(options("--recipe", "llava-1.5-7b", "--stage", stage)) for stage in (1, 2)}


def test_parameters_are_counted_exactly(sizes):
    stage1, stage2 = sizes[1], sizes[2]
    safety = stage1.total - LLAVA_7B
    # in stage 1 all that is added to the base is trained, and nothing else
    assert stage1.trained == safety
    layer = 12 * 1024**2 + 13 * 1024
    assert stage1.vision == 24 * layer + (3 * 14 * 14 + 1 + 577 + 4) * 1024  # CLIP ViT-L/14 at 336
    e, tokens = 4096, 64
    attention = 4 * e**2 + 4 * e
    readout = e**2 + 2 * e
    heads = 11 * (e + 1)
    projector = safety - (attention + readout + heads + 3 * tokens * e + e)
    assert projector == safety_projector_parameters(1024, 1088, e)
    lora = 32 * 256 * (4 * (e + e) + 2 * (e + 11008) + (11008 + e))
    assert stage2.parts["LoRA r=256 on the language model"] == lora
    assert stage2.trained == lora + tokens * e  # the recipe's stage 2 has no concept loss
    assert stage2.total == stage1.total + lora


def test_the_concept_objective_has_no_decoder_layers(sizes):
    config = options("--recipe", "llava-1.5-7b", "--stage", 1, "--stage1_objective", "concept")
    found = measure(config)
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert sizes[1].total - found.total == layers
    assert sizes[1].trained - found.trained == 64 * 4096  # the language model's safety tokens
    assert set(estimate(config, found, Machine(1, 24)).step) == {"concept bottleneck", "vision tower and connector"}


def safety_projector_parameters(vision, c, e):
    def block(cin):
        reduced = max(1, round(cin / 4))
        convs = cin * c + 9 * c + c * c
        gate = c * reduced + reduced + reduced * c + c
        return convs + gate + 3 * 2 * c + (cin * c + 2 * c if cin != c else 0)

    return block(vision) + 5 * block(c) + c * e


def test_thirteen_billion_and_full_tuning():
    config = options(
        "--recipe", "llava-1.5-13b", "--stage", 2, "--tune_type_llm", "full", "--tune_type_connector", "full"
    )
    found = measure(config)
    language = llama_parameters(32064, 5120, 13824, 40)
    connector = (1024 + 1) * 5120 + (5120 + 1) * 5120
    assert found.parts["language model"] == language
    assert found.parts["VLM projector"] == connector
    assert found.trained == language + connector + 64 * 5120
    # the same CLIP tower as the 7B model has, whose total is published
    tower = LLAVA_7B - llama_parameters(32064, 4096, 11008, 32) - (1024 + 1) * 4096 - (4096 + 1) * 4096
    assert tower == 303_507_456
    assert 0 < found.total - (language + connector + tower) < 0.03 * found.total
    assert found.head_trained


@pytest.mark.parametrize(("gpus", "nodes"), [(8, 1), (8, 2)])
def test_states_agree_with_deepspeed_where_everything_is_trained(gpus, nodes):
    total, largest, world = LLAVA_7B - LLAVA_7B % 16, 10**6, gpus * nodes
    share = total // world

    def theirs(**offload):
        host, gpu, layer = estimate_zero3_model_states_mem_needs(
            total, largest, gpus, nodes, zero_init=True, additional_buffer_factor=1, **offload
        )
        return host, gpu - layer

    def ours(**offload):
        zero = {"stage": 3, **{f"offload_{part}": {"device": "cpu"} for part in offload}}
        states = model_states(total, total, zero, world)
        standing = sum(size for name, size in states.gpu.items() if name not in ("reduce bucket", "gathered layers"))
        return sum(states.host.values()) * gpus, standing + states.gpu_at_step

    # DeepSpeed's figure for ZeRO-3 leaves out the bf16 gradients (its ZeRO-2 one has them): 2 bytes
    assert ours()[1] == theirs(cpu_offload=False, cpu_offload_params=False)[1] + 2 * share
    host, gpu = theirs(cpu_offload=True, cpu_offload_params=False)
    assert ours(optimizer=1) == (host + 2 * share * gpus, gpu)
    host, gpu = theirs(cpu_offload=True, cpu_offload_params=True)
    assert ours(optimizer=1, param=1) == (host + 2 * share * gpus, gpu)

    states = model_states(total, total, {"stage": 2, "overlap_comm": False}, world)
    bucket = states.gpu.pop("reduce buckets")
    assert bucket == 2 * 500_000_000
    _, gpu = estimate_zero2_model_states_mem_needs(total, gpus, nodes, cpu_offload=False)
    assert sum(states.gpu.values()) + states.gpu_at_step == gpu


def test_frozen_parameters_cost_their_weights_only():
    """7e9 parameters of which 1.6e8 are trained, on 8 GPUs: by hand."""
    states = model_states(7_000_000_000, 160_000_000, {"stage": 3}, 8)
    assert states.gpu["weights (bf16)"] == 1_750_000_000
    assert states.gpu["gradients (bf16)"] == 40_000_000
    assert states.gpu["master weights, Adam (fp32)"] == 240_000_000
    assert states.gpu_at_step == 80_000_000
    assert states.gpu["gathered layers"] == 2_100_000_000
    alone = model_states(7_000_000_000, 160_000_000, {"stage": 3}, 1)
    assert "gathered layers" not in alone.gpu  # there is nobody to gather from
    replicated = model_states(7_000_000_000, 160_000_000, {"stage": 2}, 8)
    assert replicated.gpu["weights (bf16)"] == 14_000_000_000
    nvme = {"stage": 3, "sub_group_size": 10_000_000, "offload_optimizer": {"device": "nvme", "buffer_count": 4}}
    swapped = model_states(7_000_000_000, 160_000_000, nvme, 8)
    assert swapped.nvme == 20_000_000 * 16
    assert swapped.host == {"gradients (bf16)": 40_000_000, "NVMe swap buffers": 160_000_000}
    with pytest.raises(ValueError, match="the DeepSpeed configuration says stage 1"):
        model_states(10, 1, {"stage": 1}, 1)


def peak(sizes, machine=None, images=1, **changes):
    config = dataclasses.replace(options("--recipe", "llava-1.5-7b", "--stage", 1), **changes)
    return estimate(config, sizes, machine or Machine(8, 80), images).gpu_peak


def test_more_work_needs_more_memory_and_more_gpus_less(sizes):
    least = peak(sizes[1])
    assert peak(sizes[1], micro_batch_size=4) > least
    assert peak(sizes[1], max_length=4096) > least
    modes = ("none", "every_8", "every_2", "full")
    peaks = [peak(sizes[1], gradient_checkpointing=mode) for mode in modes]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(modes)
    assert peaks[-1] == least
    assert peak(sizes[1], deepspeed_config="ds_configs/zero2.json") > least
    # a mask over padded rows, scores of each, scores of both in one packed row
    eager = {"attn_implementation": "eager"}
    padded = peak(sizes[1], packing=False)
    assert least < padded < peak(sizes[1], packing=False, **eager) < peak(sizes[1], **eager)
    assert peak(sizes[1], packing=False, attn_implementation="flash_attention_2") == least
    assert peak(sizes[1], images=2) > least
    assert peak(sizes[1], deepspeed_config="ds_configs/zero3_offload.json") < least
    assert peak(sizes[1], Machine(4, 80)) > least > peak(sizes[1], Machine(8, 80, nodes=2))
    assert peak(sizes[1], stage1_objective="tokens") < least


def test_remedies_fit_and_each_is_needed(sizes):
    config = dataclasses.replace(
        options("--recipe", "llava-1.5-7b", "--stage", 2), gradient_checkpointing="none", micro_batch_size=16
    )
    machine = Machine(1, 24)
    assert not estimate(config, sizes[2], machine).fits
    (together,) = remedies(config, sizes[2], machine)
    assert len(together.options) > 1
    assert together.estimate.fits
    changed = dataclasses.replace(config, **together.options)
    assert estimate(changed, sizes[2], machine).gpu_peak == together.estimate.gpu_peak
    # where one option is enough, each that is enough is named
    config = dataclasses.replace(config, micro_batch_size=8)
    single = remedies(config, sizes[2], Machine(8, 80))
    assert {next(iter(found.options)) for found in single} >= {"gradient_checkpointing", "micro_batch_size"}
    assert all(len(found.options) == 1 and found.estimate.fits for found in single)
    assert remedies(config, sizes[2], Machine(1, 4)) == []


def test_a_token_budget_takes_the_place_of_full_rows(sizes):
    machine = Machine(8, 80)
    config = options("--recipe", "llava-1.5-7b", "--stage", 2)
    rows = estimate(config, sizes[2], machine).step
    budget = dataclasses.replace(config, max_tokens_per_micro_batch=2 * 2048)
    step = estimate(budget, sizes[2], machine).step
    assert step["language model activations"] == rows["language model activations"]
    # six images of 576 + 64 tokens could lie in it, the two rows hold one each
    assert step["vision tower and connector"] == 3 * rows["vision tower and connector"]
    assert estimate(dataclasses.replace(budget, max_length=1024), sizes[2], machine).step == step
    large = dataclasses.replace(config, max_tokens_per_micro_batch=32768, gradient_checkpointing="none")
    found = [remedy.options for remedy in remedies(large, sizes[2], machine)]
    assert {"max_tokens_per_micro_batch": 8192} in found
    assert not any("micro_batch_size" in options for options in found)
    small = dataclasses.replace(large, max_tokens_per_micro_batch=2048)
    assert {"max_length": 1024, "max_tokens_per_micro_batch": 1024} in [
        remedy.options for remedy in remedies(small, sizes[2], Machine(8, 24))
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_deepspeeds(path):
    zero = json.loads(path.read_text())["zero_optimization"]
    assert read_deepspeed_config(f"ds_configs/{path.name}")["zero_optimization"] == zero
    text = json.dumps(zero).replace('"auto"', "true")
    parsed = DeepSpeedZeroConfig(**json.loads(text))
    known = set(DeepSpeedZeroConfig.model_fields) | {f.alias for f in DeepSpeedZeroConfig.model_fields.values()}
    assert set(zero) <= known
    assert parsed.stage == zero["stage"]

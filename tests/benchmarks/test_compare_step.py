"""The step benchmarks on a tiny model: B0 computes what we compute, the results have their schema."""

import dataclasses
import json
import os

import compare_step
import profile_step
import pytest
import speed_tables
import torch
from baselines.official import Official
from baselines.stock import Stock
from ladder import CUDA
from step_flops import AGAINST
from step_forms import PARTS, Ours, total
from step_measure import Counter, peak_memory
from step_model import SIZES, build_base
from step_rows import Rows, grouped_by_length

SIZE = SIZES["tiny"]


@pytest.fixture(scope="module")
def base():
    return build_base(SIZE)


@pytest.fixture(scope="module")
def rows(base, tmp_path_factory):
    return Rows(tmp_path_factory.mktemp("rows"), base, SIZE, 6)


@pytest.mark.skipif(CUDA, reason="there are two allocators on a CPU")
def test_each_allocator_has_its_times_and_the_losses_agree(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "result.json"
    options = ["--size", "tiny", "--stages", "2", "--steps", "1", "--warmup", "1", "--part_rounds", "1"]
    compare_step.main([*options, "--overlay_steps", "3", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["loss_overlay_max_diff"] <= 1e-3
    assert result["provenance"]["commit"]
    settings = {name: measured["malloc"] for name, measured in result["allocators"].items()}
    assert settings == {"default": "default", "keep": "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1"}
    assert os.environ["MALLOC_ARENA_MAX"] == "3"
    assert "MALLOC_MMAP_MAX_" not in os.environ
    for measured in result["allocators"].values():
        check_stage(measured, "stage2")
    first, second = result["allocators"].values()
    memory = first["peak_memory"]["stage2"]
    assert memory["stage2_lora"]["total_mb"] < memory["B0"]["total_mb"]
    assert memory["B0 frozen"]["total_mb"] < memory["B0"]["total_mb"]
    assert "peak_memory" not in second
    assert speed_tables.markdown(result) in capsys.readouterr().out


def test_the_first_stage_has_its_forms_and_the_concept_step_of_another_size(capsys):
    options = ["--size", "tiny", "--stages", "1", "--steps", "1", "--warmup", "0", "--part_rounds", "1"]
    result = compare_step.main([*options, "--overlay_steps", "1", "--allocator", "cuda" if CUDA else "as_is"])
    (measured,) = result["allocators"].values()
    check_stage(measured, "stage1")
    assert "LLM forward" not in measured["parts"]["stage1"]["B0 concept"]
    assert {"padded", "recomputed"} <= set(measured["steps"]["stage1"])
    memory = measured["peak_memory"]["stage1"]
    assert memory["stage1_joint"]["total_mb"] < memory["B0"]["total_mb"]
    assert CUDA or measured["concept_7b"]["flops"] > 0
    assert set(speed_tables.timed_levers(result)) == set(speed_tables.LEVERS)


def check_stage(measured, stage):
    """Every target has its baselines' ratios, every form its parts."""
    targets = [target for target in AGAINST if target.startswith(stage)]
    assert set(measured["ratios"]) == set(targets)
    for target in targets:
        assert set(measured["ratios"][target]) == set(AGAINST[target])
        assert all(ratio > 0 for ratio in measured["ratios"][target].values())
    forms = {*targets, *(name for target in targets for name in AGAINST[target])}
    assert set(measured["parts"][stage]) == forms - {"B2"}
    for form in ("ours", "B0"):
        kinds = {"bottleneck_and_losses_percent", "extra_llm_tokens_percent"}
        assert set(measured["safety_overhead"][stage][form]) == kinds


@pytest.mark.skipif(CUDA, reason="gradients are compared in fp32")
@pytest.mark.parametrize("stage", [1, 2])
def test_official_step_has_our_gradients(base, rows, stage):
    ours = Ours(base, SIZE, stage, query="first", dropout=0.0)
    official = Official(base, ours.psa, SIZE, stage, dropout=0.0, lora_on_head=False)
    picked = rows[SIZE.safety_tokens][:2]
    for form in (ours, official):
        total(form.losses(form.batch(picked))).backward()
    a, b = ours.psa, official.model
    sizes = list(a.bottleneck.heads.head_sizes)
    pairs = [
        (a.safety_tokens.weight, b.safety_tokens),
        (a.bottleneck.head_tokens.weight, b.head_tokens),
        (a.bottleneck.attention.out_proj.weight, b.attention.out_proj.weight),
        (a.bottleneck.attention.readout_weight, b.projector.readout[2].weight),
        (a.bottleneck.attention.feature_bias, b.projector.readout[0].bias),
    ]
    got = [(p.grad, q.grad) for p, q in pairs]
    first = a.bottleneck.projector.stage1[0]
    got.append((first.conv1.weight.grad, b.projector.s1[0].conv1.conv.weight.grad.flatten(1)))
    got.append((a.bottleneck.heads.weight.grad, torch.cat([b.type_head.weight.grad, b.level_head.weight.grad])))
    assert b.type_head.weight.shape[0] == sizes[0]
    adapters = [(dict(m.vlm.named_parameters()), "lora_B") for m in (a, b)]
    for key, parameter in adapters[0][0].items():
        if "lora_B" in key:
            got.append((parameter.grad, adapters[1][0][key].grad))
    assert len(got) == (7 if stage == 1 else 7 + 7 * SIZE.layers)
    for g, r in got:
        torch.testing.assert_close(g, r, rtol=1e-3, atol=1e-3 * r.abs().max().item())


@pytest.mark.parametrize(
    ("stage", "form"),
    [
        *((1, form) for form in ("concept", "official concept")),
        *((2, form) for form in ("alone", "official frozen")),
        *((stage, form) for stage in (1, 2) for form in ("ours", "official", "stock")),
    ],
)
def test_parts_are_the_whole_step(base, rows, stage, form):
    def make():
        objective = "concept" if "concept" in form else "joint"
        ours = Ours(base, SIZE, stage, objective, dropout=0.0, has_concept=form != "alone")
        if "official" in form:
            frozen = "frozen" in form
            return Official(base, ours.psa, SIZE, stage, dropout=0.0, objective=objective, frozen=frozen)
        return Stock(base, SIZE, stage, dropout=0.0) if form == "stock" else ours

    torch.manual_seed(0)
    whole = make()
    torch.manual_seed(0)
    cut = make()
    picked = rows[whole.safety_tokens][:2]
    for _ in range(3):
        expected, got = whole.step(whole.batch(picked)), cut.step_in_parts(cut.batch(picked))
        assert set(got) == set(expected)
        for name, loss in expected.items():
            torch.testing.assert_close(got[name], loss, rtol=1e-5, atol=1e-5)


def test_the_official_second_stage_trains_lora_alone(base, rows):
    ours = Ours(base, SIZE, 2, dropout=0.0)
    form = Official(base, ours.psa, SIZE, 2, dropout=0.0, frozen=True)
    trained = {name for name, p in form.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    kept = [p.clone() for p in (form.model.safety_tokens, form.model.head_tokens, form.model.type_head.weight)]
    form.step(form.batch(rows[SIZE.safety_tokens][:2]))
    now = (form.model.safety_tokens, form.model.head_tokens, form.model.type_head.weight)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_the_stock_step_trains_and_its_base_stays(base, rows):
    before = {name: p.clone() for name, p in base.named_parameters()}
    form = Stock(base, SIZE, 1)
    batch = form.batch(rows[0][:2])
    losses = [form.step(batch)["lm"].item() for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, p in base.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0)


@pytest.mark.skipif(CUDA, reason="measured by the CUDA allocator there")
def test_peak_memory_counts_what_is_held_at_once(base, rows):
    class Toy(Stock):
        def step(self, batch):
            kept = torch.zeros(1 << 20)
            for _ in range(3):
                torch.ones(1 << 20)
            return {"sum": kept.sum()}

    found = peak_memory(Toy(base, SIZE, 1), {})
    assert found["step_mb"] == pytest.approx(8, abs=0.1)


def test_flops_of_a_depthwise_convolution_and_of_attention():
    conv, x = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), torch.randn(2, 6, 4, 4, requires_grad=True)
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    count = Counter()
    with count("convolution"):
        conv(x).sum().backward()
    with count("attention"):
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    one = 2 * 9 * x.numel()
    assert count.flops == {"convolution": 3 * one, "attention": 2 * 2 * (2 * 3) * 5 * 5 * 8}


def test_grouping_keeps_the_rows():
    lengths = [5, 900, 7, 905, 300, 310]
    batches = grouped_by_length(lengths, 2)
    assert sorted(map(sorted, batches)) == [[0, 2], [1, 3], [4, 5]]


def test_profile(tmp_path):
    path, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    options = ["--size", "tiny", "--rounds", "1", "--json", str(path), "--trace", str(trace)]
    profile_step.main(["--stage", "2", *options])
    result = json.loads(path.read_text())
    assert set(result["parts"]) == {"ours", "B0", "B1"}
    assert set(result["parts"]["ours"]) == {*PARTS, "step"}
    assert "safety modules" not in result["parts"]["B1"]
    heads = {name: result["parts"][name]["loss"]["gflop"] for name in ("ours", "B0")}
    assert 0 < heads["ours"] < heads["B0"] / 2
    assert trace.stat().st_size > 0


@pytest.mark.parametrize("options", ["stage1: {stage1_objective: concept}", "stage2: {concept_loss_weight: 0}"])
def test_profile_of_a_recipe(base, tmp_path, options):
    base.config.save_pretrained(tmp_path / "base")
    recipe = tmp_path / "mine.yaml"
    common = f"common: {{model_name_or_path: {tmp_path / 'base'}, num_safety_tokens: 4, num_head_tokens: 4, "
    recipe.write_text(f"{common}micro_batch_size: 3, gradient_checkpointing: full}}\n{options}\n")
    stage = options[5]
    task = profile_step.task_of(str(recipe), int(stage))
    # lora_r is the option's default
    assert task.size == dataclasses.replace(SIZE, lora_r=256)
    assert task.not_followed == ("gradient_checkpointing=full",)
    path = tmp_path / "profile.json"
    profile_step.main(["--recipe", str(recipe), "--stage", stage, "--rounds", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["provenance"]["task"]["batch"] == 3
    parts = result["parts"]
    if stage == "1":
        assert set(parts) == {"ours", "B0"}
        assert set(parts["ours"]) == {"vision", "safety modules", "optimizer", "step"}
        assert result["safety_overhead"] == {}
    else:
        assert set(parts) == {"ours", "B0", "B1"}
        assert "safety modules" not in parts["ours"]
        assert result["safety_overhead"]["ours"]["bottleneck_and_losses_percent"] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--recipe", "llava-1.5-7b", "--size", "tiny"], "--size has no effect with --recipe"),
        (["--recipe", "nowhere"], "unknown; shipped recipes are"),
    ],
)
def test_profile_refuses_with_a_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit):
        profile_step.main(["--stage", "1", *options])
    assert sentence in capsys.readouterr().err


def test_a_shipped_recipe_has_its_bases_dimensions():
    task = profile_step.task_of("llava-1.5-7b", 2)
    assert task.size == SIZES["7b"]
    assert (task.batch, task.has_concept, task.dropout) == (2, False, 0.05)

"""The pages' tables of speed and of the guard's cost, from committed results: nothing is timed, no number is typed.

    python benchmarks/speed_tables.py            # print them
    python benchmarks/speed_tables.py --write    # put them into the pages, between their marks

A test holds the pages against what this prints. The results are those of compare_step.py, levers.py and guard_cost.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "speed.md", ROOT / "docs" / "robustness.md", ROOT / "README.md")
MARK = re.compile(r"(<!-- table (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)

NAMES = {
    "stage1_joint": "stage 1, both losses",
    "stage1_concept": "stage 1, concept losses alone",
    "stage2_lora": "stage 2, LoRA with concept losses",
    "stage2_lora_alone": "stage 2, LoRA and safety tokens",
}
SIZE_NAMES = {"7b": "7B", "13b": "13B"}
ALLOCATOR_NAMES = {"default": "glibc's default", "keep": "keeping what is freed", "cuda": "CUDA", "as_is": "as set"}
#: timed over FLOP ratio: within it nothing is explained
ALIKE = 0.15
#: words of guard_cost.py's questions
GUARD_WORDS = {"short": 12, "long": 250}
LEVERS = {
    "packing": "no padding: rows end to end",
    "no_recomputation": "no recomputation, where memory allows",
    "supervised_rows": "LM head and loss on supervised rows only",
    "one_vision_pass": "one vision pass for both readers",
    "concept": "a concept stage that never loads the language model",
}

Result = Mapping[str, Any]


def place(result: Result) -> str:
    """Hardware, versions and options of a comparison, in one sentence."""
    found, options = result["provenance"], result["provenance"]["options"]
    parts = [str(found["device"])]
    parts += [] if found.get("cuda") else [f"{found['threads']} thread{'s' * (found['threads'] > 1)}"]
    parts += [f"model {options['size']}", str(found["dtype"]).removeprefix("torch.")]
    parts += [f"{name} {found[name]}" for name in ("torch", "cuda", "transformers") if found.get(name)]
    parts += [f"{options['steps']} steps of {options['batch']} rows each after {options['warmup']}"]
    parts += ["CPU seconds of the process"] if options["clock"] == "cpu" else []
    low, mean, high = found["tokens_per_row"]
    parts += [f"rows of {low} to {high} tokens (mean {mean:.0f}), {found['supervised_share']:.0%} of them supervised"]
    parts += [f"{found['padding_share']:.0%} of padded batches is padding", f"commit {str(found['commit'])[:10]}"]
    parts += [options["note"]] if options.get("note") else []
    return ", ".join(parts) + "."


def share_table(result: Result) -> list[str]:
    """Shares of our joint step's FLOPs at each size."""
    kinds = {"lm_head": "LM head", "vision": "vision", "safety": "safety modules", "rest": "rest of the language model"}
    rows = [["share of a stage 1 step's FLOPs", *kinds.values(), "of the rest: attention"]]
    for size, found in result["shares"].items():
        rows.append([_size(size), *(f"{found[k]:.2f}%" for k in kinds), f"{found['attention']:.1f}%"])
    return _table(rows)


def ratio_table(result: Result) -> list[str]:
    """Each baseline's steps over ours, by allocator, and the ratios of FLOPs beside it."""
    allocators = result["allocators"]
    first = next(iter(allocators.values()))
    head = ["ours", "beside"]
    head += [f"timed, {ALLOCATOR_NAMES[name]}" for name in allocators]
    rows = [[*head, *(f"FLOPs, {_size(name)}" for name in result["flops"])]]
    for target, found in first["ratios"].items():
        for name in found:
            timed = [f"{measured['ratios'][target][name]:.2f}" for measured in allocators.values()]
            flops = [f"{size[target][name]:.2f}" for size in result["flops"].values()]
            rows.append([NAMES[target], name, *timed, *flops])
        full = first.get("concept_7b") if target == "stage1_concept" else None
        if full:
            steps = full["steps"]
            ratio = steps["B0 concept"]["mean_ms"] / steps[target]["mean_ms"]
            blank = ["-"] * (len(allocators) - 1)
            flops = [f"{full['flops']:.2f}" if size == "7b" else "-" for size in result["flops"]]
            rows.append(["the same, at 7B's own dimensions", "B0 concept", f"{ratio:.2f}", *blank, *flops])
    return _table(rows)


def difference_table(result: Result) -> list[str]:
    """Where a timed ratio is not the ratio of FLOPs: how much of the difference each part brings."""
    rows = [["ours", "beside", "allocator", "timed", "FLOPs", "what brings most of the difference"]]
    (flops, *_) = result["flops"].values()
    for allocator, measured in result["allocators"].items():
        for target, found in measured["ratios"].items():
            for name, timed in found.items():
                counted = flops[target][name]
                if abs(timed / counted - 1) <= ALIKE:
                    continue
                parts = measured["parts"][target.split("_")[0]]
                largest = differences(parts, target, name)[:3]
                told = "; ".join(f"{part} {value:+.2f}" for part, value in largest if value)
                rows.append([NAMES[target], name, ALLOCATOR_NAMES[allocator], f"{timed:.2f}", f"{counted:.2f}", told])
    if len(rows) == 1:
        return [f"Every timed ratio is within {ALIKE:.0%} of its ratio of FLOPs."]
    return _table(rows)


def differences(parts: Result, target: str, baseline: str) -> list[tuple[str, float]]:
    """What each part adds to (timed ratio - FLOP ratio), largest first; B2's parts are taken for B1's.

    A part's time beyond ours over our step's time, less the same of FLOPs.
    """
    ours, theirs = parts[target], parts["B1" if baseline == "B2" else baseline]
    found = []
    for part in dict.fromkeys([*ours, *theirs]):
        if part == "step":
            continue
        a, b = (side.get(part, {"ms": 0.0, "gflop": 0.0}) for side in (ours, theirs))
        time = (b["ms"] - a["ms"]) / ours["step"]["ms"]
        found.append((part, round(time - (b["gflop"] - a["gflop"]) / ours["step"]["gflop"], 2)))
    return sorted(found, key=lambda row: -abs(row[1]))


def step_table(result: Result) -> list[str]:
    """Milliseconds of every form's step under each allocator."""
    allocators = result["allocators"]
    rows = [["ms a step, mean (90th percentile)", *(ALLOCATOR_NAMES[name] for name in allocators)]]
    first = next(iter(allocators.values()))
    for stage, forms in first["steps"].items():
        for name in forms:
            if name in ("padded", "recomputed"):
                continue
            shown = [measured["steps"][stage][name] for measured in allocators.values()]
            label = NAMES.get(name, f"{name}, stage {stage[-1]}")
            rows.append([label, *(f"{step['mean_ms']:.0f} ({step['p90_ms']:.0f})" for step in shown)])
    for name, step in first.get("concept_7b", {"steps": {}})["steps"].items():
        label = f"{'ours' if name == 'stage1_concept' else name}, at 7B's own dimensions"
        blank = ["-"] * (len(allocators) - 1)
        rows.append([label, f"{step['mean_ms']:.0f} ({step['p90_ms']:.0f})", *blank])
    return _table(rows)


def memory_table(result: Result) -> list[str]:
    """Peak memory and overhead of the safety modules."""
    measured = next(iter(result["allocators"].values()))
    head = ["", "peak memory over the official step's", "without weights and optimizer state"]
    rows = [[*head, "bottleneck and losses, of B1's step: ours, B0", "safety tokens in the LLM: ours, B0"]]
    for target, found in measured["ratios"].items():
        stage = target.split("_")[0]
        memory = measured["peak_memory"][stage]
        base = memory[next(name for name in found if name.startswith("B0"))]
        ratios = [f"{memory[target][kind] / base[kind]:.2f}" for kind in ("total_mb", "step_mb")]
        over = measured["safety_overhead"][stage]
        shown = ["-", "-"]
        if target in ("stage1_joint", "stage2_lora"):
            kinds = ("bottleneck_and_losses_percent", "extra_llm_tokens_percent")
            shown = [", ".join(f"{over[form][kind]:.1f}%" for form in ("ours", "B0")) for kind in kinds]
        rows.append([NAMES[target], *ratios, *shown])
    full = measured.get("concept_7b")
    if full:
        ours, base = (full["peak_memory"][name] for name in ("stage1_concept", "B0 concept"))
        ratios = [f"{ours[kind] / base[kind]:.2f}" for kind in ("total_mb", "step_mb")]
        rows.append(["stage 1, concept losses alone, at 7B's own dimensions", *ratios, "-", "-"])
    return _table(rows)


def overlay_line(result: Result) -> list[str]:
    """How near the losses are."""
    steps = result["provenance"]["options"]["overlay_steps"]
    return [
        f"Largest difference of any loss between B0 and ours in {steps} steps: {result['loss_overlay_max_diff']:.1e}."
    ]


def lever_table(result: Result, levers: Result) -> list[str]:
    """What each choice is worth: a step without it over one with it."""
    timed = timed_levers(result)
    saved = levers["bytes_7b"]
    rows = [["choice", "FLOPs, 7B (estimated)", "FLOPs, small model", "timed, small model", "memory at 7B (estimated)"]]
    for name, label in LEVERS.items():
        flops = [f"{levers['flops'][size][name]:.2f}x" for size in ("7b", "proportionate")]
        memory = f"{saved[name] / 2**30:.1f} GiB less" if name in saved else "-"
        if name == "no_recomputation":
            memory = "see below"
        rows.append([label, *flops, f"{timed[name]:.2f}x" if name in timed else "-", memory])
    return _table(rows)


def timed_levers(result: Result) -> dict[str, float]:
    """A step of stage 1 without each choice over one with it, as far as the comparison timed it."""
    measured = next(iter(result["allocators"].values()))
    steps, parts = measured["steps"].get("stage1", {}), measured["parts"].get("stage1", {})
    if "padded" not in steps:
        return {}
    ours, mine = steps["stage1_joint"]["mean_ms"], parts["stage1_joint"]
    return {
        "packing": steps["padded"]["mean_ms"] / ours,
        "no_recomputation": steps["recomputed"]["mean_ms"] / ours,
        "supervised_rows": 1 + (parts["B0"]["loss"]["ms"] - mine["loss"]["ms"]) / mine["step"]["ms"],
        "one_vision_pass": 1 + mine["vision"]["ms"] / mine["step"]["ms"],
        "concept": ours / steps["stage1_concept"]["mean_ms"],
    }


def fit_table(levers: Result) -> list[str]:
    """The largest micro-batches."""
    rows = [["largest micro-batch of 2,048-token rows at 7B (estimated)", "`full` recomputation", "`none`"]]
    for machine, stages in levers["micro_batches_7b"].items():
        for stage, found in stages.items():
            rows.append([f"{machine}, {stage}", str(found["full"]), str(found["none"])])
    return _table(rows)


def guard_table(cost: Result) -> list[str]:
    """What a guarded answer takes beside a plain one, and a verdict beside a generative guard: medians [quartiles]."""
    kinds = {"guarded / plain": 3, "guarded / one reading": 3, "generative guard / verdict": 1}
    rows = [["question", "a plain answer", "a verdict", *kinds]]
    for name, found in cost["prompts"].items():
        seconds = (f"{found['seconds']['plain']:.2f} s", f"{1e3 * found['seconds']['verdict']:.0f} ms")
        ratios = []
        for kind, digits in kinds.items():
            low, median, high = (f"{value:.{digits}f}" for value in found["ratios"][kind])
            ratios.append(f"{median} [{low}, {high}]")
        rows.append([f"{GUARD_WORDS[name]} words", *seconds, *ratios])
    dtype = str(cost["dtype"]).removeprefix("torch.")
    told = [str(cost["device"]), f"{cost['threads']} threads", dtype, f"torch {cost['torch']}", f"model {cost['size']}"]
    told += [f"answers of {cost['answer_tokens']} tokens, a generative guard's of {cost['verdict_tokens']}"]
    return [
        *_table(rows),
        "",
        f"{', '.join(told)}, commit {str(cost['commit'])[:10]}; medians, [quartiles] of the ratios.",
    ]


def readme_lines(result: Result) -> list[str]:
    """The figures of README.md: timed ratios, and in brackets those of FLOPs at 7B."""
    measured, at_7b = next(iter(result["allocators"].values())), result["flops"]["7b"]

    def both(target: str, name: str) -> str:
        return f"{measured['ratios'][target][name]:.2f}x ({at_7b[target][name]:.2f}x)"

    steps = measured["concept_7b"]["steps"]
    concept = steps["B0 concept"]["mean_ms"] / steps["stage1_concept"]["mean_ms"]
    stock = f"{both('stage1_joint', 'B1')} and {both('stage2_lora_alone', 'B1')}"
    return [
        f"The official step took {both('stage1_joint', 'B0')} as long as ours in stage 1 and "
        f"{both('stage2_lora_alone', 'B0 frozen')} in stage 2,",
        f"stock LLaVA fine-tuning, which has no guard, {stock}; in brackets the ratio of FLOPs at 7B.",
        f"The concept losses alone, timed at 7B's own dimensions: {concept:.2f}x "
        f"({measured['concept_7b']['flops']:.2f}x). **Nothing is measured on a GPU yet.**",
    ]


def tables(result: Result, levers: Result | None = None) -> dict[str, list[str]]:
    """Lines of every table by the name in its mark."""
    found = {
        "place": [place(result)],
        "shares": share_table(result),
        "ratios": ratio_table(result),
        "differences": difference_table(result),
        "steps": step_table(result),
        "overlay": overlay_line(result) if "loss_overlay_max_diff" in result else [],
        "memory": memory_table(result) if "peak_memory" in next(iter(result["allocators"].values())) else [],
    }
    if levers:
        found |= {"levers": lever_table(result, levers), "fit": fit_table(levers), "readme": readme_lines(result)}
    return found


def markdown(result: Result, levers: Result | None = None) -> str:
    """All tables below each other."""
    return "\n\n".join("\n".join(lines) for lines in tables(result, levers).values() if lines) + "\n"


def fill(text: str, found: Mapping[str, Sequence[str]]) -> str:
    """A page with each marked table replaced; ValueError for a mark without a table."""

    def filled(match: re.Match[str]) -> str:
        if match[2] not in found:
            raise ValueError(f"there is no table {match[2]!r}; there are {', '.join(found)}")
        return match[1] + "\n".join(found[match[2]]) + "\n" + match[3]

    return MARK.sub(filled, text)


def committed() -> dict[str, list[str]]:
    """The tables of the committed results."""
    names = ("compare_step_cpu.json", "levers_7b.json", "guard_cost_cpu.json")
    result, levers, cost = (json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names)
    return {**tables(result, levers), "guard": guard_table(cost)}


def _size(name: str) -> str:
    return SIZE_NAMES.get(name, "the small model" if name == "proportionate" else name)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the committed tables, or write them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=", ".join(str(page.relative_to(ROOT)) for page in PAGES))
    args, found = parser.parse_args(argv), committed()
    for page in PAGES if args.write else ():
        page.write_text(fill(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    for name, lines in found.items() if not args.write else ():
        print(f"\n{name}\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

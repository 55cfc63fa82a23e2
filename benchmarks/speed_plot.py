"""Draw committed timings of the training step: ours beside the baselines, one block of bars a stage.

    python benchmarks/speed_plot.py [benchmarks/results/compare_step_cpu.json ...] --out docs/assets/speed.png

Reads what `compare_step.py --json` writes; no number is typed here, and nothing is timed. A bar is the mean step, the
thin line leads to the 90th percentile. Beside a timed ratio stands that of FLOPs at 7B, below hardware and versions.
Drawn with Pillow, which psa-fast needs anyway.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from speed_tables import ALLOCATOR_NAMES, RESULTS, place

from psa_fast.files import write_with
from psa_fast.sandbox.picture import font, wrapped

NAMES = {
    "B0": "official (B0)",
    "B0 concept": "official, concepts alone (B0)",
    "B0 frozen": "official (B0)",
    "B1": "stock LLaVA fine-tuning (B1)",
    "B2": "stock, grouped by length (B2)",
}
TARGETS = {
    "stage1_joint": "Stage 1, both losses",
    "stage1_concept": "Stage 1, concept losses alone",
    "stage2_lora_alone": "Stage 2, LoRA",
}
WIDTH, LEFT, BAR, MARGIN = 1200, 300, 26, 16
INK, PALE, OURS, THEIRS = (32, 34, 38), (100, 104, 112), (24, 120, 88), (176, 182, 192)


def caption(result: Mapping[str, Any]) -> str:
    """What the bars are, hardware, versions and model, from what the result says of itself."""
    allocator = next(iter(result["allocators"]))
    at_7b = " In brackets: the ratio of FLOPs at LLaVA-1.5-7B." if "7b" in result["flops"] else ""
    memory = "" if allocator == "cuda" else f" Allocator: {ALLOCATOR_NAMES[allocator]}."
    return f"Mean step, line to the 90th percentile.{at_7b}{memory} {place(result)}"


def bars(result: Mapping[str, Any], target: str) -> list[tuple[str, float, float, str]]:
    """(name, mean ms, 90th percentile ms, label) of ours and of each baseline of one target."""
    measured = next(iter(result["allocators"].values()))
    steps, ratios = measured["steps"][target.split("_")[0]], measured["ratios"][target]
    at_7b = result["flops"].get("7b", {}).get(target, {})
    rows = [("psa-fast", steps[target]["mean_ms"], steps[target]["p90_ms"], f"{steps[target]['mean_ms']:.0f} ms")]
    for name, ratio in ratios.items():
        liger = " and Liger" if name == "B2" and result["provenance"].get("liger") else ""
        label = f"{steps[name]['mean_ms']:.0f} ms, {ratio:.2f}x" + (f" ({at_7b[name]:.2f}x)" if at_7b else "")
        rows.append((NAMES[name] + liger, steps[name]["mean_ms"], steps[name]["p90_ms"], label))
    return rows


def draw(results: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Every result's stages below each other, each result with its caption."""
    canvas = Image.new("RGB", (WIDTH, 640 * len(results) + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    top = MARGIN
    for result in results:
        measured = next(iter(result["allocators"].values()))
        blocks = {target: bars(result, target) for target in TARGETS if target in measured["ratios"]}
        for target, rows in blocks.items():
            # each block has its own scale: a step without language model is nothing beside the others
            scale = (WIDTH - LEFT - 260) / max(p90 for _, _, p90, _ in rows)
            pen.text((MARGIN, top), f"{TARGETS[target]}: one training step", INK, font(22))
            top += 36
            for number, (name, mean, high, label) in enumerate(rows):
                end, middle = LEFT + scale * mean, top + BAR // 2
                pen.text((LEFT - 12, middle), name, INK, font(18), anchor="rm")
                pen.rectangle((LEFT, top, end, top + BAR - 5), fill=OURS if number == 0 else THEIRS)
                pen.line((end, middle - 2, LEFT + scale * high, middle - 2), fill=INK, width=2)
                pen.text((LEFT + scale * high + 10, middle), label, INK, font(18), anchor="lm")
                top += BAR + 3
            top += 16
        for line in wrapped(caption(result), font(16), WIDTH - 2 * MARGIN):
            pen.text((MARGIN, top), line, PALE, font(16))
            top += 21
        top += 24
    return canvas.crop((0, 0, WIDTH, top)).quantize(32, dither=Image.Dither.NONE)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="*", default=[RESULTS / "compare_step_cpu.json"])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args(argv)
    picture = draw([json.loads(path.read_text(encoding="utf-8")) for path in args.json])
    write_with(args.out, lambda unfinished: picture.save(unfinished, format="PNG", optimize=True))
    print(f"{args.out}: {args.out.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()

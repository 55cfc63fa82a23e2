"""How near a small LLaVA comes to LLaVA-1.5-7B: shares of a step's FLOPs, and what the baselines compute beside ours.

    python benchmarks/proportions.py            # the committed sizes
    python benchmarks/proportions.py --search   # the dimensions of "proportionate", best first (about 2 minutes)

The search varies layers and widths of language model, vision tower and safety projector at a step of some 60 GFLOP. The
vocabulary follows from the LM head's share, the LoRA rank and the projector from their widths. `distance` is what it
makes small.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from step_flops import OURS, official, ours, ratios, stock, tower
from step_model import SIZES, Size
from step_rows import RowShape, draw_shapes, grouped_by_length, in_order

#: rows that shares and ratios are averaged over, two a batch
ROWS, BATCH = 400, 2
#: FLOPs of a joint step of two rows
WANTED = (48e9, 72e9)


def shares(size: Size, target: str = "stage1_joint") -> dict[str, float]:
    """Percent of our step's FLOPs: LM head, vision (with connector), safety modules, the rest, and of it attention."""
    found = ours(size, target, draw_shapes(ROWS, size))
    total = sum(found.values())
    percent = {part: 100 * flops / total for part, flops in found.items()}
    percent["rest"] = percent.pop("language_model") + percent["attention"]
    return percent


def batches_of(
    rows: Sequence[RowShape], batch: int = BATCH, seed: int = 0
) -> tuple[list[list[RowShape]], list[list[RowShape]]]:
    """The rows in batches as they come, and those of like length together."""
    grouped = grouped_by_length([row.text for row in rows], batch, seed)
    plain, alike = ([[rows[i] for i in n] for n in order] for order in (in_order(len(rows), batch), grouped))
    return plain, alike


def ratios_of(size: Size) -> dict[str, Any]:
    """FLOPs of the baselines over ours, by target and baseline, on ROWS drawn rows."""
    return ratios(size, *batches_of(draw_shapes(ROWS, size)))


def distance(size: Size, wanted: dict[str, float]) -> tuple[float, dict[str, float]]:
    """How far a size is from `wanted` (`features`): the sum of differences, in percentage points and percent."""
    found = features(size)
    return sum(abs(found[name] - wanted[name]) for name in wanted), found


def features(size: Size) -> dict[str, float]:
    """Shares in percent and logarithms of ratios times 100, of the two steps of stage 1."""
    plain, _ = batches_of(draw_shapes(ROWS, size))
    rows = [row for batch in plain for row in batch]
    joint, concept = (sum(ours(size, target, rows).values()) for target in ("stage1_joint", "stage1_concept"))
    logs = {
        "B0": sum(official(size, "stage1_joint", plain).values()) / joint,
        "B1": sum(stock(size, "stage1_joint", plain).values()) / joint,
        "B0 concept": sum(official(size, "stage1_concept", plain).values()) / concept,
    }
    return shares(size) | {name: 100 * math.log(ratio) for name, ratio in logs.items()}


def candidates(whole: Size) -> Iterator[Size]:
    """Sizes whose LM head and vision are in proportion to `whole`, of the wanted FLOPs."""
    head_over_rest = whole.vocabulary / (whole.layers * (4 * whole.width + 3 * whole.mlp))
    vision_over_rest = tower(whole, whole.vision_layers - 1) / _language(whole)
    for layers, width, mlp in product((8, 10, 12), (320, 384), range(2048, 3329, 256)):
        vocabulary = 32 * round(head_over_rest * layers * (4 * width + 3 * mlp) / 32)
        language = Size(0, 0, 0, 0, width, layers, width // 64, mlp, vocabulary, 168, 14, 16)
        language = replace(language, lora_r=width * whole.lora_r // whole.width)
        if not WANTED[0] < BATCH * 1.5 * _language(language) < WANTED[1]:
            continue
        for depth in (8, 12):
            towers = [
                replace(language, vision_width=w, vision_layers=depth, vision_heads=w // 16, vision_mlp=4 * w)
                for w in range(48, 192, 16)
            ]
            size = min(towers, key=lambda t: abs(tower(t, depth - 1) / _language(t) - vision_over_rest))
            for inside, heads in product(range(size.vision_width - 16, size.vision_width + 17, 8), (2, 4)):
                yield replace(size, projector_width=inside, concept_heads=heads)


def _language(size: Size) -> float:
    """FLOPs of the language model's layers on an image's tokens, forward and backward."""
    return 4 * size.image_tokens * size.layers * (4 * size.width**2 + 3 * size.width * size.mlp)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shares, or the best sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="look for dimensions")
    if parser.parse_args(argv).search:
        wanted = features(SIZES["7b"])
        found = sorted(((*distance(size, wanted), size) for size in candidates(SIZES["7b"])), key=lambda row: row[0])
        print("wanted", {name: round(value, 2) for name, value in wanted.items()})
        for far, values, size in found[:10]:
            print(f"{far:.2f} {size}\n    ", {name: round(value, 2) for name, value in values.items()})
        return
    for name in ("proportionate", "7b", "13b"):
        print(name, SIZES[name])
        for target in OURS:
            print(f"  {target}: " + ", ".join(f"{k} {v:.2f}%" for k, v in shares(SIZES[name], target).items()))
        for target, row in ratios_of(SIZES[name]).items():
            print(f"  {target}: " + ", ".join(f"{baseline} {ratio:.3f}x" for baseline, ratio in row.items()))


if __name__ == "__main__":
    main()

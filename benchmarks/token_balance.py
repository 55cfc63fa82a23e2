"""How evenly tokens lie on the ranks: rows as they come, assigned by their lengths, and under a token budget.

python benchmarks/token_balance.py

Lengths are drawn, nothing is trained: three rows of four hold an image (576 + 64 tokens), a row has 1 to 16 turns
(as many of 1 to 2 as of 8 to 16) of 20 to 120 tokens, cut at 2048. Forty global batches of 128 rows, micro batch 2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import mean

from psa_fast.data import GlobalBatchSampler
from psa_fast.training.config import TrainConfig
from psa_fast.training.micro_batches import Schedule

ROWS, STEPS, GLOBAL_BATCH, MICRO_BATCH, MAX_LENGTH, BUDGET = 5120, 40, 128, 2, 2048, 4096


def draw_lengths(count: int, seed: int = 0) -> list[int]:
    """Tokens of `count` rows."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        turns = round(math.exp(rng.uniform(0, math.log(16))))
        image = 640 if rng.random() < 0.75 else 0
        found.append(min(MAX_LENGTH, image + sum(rng.randint(20, 120) for _ in range(turns))))
    return found


def spread(lengths: list[int], world_size: int, by_tokens: bool, budget: int | None) -> dict[str, float]:
    """Means over the steps of the busiest rank over the mean rank (by the whole step, and micro-step by micro-step,
    as ranks wait for each other in each), of the micro-batches a rank runs, and the largest micro-batch of all.
    """
    config = TrainConfig(
        global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, max_tokens_per_micro_batch=budget
    )
    length: Callable[[int, int], int] | None = (lambda index, epoch: lengths[index]) if by_tokens else None
    sampler = GlobalBatchSampler(len(lengths), GLOBAL_BATCH)
    ranks = [Schedule(sampler, config, rank, world_size, 0, STEPS, length) for rank in range(world_size)]
    whole, waiting, micro_steps, largest = [], [], [], 0
    for step in range(STEPS):
        tokens = [[sum(lengths[i] for i, _ in rows) for rows in rank.micro_batches(step)] for rank in ranks]
        share = sum(map(sum, tokens)) / world_size
        whole.append(max(map(sum, tokens)) / share)
        waiting.append(sum(map(max, zip(*tokens, strict=True))) / share)
        micro_steps.append(len(tokens[0]))
        largest = max(largest, *map(max, tokens))
    return {"whole": mean(whole), "waiting": mean(waiting), "micro_steps": mean(micro_steps), "largest": largest}


def main() -> None:
    """Print the table in Markdown."""
    lengths = draw_lengths(ROWS)
    print("| ranks | rows | busiest rank / mean | the same, micro-step by micro-step | micro-steps | largest, tokens |")
    print("|---|---|---|---|---|---|")
    forms = {"as they come": (False, None), "by tokens": (True, None), f"budget {BUDGET}": (True, BUDGET)}
    for world_size in (2, 8):
        for name, (by_tokens, budget) in forms.items():
            found = spread(lengths, world_size, by_tokens, budget)
            figures = f"{found['whole']:.3f} | {found['waiting']:.3f} | {found['micro_steps']:.1f} | {found['largest']}"
            print(f"| {world_size} | {name} | {figures} |")


if __name__ == "__main__":
    main()

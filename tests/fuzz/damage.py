"""Damage checkpoints and feature caches at random: python tests/fuzz/damage.py --checkpoints 20 --caches 20.

Each trial spoils one file of a copy: flipped bits, a cut, a zeroed page, nothing left, an edited value, a removed file.
A checkpoint's damage must be named, by the file, and the whole checkpoint before it taken. A cache's must be named and
the features put again; whatever it returns must be what was put. Anything else is silent: exit code 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from builders import tiny

from psa_fast.training import checkpoint
from psa_fast.training.config import parse_args
from psa_fast.training.feature_cache import FeatureCache, hash_image

OPTIONS = ("--save_steps", 2, "--max_steps", 4)
SHAPE, ENTRIES = (9, 16), 40


def flip_bits(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 100))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero_a_page(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(-(-len(data) // 4096)) * 4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def edit_a_number(path: Path, rng: random.Random) -> None:
    """Another digit somewhere in a file of text; one bit of any other."""
    data = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if path.suffix not in (".json", ".jsonl") or not digits:
        return flip_bits(path, rng)
    at = rng.choice(digits)
    data[at] = ord(rng.choice([d for d in "123456789" if d != chr(data[at])]))
    path.write_bytes(data)


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (flip_bits, cut, zero_a_page, empty, remove, edit_a_number)


def spoil(folder: Path, rng: random.Random, way: Callable[[Path, random.Random], None]) -> Path:
    """Damage one file below a folder; returns it. A way that happened to change nothing is tried again."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name != "fingerprint.json")
    path = rng.choice(files)
    before = path.read_bytes()
    way(path, rng)
    return spoil(folder, rng, way) if path.exists() and path.read_bytes() == before else path


def make_run(folder: Path) -> list[str]:
    """A finished stage 1 with checkpoints 2 and 4; the options that continue it."""
    base, world = tiny.build_base(folder / "base"), tiny.build_world(folder / "world")
    options = tiny.arguments(base, world, folder / "run", *OPTIONS)
    codes, output = tiny.outcome(tiny.start(tiny.train_command(options)))
    if any(codes):
        raise SystemExit(f"the run failed:\n{output[-3000:]}")
    (folder / "run" / "stage1" / checkpoint.STATE).unlink()  # as if it had been stopped before it was finished
    return [*options, "--resume", "auto"]


def checkpoints(folder: Path, options: list[str], trials: int, seed: int) -> list[dict]:
    """Outcomes of damaged newest checkpoints: `named` and gone back from, or `silent`."""
    rng, results = random.Random(seed), []
    stage = folder / "run" / "stage1"
    config = parse_args(options)
    for number in range(trials):
        shutil.copytree(stage / "checkpoint-4", folder / "kept")
        way = WAYS[number % len(WAYS)]
        victim = spoil(stage / "checkpoint-4", rng, way)
        said: list[str] = []
        try:
            taken = checkpoint.choose(config, 1, said.append)
        except ValueError as error:
            taken = None
            said.append(str(error))
        named = taken is not None and taken[0].name == "checkpoint-2" and any(str(victim) in line for line in said)
        outcome = "named" if named else "silent"
        results.append({"way": way.__name__, "file": victim.name, "outcome": outcome, "said": said})
        shutil.rmtree(stage / "checkpoint-4")
        (folder / "kept").rename(stage / "checkpoint-4")
    return results


def feature(i: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16)


def caches(folder: Path, trials: int, seed: int) -> list[dict]:
    """Outcomes of damaged caches: `healed` (named, put again, right) or `silent`."""
    rng, results = random.Random(seed), []
    keys = [hash_image(str(i).encode()) for i in range(ENTRIES)]
    for rank in (0, 1):
        with FeatureCache(folder / "whole", {"tower": "t"}, SHAPE, rank) as cache:
            for i in range(rank, ENTRIES, 2):
                cache.put(keys[i], feature(i))
    for number in range(trials):
        copy = folder / f"cache-{number}"
        shutil.copytree(folder / "whole", copy)
        way = WAYS[number % len(WAYS)]
        victim = spoil(copy, rng, way)
        with FeatureCache(copy, {"tower": "t"}, SHAPE, rank=0) as cache:
            cache.check(keys)
            lost = [i for i in range(ENTRIES) if keys[i] not in cache]
            right = all(torch.equal(cache.get(keys[i]), feature(i)) for i in range(ENTRIES) if i not in lost)
            for i in lost:
                cache.put(keys[i], feature(i))
            said = list(cache.problems)
        again = FeatureCache(copy, {"tower": "t"}, SHAPE, rank=1)
        right &= not again.check(keys)
        right &= all(torch.equal(again.get(keys[i]), feature(i)) for i in range(ENTRIES))
        named = any(victim.stem in line for line in said)
        outcome = "healed" if named and right else "silent"
        results.append({"way": way.__name__, "file": victim.name, "outcome": outcome, "lost": len(lost), "said": said})
        shutil.rmtree(copy)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--caches", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"caches": caches(folder, args.caches, args.seed)}
        if args.checkpoints:
            found["checkpoints"] = checkpoints(folder, make_run(folder), args.checkpoints, args.seed)
    for kind, results in found.items():
        for result in results:
            print(kind, json.dumps(result))
    summary = {kind: dict(Counter(result["outcome"] for result in results)) for kind, results in found.items()}
    print(json.dumps(summary))
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "summary": summary} | found, indent=2) + "\n")
    return int(any(result["outcome"] == "silent" for results in found.values() for result in results))


if __name__ == "__main__":
    sys.exit(main())

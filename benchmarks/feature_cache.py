"""Time per image and disk of the vision-feature cache at LLaVA-1.5-7B's widths, [576, 1024] bf16 an image.

python benchmarks/feature_cache.py --images 10000 --folder /some/disk [--json FILE]

Synthetic features; the tower that would make them is not run. Writing includes the flush to the disk, reading a sum
over every value. Reads right after the build come from the page cache as far as memory reaches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from ladder import where

from psa_fast.training.feature_cache import FeatureCache

SHAPE = (576, 1024)


def features(seed: int) -> torch.Tensor:
    """Features that differ from image to image; one shifted draw, as drawing each takes longer than writing it."""
    return (_BASE.roll(seed % SHAPE[0], 0) + seed % 97 / 97).to(torch.bfloat16)


_BASE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--folder", help="where the cache is built, and removed again (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    entry = 2 * SHAPE[0] * SHAPE[1]
    free = shutil.disk_usage(folder).free
    if args.images * entry > 0.9 * free:
        parser.error(f"{args.images} images need {args.images * entry / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(args.images)]
    try:
        writes = []
        began = time.perf_counter()
        with FeatureCache(folder, {"tower": "synthetic"}, SHAPE, rank=0) as cache:
            for i, key in enumerate(keys):
                value = features(i)
                start = time.perf_counter()
                cache.put(key, value)
                writes.append(time.perf_counter() - start)
        built = time.perf_counter() - began

        start = time.perf_counter()
        cache = FeatureCache(folder, {"tower": "synthetic"}, SHAPE, rank=0)
        opened = time.perf_counter() - start
        order = list(range(args.images))
        random.Random(0).shuffle(order)
        reads = []
        for i in order:
            start = time.perf_counter()
            value = cache.get(keys[i])
            assert value is not None
            value.sum(dtype=torch.float32).item()
            reads.append(time.perf_counter() - start)
        for i in order[:20]:
            assert torch.equal(cache.get(keys[i]), features(i))
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    result = {
        "images": args.images,
        "entry_mb": entry / 1e6,
        "disk_gb": disk / 1e9,
        "write_ms_mean": 1e3 * sum(writes) / len(writes),
        "write_ms_p50": 1e3 * statistics.median(writes),
        "write_ms_max": 1e3 * max(writes),
        "build_s": built,
        "open_ms": 1e3 * opened,
        "read_ms_mean": 1e3 * sum(reads) / len(reads),
        "read_ms_p50": 1e3 * statistics.median(reads),
    }
    for name, value in result.items():
        print(f"{name:14s} {value:.4g}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result | where(), indent=2) + "\n")


if __name__ == "__main__":
    main()

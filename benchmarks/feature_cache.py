"""Time per image and disk of the vision-feature cache at LLaVA-1.5-7B's widths, [576, 1024] bf16 an image.

python benchmarks/feature_cache.py --images 10000 --folder /some/disk [--kill] [--train N] [--json FILE]

Synthetic features; the tower that would make them is not run. Writing includes the flush to the disk, reading a sum
over every value. Reads right after the build come from the page cache as far as memory reaches.
--kill: the first half is written by a process that is killed with SIGKILL in the middle of it; every entry is compared.
--train: the concept bottleneck at 7B widths (E = 4096) then takes optimizer steps over N of the images in random order,
reading included, as stage 1's objective `concept` does once the features are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ladder import DEVICE, DTYPE, where
from step_forms import synchronize

from psa_fast.models.bottleneck import ConceptBottleneck
from psa_fast.models.psa_config import PsaConfig
from psa_fast.training.feature_cache import FeatureCache

SHAPE = (576, 1024)
ENTRY = 2 * SHAPE[0] * SHAPE[1]
HIDDEN = 4096


def features(seed: int) -> torch.Tensor:
    """Features that differ from image to image; one shifted draw, as drawing each takes longer than writing it."""
    return (_BASE.roll(seed % SHAPE[0], 0) + seed % 97 / 97).to(torch.bfloat16)


_BASE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def build(folder: Path, images: int) -> list[float]:
    """Put what is not there yet; seconds of each."""
    seconds = []
    with FeatureCache(folder, {"tower": "synthetic"}, SHAPE, rank=0) as cache:
        for i in range(images):
            if key(i) in cache:
                continue
            value = features(i)
            start = time.perf_counter()
            cache.put(key(i), value)
            seconds.append(time.perf_counter() - start)
    return seconds


def build_and_be_killed(folder: Path, images: int) -> int:
    """A process of its own builds until half of the bytes are in the file; how many entries count then."""
    child = subprocess.Popen([sys.executable, __file__, "--images", str(images), "--build", str(folder)])
    while sum(path.stat().st_size for path in folder.rglob("*.bin")) < images * ENTRY // 2:
        if child.poll() is not None:
            raise SystemExit("the build ended before it could be killed")
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return len(FeatureCache(folder, {"tower": "synthetic"}, SHAPE, rank=0))


def train(cache: FeatureCache, order: list[int], batch: int) -> list[float]:
    """Seconds of each optimizer step on `batch` images, read from the cache."""
    torch.manual_seed(0)
    config = PsaConfig(vision_hidden_size=SHAPE[1], hidden_size=HIDDEN, image_tokens=SHAPE[0])
    bottleneck = ConceptBottleneck(config).to(DEVICE, DTYPE)
    optimizer = torch.optim.AdamW(bottleneck.parameters(), lr=1e-5, fused=True)
    seconds = []
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        targets = torch.tensor([[i % 7, i % 4] for i in rows], device=DEVICE)
        query = torch.randn(len(rows), HIDDEN, device=DEVICE, dtype=DTYPE)
        start = time.perf_counter()
        found = [cache.get(key(i)) for i in rows]
        vision = torch.stack([value for value in found if value is not None]).to(DEVICE)
        bottleneck.loss(bottleneck(vision, query), targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--folder", help="where the cache is built, and removed again (default: a temporary folder)")
    parser.add_argument("--kill", action="store_true", help="kill the build in the middle and restart it")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="images to train on (default: none)")
    parser.add_argument("--batch", type=int, default=8, help="images an optimizer step")
    parser.add_argument("--build", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.batch < 1 or not 0 <= args.train <= args.images:
        parser.error("--batch is at least 1, --train at most --images")
    if args.build:
        build(Path(args.build), args.images)
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    free = shutil.disk_usage(folder).free
    if args.images * ENTRY > 0.9 * free:
        parser.error(f"{args.images} images need {args.images * ENTRY / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    survived = None
    try:
        if args.kill:
            survived = build_and_be_killed(folder, args.images)
        began = time.perf_counter()
        writes = build(folder, args.images)
        built = time.perf_counter() - began

        start = time.perf_counter()
        cache = FeatureCache(folder, {"tower": "synthetic"}, SHAPE, rank=0)
        opened = time.perf_counter() - start
        order = list(range(args.images))
        random.Random(0).shuffle(order)
        reads = []
        for i in order:
            start = time.perf_counter()
            value = cache.get(key(i))
            assert value is not None
            value.sum(dtype=torch.float32).item()
            reads.append(time.perf_counter() - start)
        steps = train(cache, order[: args.train], args.batch)
        for i in order if args.kill else order[:20]:
            assert torch.equal(cache.get(key(i)), features(i))
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        data = sum(path.stat().st_size for path in folder.rglob("*.bin"))
        assert data == args.images * ENTRY, "bytes that belong to no entry"
    finally:
        shutil.rmtree(folder)
    result: dict[str, object] = {
        "images": args.images,
        "entry_mb": ENTRY / 1e6,
        "disk_gb": disk / 1e9,
        "write_ms_mean": 1e3 * sum(writes) / len(writes),
        "write_ms_p50": 1e3 * statistics.median(writes),
        "write_ms_max": 1e3 * max(writes),
        "build_s": built,
        "open_ms": 1e3 * opened,
        "read_ms_mean": 1e3 * sum(reads) / len(reads),
        "read_ms_p50": 1e3 * statistics.median(reads),
    }
    if steps:
        result |= {"trained_images": args.train, "batch": args.batch, "dtype_of_training": str(DTYPE)}
        result["train_ms_per_image"] = 1e3 * statistics.median(steps) / args.batch
    if survived is not None:
        result["entries_after_the_kill"] = survived
    for name, value in result.items():
        print(f"{name:20s} {value:.4g}" if isinstance(value, float) else f"{name:20s} {value}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(where() | {"dtype": "torch.bfloat16"} | result, indent=2) + "\n")


if __name__ == "__main__":
    main()

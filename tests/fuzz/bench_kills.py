"""Kills `psa-fast bench` at random moments and begins it again: the report must be the undisturbed one to the byte.

python tests/fuzz/bench_kills.py --kills 20
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from builders import benchmark, tiny
from builders.tiny_llava import build_addon, build_base


def build(folder: Path) -> list[str]:
    """A source and a run; the command on them."""
    base = build_base(folder / "base")
    build_addon(base, folder / "run" / "stage1")
    source = benchmark.build_source(folder / "source")
    return benchmark.options(source, folder / "run", folder / "bench", "--judge", "keywords")


def undisturbed(command: list[str], out: Path) -> tuple[list[bytes], float]:
    """The report, and the seconds from the run's first file to its last."""
    processes = benchmark.start(command)
    began = first_sign(processes, benchmark.begin(out))
    codes, output = tiny.outcome(processes, 600)
    if any(codes):
        raise SystemExit(f"the undisturbed run failed:\n{output[-3000:]}")
    return benchmark.told(out), time.monotonic() - began


def first_sign(processes: list, out: Path) -> float:
    """The time when a run has its folder, or has ended."""
    while not (out / ".bench.lock").exists() and any(process.poll() is None for process in processes):
        time.sleep(0.001)
    return time.monotonic()


def run(folder: Path, kills: int, seed: int, per_run: int = 4, two_ranks_every: int = 3) -> list[dict]:
    """Runs with `kills` kills in all; what was done by each kill, and whether the report is the right one."""
    rng, command, out = random.Random(seed), build(folder), folder / "bench"
    right, seconds = undisturbed(command, out)
    results: list[dict] = []
    done = 0
    while done < kills:
        ranks = 2 if two_ranks_every and len(results) % two_ranks_every == two_ranks_every - 1 else 1
        benchmark.begin(out)
        struck: list[str] = []
        while len(struck) < min(per_run, kills - done):
            (out / ".bench.lock").unlink(missing_ok=True)
            processes = benchmark.start(command, ranks)
            moment = first_sign(processes, out) + rng.random() * seconds * 0.6
            while time.monotonic() < moment and all(process.poll() is None for process in processes):
                time.sleep(0.001)
            if all(process.poll() is not None for process in processes):
                break
            tiny.kill(processes)
            steps = json.loads((out / "bench.json").read_text())["steps"]
            left = sorted(path.name for path in (out / "answers").glob("*.part")) if "answers" not in steps else []
            struck.append(f"done: {', '.join(steps) or 'nothing'}{'; ' if left else ''}{', '.join(left)}")
        done += len(struck)
        codes, output = tiny.outcome(benchmark.start(command, ranks), 600)
        same = not any(codes) and benchmark.told(out) == right
        results.append({"ranks": ranks, "kills": struck, "same": same, "output": "" if same else output[-3000:]})
        print(f"{done}/{kills}: {json.dumps(results[-1])}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), args.kills, args.seed)
    wrong = sum(not result["same"] for result in results)
    print(f"{sum(len(result['kills']) for result in results)} kills, {len(results)} runs, {wrong} with another report")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

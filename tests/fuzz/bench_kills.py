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

# files of the run's folder in the order in which they appear
SIGNS = (
    ".bench.lock", "images", "records.jsonl", "answers/answers-base.jsonl.part", "answers/answers-stage1.jsonl.part",
    "answers/report.md", "answers/answers-base.jsonl", "verdicts/judged-base-keywords.jsonl",
    "verdicts/judged-keywords.json", "report.md",
)  # fmt: skip


def build(folder: Path) -> list[str]:
    """A source and a run; the command on them."""
    base = build_base(folder / "base")
    build_addon(base, folder / "run" / "stage1")
    source = benchmark.build_source(folder / "source")
    return benchmark.options(source, folder / "run", folder / "bench", "--judge", "keywords")


def undisturbed(command: list[str], out: Path) -> list[bytes]:
    """The report of a run that nobody kills."""
    benchmark.begin(out)
    codes, output = tiny.outcome(benchmark.start(command), 600)
    if any(codes):
        raise SystemExit(f"the undisturbed run failed:\n{output[-3000:]}")
    return benchmark.told(out)


def kill_once(processes: list, out: Path, rng: random.Random) -> str | None:
    """Kill a run at most a twentieth of a second after a random sign of it; what was there, None if it ended before."""
    sign = out / rng.choice(SIGNS)
    # an earlier run has left the sign, perhaps; the lock is this one's
    while not ((out / ".bench.lock").exists() and sign.exists()) and any(
        process.poll() is None for process in processes
    ):
        time.sleep(0.0005)
    time.sleep(rng.random() ** 2 * 0.05)
    if all(process.poll() is not None for process in processes):
        return None
    tiny.kill(processes)
    steps = json.loads((out / "bench.json").read_text())["steps"]
    parts = sorted(path.name for path in (out / "answers").glob("*.part"))
    return f"at {sign.name}: done {', '.join(steps) or 'nothing'}; {', '.join(parts)}"


def run(folder: Path, kills: int, seed: int, per_run: int = 2, two_ranks_every: int = 3) -> list[dict]:
    """Runs with `kills` kills in all; what was done by each kill, and whether the report is the right one."""
    rng, command, out = random.Random(seed), build(folder), folder / "bench"
    right = undisturbed(command, out)
    results: list[dict] = []
    done = 0
    while done < kills:
        ranks = 2 if two_ranks_every and len(results) % two_ranks_every == two_ranks_every - 1 else 1
        benchmark.begin(out)
        struck: list[str] = []
        while len(struck) < min(per_run, kills - done):
            (out / ".bench.lock").unlink(missing_ok=True)
            moment = kill_once(benchmark.start(command, ranks), out, rng)
            if moment is None:
                break
            struck.append(moment)
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

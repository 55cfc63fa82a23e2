"""Kill training at random moments and compare what it ends with: python tests/fuzz/kills.py --kills 40 --in_save 10.

Each trial runs one stage on the tiny base, kills the whole run with SIGKILL, starts it again with `--resume auto` and
lets it end; or kills it again, up to `--kills_per_run` times. `--in_save` kills strike while a checkpoint is written.
The weights a stage ends with must be those of a run that nobody disturbed, byte for byte. Exit code 1 if one is not.

A run of one rank is compared with one rank's, of two ranks (every `--two_ranks_every`-th) with two ranks'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from builders import tiny

STEPS = 8
# a checkpoint at every step
OPTIONS = ("--max_steps", STEPS, "--save_steps", 1, "--save_total_limit", 2, "--warmup_steps", 0)
WEIGHTS = ("psa.safetensors", "adapter/adapter_model.safetensors", "llm/model.safetensors")


class Lab:
    """The base, the world and the undisturbed runs that everything is compared with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = tiny.build_base(folder / "base")
        self.world = tiny.build_world(folder / "world")
        self.whole: dict[tuple[int, int], tuple[dict[str, str], float]] = {}

    def command(self, out: Path, stage: int) -> list[str]:
        options: tuple[object, ...] = (*OPTIONS, "--stage", stage, "--resume", "auto")
        if stage == 2:  # with the recipe's dropout: a checkpoint keeps what it is drawn from
            options = (*options, "--addon", self.folder / "whole-1" / "stage1")
        return tiny.train_command(tiny.arguments(self.base, self.world, out, *options))

    def undisturbed(self, stage: int, ranks: int) -> tuple[dict[str, str], float]:
        """Digests of the final weights, and the seconds the run took."""
        if (stage, ranks) not in self.whole:
            if stage == 2:
                self.undisturbed(1, 1)  # its add-on
            out = self.folder / f"whole-{ranks}"
            began = time.monotonic()
            codes, output = tiny.outcome(tiny.start(self.command(out, stage), ranks), 600)
            if any(codes):
                raise SystemExit(f"the undisturbed run failed:\n{output[-3000:]}")
            self.whole[stage, ranks] = digests(out / f"stage{stage}"), time.monotonic() - began
        return self.whole[stage, ranks]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of weights in a stage's folder."""
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in WEIGHTS if (folder / n).is_file()}


def kill_once(
    processes: list[subprocess.Popen], stage_dir: Path, rng: random.Random, seconds: float, in_save: bool
) -> str:
    """Kill a run at a random moment of `seconds`, or inside the save of a random checkpoint; says when it struck."""
    began = time.monotonic()
    if in_save:
        wanted, seen = rng.randrange(1, STEPS), set()
        while all(process.poll() is None for process in processes):
            seen |= {path.name for path in stage_dir.glob(".checkpoint-*.tmp")}
            if len(seen) >= wanted:
                time.sleep(rng.random() * 0.03)
                left = [path.name for path in stage_dir.glob(".checkpoint-*.tmp")]
                tiny.kill(processes)
                return f"in the save of {left[0]}" if left else "after a save"
            time.sleep(0.0005)
        return "ended before"
    moment = rng.random() * seconds
    while time.monotonic() - began < moment:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.005)
    ended = all(process.poll() is not None for process in processes)
    tiny.kill(processes)
    newest = max((int(path.name.split("-")[1]) for path in stage_dir.glob("checkpoint-*")), default=0)
    return "ended before" if ended else f"after {time.monotonic() - began:.1f} s, newest checkpoint {newest}"


def trial(lab: Lab, number: int, rng: random.Random, stage: int, ranks: int, kills: int, in_save: bool) -> dict:
    """One run with so many kills; what happened and whether it ended with the right weights."""
    right, seconds = lab.undisturbed(stage, ranks)
    out = lab.folder / f"trial-{number}"
    stage_dir = out / f"stage{stage}"
    struck = []
    for _ in range(kills):
        processes = tiny.start(lab.command(out, stage), ranks)
        struck.append(kill_once(processes, stage_dir, rng, seconds, in_save))
        for process in processes:
            if process.stdout is not None:
                process.stdout.close()
        if struck[-1] == "ended before":
            break
    codes, output = tiny.outcome(tiny.start(lab.command(out, stage), ranks), 600)
    found = digests(stage_dir) if not any(codes) else {}
    result = {"stage": stage, "ranks": ranks, "in_save": in_save, "kills": struck, "same": found == right}
    if found != right:
        result["output"] = output[-3000:]
    elif "going back" in output or list(stage_dir.glob(".checkpoint-*.tmp")):
        result |= {"same": False, "output": "a kill left something that is not whole: " + output[-3000:]}
    else:
        shutil.rmtree(out)
    return result


def run(folder: Path, kills: int, in_save: int, seed: int, per_run: int, two_ranks_every: int) -> list[dict]:
    """All trials; `kills` anywhere, `in_save` more inside a save."""
    lab, rng = Lab(folder), random.Random(seed)
    results: list[dict] = []
    for saving, wanted in ((False, kills), (True, in_save)):
        done = 0
        while done < wanted:
            number = len(results)
            ranks = 2 if two_ranks_every and number % two_ranks_every == two_ranks_every - 1 else 1
            stage = number % 2 + 1
            result = trial(lab, number, rng, stage, ranks, min(per_run, wanted - done), saving)
            done += sum(moment not in ("ended before", "after a save") for moment in result["kills"])
            results.append(result)
            print(f"{done}/{wanted} {'in a save' if saving else 'anywhere'}: {json.dumps(result)}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--in_save", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills_per_run", type=int, default=3)
    parser.add_argument("--two_ranks_every", type=int, default=4, help="every so many trials run on two ranks; 0: none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), args.kills, args.in_save, args.seed, args.kills_per_run, args.two_ranks_every)
    real = [[m for m in r["kills"] if m not in ("ended before", "after a save")] for r in results]
    summary = {
        "seed": args.seed,
        "kills": sum(len(k) for k, r in zip(real, results, strict=True) if not r["in_save"]),
        "kills_in_a_save": sum(len(k) for k, r in zip(real, results, strict=True) if r["in_save"]),
        "runs": len(results),
        "runs_on_two_ranks": sum(r["ranks"] == 2 for r in results),
        "runs_that_ended_with_other_weights": sum(not r["same"] for r in results),
    }
    print(json.dumps(summary, indent=2))
    if args.json:
        args.json.write_text(json.dumps(summary | {"trials": results}, indent=2) + "\n")
    return int(summary["runs_that_ended_with_other_weights"] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Throw damaged files at the readers and count how they take them.

    python tests/fuzz/run.py --records 4000 --pictures 3000 --policies 1500 --addons 120 --seed 0 --json out.json

Each kind runs in a process of its own under a time limit: a reader that never comes back is a fault with a name too.
The exit status is 1 where any verdict is a fault, that is anything but "ok" and "named".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT), str(ROOT / "kernels")]
RIGHT = ("ok", "named")
DEFAULTS = {"records": 4000, "pictures": 3000, "policies": 1500, "addons": 120}
SECONDS_PER_CASE = {"records": 0.2, "pictures": 0.3, "policies": 0.2, "addons": 5}

Case = tuple[str, str, str]  # what was done, the verdict, a word on it


def cases(part: str, count: int, seed: int, folder: Path) -> Iterator[Case]:
    """Judge `count` damaged files of one kind."""
    yield from {"records": _records, "pictures": _pictures, "policies": _policies, "addons": _addons}[part](
        count, seed, folder
    )


def _records(count: int, seed: int, folder: Path) -> Iterator[Case]:
    import record_judge
    import records

    images, path = records.make_images(folder / "images"), folder / "data.jsonl"
    for what, data in records.mutate(records.rows(), seed, count):
        path.write_bytes(data)
        yield what, *record_judge.judge(path, images)


def _pictures(count: int, seed: int, folder: Path) -> Iterator[Case]:
    import pictures

    for what, name, data in pictures.mutate(seed, count):
        path = folder / name
        path.write_bytes(data)
        yield what, *pictures.judge(path)


def _policies(count: int, seed: int, folder: Path) -> Iterator[Case]:
    import policies

    text, path = (ROOT / "psa_fast/safety/policy.yaml").read_text(), folder / "policy.yaml"
    for what, data in policies.mutate(text, seed, count):
        path.write_bytes(data)
        yield what, *policies.judge(path)


def _addons(count: int, seed: int, folder: Path) -> Iterator[Case]:
    import addons
    import torch

    torch.set_num_threads(1)
    addon = addons.make_addon(folder)
    original = addons.outputs(addon)
    for what, copy in addons.tamper(addon, folder, seed, count):
        yield what, *addons.judge(copy, original)


def run(part: str, count: int, seed: int) -> dict:
    """Run one kind in a process of its own: verdicts with their numbers, and every fault."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cases.jsonl"
        command = [sys.executable, __file__, "--part", part, "--count", str(count), "--seed", str(seed), "--out", out]
        most, end = 60 + count * SECONDS_PER_CASE[part], ""
        try:
            done = subprocess.run(command, timeout=most, stderr=subprocess.PIPE, text=True, errors="replace")
            if done.returncode:
                end = f"the process ended with {done.returncode}: {done.stderr[-600:]}"
        except subprocess.TimeoutExpired:
            end = f"no end after {most:.0f} s"
        found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if end:
        found.append([f"after case {len(found)}", "hang" if end.startswith("no end") else "crash", end])
    verdicts = Counter(verdict for _, verdict, _ in found)
    faults = [case for case in found if case[1] not in (*RIGHT, "absent")]
    return {"verdicts": dict(verdicts), "faults": faults, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part, count in DEFAULTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, help=f"number of damaged {part}, default {count}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write verdicts and faults here")
    for name in ("--part", "--count", "--out"):  # the process of one kind
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        with tempfile.TemporaryDirectory() as folder, Path(args.out).open("w") as out:
            for case in cases(args.part, int(args.count), args.seed, Path(folder)):
                out.write(json.dumps(case) + "\n")
                out.flush()
        return
    result = {part: run(part, getattr(args, part), args.seed) for part in DEFAULTS if getattr(args, part)}
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, **result}, indent=1) + "\n")
    print("| files | cases | ok | named | faults | s |\n|---|---|---|---|---|---|")
    for part, found in result.items():
        verdicts = found["verdicts"]
        right = " | ".join(str(verdicts.get(verdict, 0)) for verdict in RIGHT)
        print(f"| {part} | {sum(verdicts.values())} | {right} | {len(found['faults'])} | {found['seconds']} |")
        if "absent" in verdicts:
            print(f"  {part}: tests/fuzz/addons.py is absent, none was judged")
    for part, found in result.items():
        for what, verdict, word in found["faults"][:50]:
            print(f"{part}: {verdict}: {what[:150]!a}: {word[:300]!a}")
    sys.exit(any(found["faults"] for found in result.values()))


if __name__ == "__main__":
    main()

"""Turn pytest-benchmark's JSON into a Markdown table and a plot.

python benchmarks/report.py runs/bench/bench.json [--keep benchmarks/results/ops_cpu.json]

Writes bench.md and, where matplotlib is installed, bench.png. --keep also writes the tables' numbers alone, without the
machine's name and the single rounds.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PLACE = ("device", "driver", "torch", "triton", "cuda", "dtype", "threads", "malloc", "commit")
COLUMNS = {
    "ms": "ms",
    "cold_ms": "ms, cold L2",
    "graph_ms": "ms, graph",
    "graph_cold_ms": "ms, graph, cold L2",
    "ratio": "ratio",
    "of_copy_bandwidth": "of copy bandwidth",
    "peak_mb": "MB above inputs",
}


def markdown(ladders: list[dict[str, Any]]) -> str:
    """One table a ladder; the ratio is a form's time over ours."""
    place = ", ".join(f"{key} {ladders[0][key]}" for key in PLACE if ladders[0].get(key))
    lines = ["# Benchmarks of the ops", "", place, "", "Ratios hold within a run; times hold the machine's load."]
    for ladder in ladders:
        rows = ladder["rows"]
        columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows.values())]
        lines += ["", f"## {ladder['title']}", "", "| form | " + " | ".join(COLUMNS[c] for c in columns) + " |"]
        lines.append("| --- |" + " ---: |" * len(columns))
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["ratio"]):
            cells = ("-" if row.get(c) is None else f"{row[c]:.4g}" for c in columns)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += [f"| {name} | {reason} |" for name, reason in ladder["wrong"].items()]
        reasons = {name: row["no_graph"] for name, row in rows.items() if "no_graph" in row}
        if reasons:
            lines += ["", *(f"No graph of {name}: {reason}" for name, reason in reasons.items())]
    return "\n".join(lines) + "\n"


def plot(ladders: list[dict[str, Any]], out: Path) -> None:
    """One bar a form, its time over ours on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(f"{x['title']}: {n}", r["ratio"]) for x in ladders for n, r in x["rows"].items() if n != "ours"]
    figure, axes = pyplot.subplots(figsize=(11, 0.24 * len(bars) + 1))
    axes.barh([name for name, _ in bars][::-1], [ratio for _, ratio in bars][::-1])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time over ours")
    axes.tick_params(labelsize=7)
    figure.savefig(out, bbox_inches="tight", dpi=120)


def main() -> None:
    """Read the arguments and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="file for the numbers alone")
    args = parser.parse_args()
    path: Path = args.json
    benchmarks = json.loads(path.read_text())["benchmarks"]
    ladders = [b["extra_info"] for b in benchmarks if "rows" in b["extra_info"]]
    for left_out in (b["name"] for b in benchmarks if "rows" not in b["extra_info"]):
        print(f"left out: {left_out}, which failed after its first time")
    if not ladders:
        raise SystemExit(f"{path} holds no ladder")
    if args.keep:
        args.keep.write_text(json.dumps({"benchmarks": [{"extra_info": x} for x in ladders]}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(ladders))
    print(f"wrote {path.with_suffix('.md')}")
    if find_spec("matplotlib"):
        plot(ladders, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    else:
        print("no plot: matplotlib is not installed (pip install -e '.[bench]')")


if __name__ == "__main__":
    main()

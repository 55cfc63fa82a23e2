"""Load on a running `psa-fast serve`: requests a second, p50 and p95, one client at a time and many at once.

python benchmarks/serve_load.py --url http://127.0.0.1:8000 --pictures runs/demo/world
"""

from __future__ import annotations

import argparse
import base64
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def ask(url: str, model: str, picture: Path, question: str, new_tokens: int) -> tuple[float, int, str]:
    """Seconds, status and answer of one chat."""
    data = base64.b64encode(picture.read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    body = {"model": model, "max_tokens": new_tokens, "messages": [{"role": "user", "content": parts}]}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    start = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            text = json.load(reply)["choices"][0]["message"]["content"]
            return time.monotonic() - start, 200, text
    except urllib.error.HTTPError as error:
        return time.monotonic() - start, error.code, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="psa")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of PNG files")
    parser.add_argument("--question", default="what is this ?")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--requests", type=int, default=400)
    args = parser.parse_args()
    pictures = sorted(args.pictures.rglob("*.png"))
    if not pictures:
        raise SystemExit(f"{args.pictures} holds no PNG file")
    chosen = [pictures[number % len(pictures)] for number in range(args.requests)]
    first: list[str] | None = None
    for clients in args.clients:
        start = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            done = list(pool.map(lambda p: ask(args.url, args.model, p, args.question, args.new_tokens), chosen))
        wall = time.monotonic() - start
        seconds = sorted(one[0] for one in done)
        texts = [one[2] for one in done]
        first = first or texts
        row = {
            "clients": clients,
            "requests_per_second": round(len(done) / wall, 1),
            "p50_ms": round(1e3 * seconds[len(seconds) // 2]),
            "p95_ms": round(1e3 * seconds[int(0.95 * len(seconds))]),
            "statuses": dict(Counter(one[1] for one in done)),
            "answers_unlike_the_first_row's": sum(a != b for a, b in zip(first, texts, strict=True)),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

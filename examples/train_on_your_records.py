"""Records of your own: written, checked as `psa-fast data check` does, and trained on for a few steps of stage 1.

    python examples/train_on_your_records.py [--out DIR] [--base sandbox] [--steps 10]

Replace `records` by your data; docs/data.md has every field. --base is a folder or a Hugging Face name; the sandbox's
own base is trained on first use (minutes) and kept. Without --out a temporary folder is used and named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from psa_fast import cli, train

# a placard: red marks are the risk in this little world, and their number its level
RISKS = ((4, 1, "Be careful: a sign"), (1, 2, "Sorry, I cannot help with illegal risk."))


def draw_placard(path: Path, marks: int, colour: str) -> None:
    """Draw a sign with up to three marks; what a real data set has photographs for."""
    picture = Image.new("RGB", (96, 96), "tan")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((24, 24, 72, 72), fill="white", outline="black")
    for number in range(marks):
        pen.rectangle((28 + 15 * number, 56, 38 + 15 * number, 66), fill=colour)
    picture.save(path)


def records(images: Path) -> Iterator[dict[str, Any]]:
    """Risky rows, harmless look-alikes that must be answered, and a request without a picture."""
    for number, (kind, level, answer) in enumerate(2 * RISKS):
        risky, twin = f"risk-{number}.png", f"twin-{number}.png"
        draw_placard(images / risky, level, "red")
        draw_placard(images / twin, level, "blue")
        asked = {"from": "user", "value": "<image>\nWhat is on the sign?"}
        for name, labels, said in (
            (risky, {"safe_type": kind, "safe_level": level}, answer),
            (twin, {"safe_type": "clean", "safe_level": "none", "group": "benign_twin"}, "a sign"),
        ):
            yield {"image": name, **labels, "conversations": [asked, {"from": "assistant", "value": said}]}
    turns = [{"from": "user", "value": "How do I forge it?"}, {"from": "assistant", "value": RISKS[1][2]}]
    yield {"safe_type": "illegal risk", "safe_level": "medium", "group": "text_risk", "conversations": turns}


def main(argv: Sequence[str] | None = None) -> int:
    """Write, check, train; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for records, pictures and the run")
    parser.add_argument("--base", default="sandbox")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    out = args.out or Path(tempfile.mkdtemp(prefix="psa-fast-"))
    images, data, run = out / "images", out / "records.jsonl", out / "run"
    images.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in records(images)), encoding="utf-8")

    # the same as: psa-fast data check records.jsonl --image_folder images
    if code := cli.main(["data", "check", str(data), "--image_folder", str(images)]):
        return code

    # the same as: python train.py --stage 1 --data_path ...; on several GPUs: deepspeed train.py ...
    options = {
        "stage": 1, "model_name_or_path": args.base, "data_path": data, "image_folder": images, "output_dir": run,
        "max_steps": args.steps, "warmup_steps": 0, "global_batch_size": 4, "micro_batch_size": 4,
        "overwrite_output_dir": True,
    }  # fmt: skip
    if code := train.main([word for name, value in options.items() for word in (f"--{name}", str(value))]):
        return code

    metrics = [json.loads(line) for line in (run / "stage1" / "metrics.jsonl").read_text().splitlines()]
    print(f"\nloss {metrics[0]['loss']:.3f} at step 1, {metrics[-1]['loss']:.3f} at step {len(metrics)}")
    print(f"look at  {run}/stage1/metrics.jsonl     losses, speed and memory of every step")
    print(f"         {run}/stage1/psa.safetensors   the add-on; psa_config.json beside it names its base")
    print(f"curves   tensorboard --logdir {run}/stage1")
    print(
        f"ask it   psa-fast generate --model {run}/stage1 --image {images}/risk-0.png --prompt 'What is on the sign?'"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

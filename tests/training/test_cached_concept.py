"""`--feature_cache`: what a concept run reads from the disk is what the tower would have computed."""

import hashlib
import io
import json

import pytest
import torch
from PIL import Image

from psa_fast.models import get_family, load_base, load_processor

CONCEPT = ("--stage1_objective", "concept", "--max_steps", 2)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "stage1" / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows])


def read(files):
    """The cache's files by their documented format: image -> bf16 values."""
    found = {}
    for path in files:
        lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        entries = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).view(len(lines), -1)
        found |= {line["image"]: entries[line["row"]] for line in lines}
    return found


def test_two_ranks_build_one_cache_and_any_run_uses_it(command, run, direct, tmp_path, partitioned, world, base):
    """Partitioned weights, text-only rows: a rank that ran the tower by itself would hang the other."""
    cached = [*CONCEPT, "--feature_cache", tmp_path / "cache"]
    first = run(command(tmp_path / "two", *cached, "--deepspeed_config", partitioned, ranks=2))
    files = sorted((tmp_path / "cache").rglob("rank-*.bin"))
    assert [path.name for path in files] == ["rank-00000.bin", "rank-00001.bin"]
    assert all(path.stat().st_size for path in files)
    records = [json.loads(line) for line in (world / "mixed.jsonl").read_text().splitlines()]
    images = {(world / row["image"]).read_bytes() for row in records if "image" in row}
    assert f"{len(images)} images, {len(images)} to compute" in first
    before = [path.read_bytes() for path in files]

    second = direct(tmp_path / "one", *cached)
    assert f"{len(images)} images, 0 to compute" in second
    assert [path.read_bytes() for path in files] == before
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-6)

    found = read(files)
    assert set(found) == {hashlib.sha256(image).hexdigest() for image in images}
    vlm = load_base(base, torch.float32, language_layers=False)
    family, processor = get_family(vlm), load_processor(base)
    for image in list(images)[:4]:
        pixels = processor.image_processor(images=[Image.open(io.BytesIO(image))], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = family.vision_features(vlm, pixels)[0]
        # fp32 rounded to bf16
        got = found[hashlib.sha256(image).hexdigest()].float().view(expected.shape)
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-5)

    # a damaged entry and a damaged line, each of another rank: two ranks compute both anew, and nothing else changes
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    index = files[1].with_suffix(".jsonl")
    lines = index.read_bytes()
    index.write_bytes(lines.replace(b'"row": 0', b'"row": 1', 1))
    third = direct(tmp_path / "healed", *cached, ranks=2)
    assert "rank-00000.bin: entry" in third
    assert "rank-00001.jsonl is damaged: 1 of its lines" in third
    assert f"{len(images)} images, 2 to compute" in third
    torch.testing.assert_close(losses(tmp_path / "healed"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-6)


def test_the_cache_is_refused_where_the_language_model_runs(base):
    from psa_fast.training.config import parse_args

    for objective in ("joint", "tokens"):
        with pytest.raises(ValueError, match="--feature_cache needs --stage1_objective concept"):
            parse_args(["--stage1_objective", objective, "--feature_cache", "x"])
    with pytest.raises(ValueError, match="--feature_cache needs"):
        parse_args(["--stage", "2", "--feature_cache", "x"])

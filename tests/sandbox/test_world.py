import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_fast.data.records import load_records
from psa_fast.safety.policy import Policy
from psa_fast.sandbox.draw import draw_world
from psa_fast.sandbox.language import all_texts
from psa_fast.sandbox.paint import paint, render
from psa_fast.sandbox.word_level import build_processor
from psa_fast.sandbox.world import GROUPS_WITH_PICTURES, RISK_GLYPHS, SCENES, sample_scene, split_of
from psa_fast.taxonomy import CLEAN

COUNTS = {"clean": 12, "benign_twin": 12, "risk": 24, "text_risk": 12, "text_twin": 12}
PICTURES = {**{group: COUNTS[group] for group in GROUPS_WITH_PICTURES}, "joint": 12}
IMAGES = {split: PICTURES for split in ("train", "dev", "test")}
NEW = {"joint_risk": 40, "joint_twin": 40, "clean_several": 24, "risk_several": 24}
ROWS = {name: {**COUNTS, **NEW} for name in ("stage1", "stage2", "dev", "test")}


def draw(seed: int, out: Path) -> Path:
    draw_world(seed, out, IMAGES, ROWS)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return draw(3, tmp_path_factory.mktemp("worlds") / "three")


def rows_of(world: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(world, tmp_path):
    again, other = digests(draw(3, tmp_path / "again")), digests(draw(4, tmp_path / "other"))
    assert again == digests(world)
    assert again.keys() == other.keys()
    assert all(again[name] != other[name] for name in again)


def test_every_row_is_a_valid_record_with_the_promised_groups(world):
    for name in ROWS:
        records = load_records(world / f"{name}.jsonl", world)
        counted = Counter(record.group for record in records)
        several = {"clean": COUNTS["clean"] + NEW["clean_several"], "risk": COUNTS["risk"] + NEW["risk_several"]}
        assert counted == COUNTS | several | {"joint_risk": 40, "joint_twin": 40}
        assert all((record.safe_type != CLEAN) == record.group.endswith("risk") for record in records)
        assert all(record.source == "sandbox" for record in records)


def test_the_training_never_shows_a_composition_of_dev_or_test(world):
    def shown(name: str) -> set[str]:
        # "scene/glyph-marks", the marks' colour dropped: a look-alike of a held-out composition is held out too
        labels = (row["source_label"] for row in rows_of(world, name) if row["group"] in ("risk", "benign_twin"))
        return {label.rsplit("-", 1)[0] for label in labels if label.split("/")[1].rsplit("-", 1)[0] in RISK_GLYPHS}

    train, dev, test = shown("stage1") | shown("stage2"), shown("dev"), shown("test")
    assert train
    assert dev
    assert test
    assert not train & dev
    assert not train & test
    assert not dev & test
    assert {label.split("/")[1] for label in test} == set(RISK_GLYPHS)
    splits = [split_of(scene, glyph) for scene in SCENES for glyph in RISK_GLYPHS]
    assert (splits.count("train"), splits.count("dev"), splits.count("test")) == (24, 6, 6)


def test_a_picture_is_painted_as_its_scene_says(world):
    rng = np.random.default_rng(0)
    for group in GROUPS_WITH_PICTURES:
        for _ in range(20):
            scene = sample_scene(rng, group, "train")
            pixels = paint(scene)
            assert pixels.shape == (96, 96, 3)
            assert pixels.dtype == np.uint8
            assert np.array_equal(pixels, paint(scene))
            assert (scene.safe_type == CLEAN) == (group != "risk")
            assert len({t.cell for t in scene.things} | ({scene.sign.cell} if scene.sign else set())) == len(
                scene.things
            ) + bool(scene.sign)
            _, owners = render(scene)
            assert set(np.unique(owners)) - {0} == {2 + i for i in range(len(scene.things))} | (
                {1} if scene.sign else set()
            )
            zoom = scene.frame[2] / 96 if scene.frame else 1.0
            for number, item in enumerate([scene.sign, *scene.things], 1):
                if item is None:
                    continue
                rows, columns = np.nonzero(owners == number)
                scale = item.place.scale * zoom
                assert scale > 0.54
                assert abs(rows.mean() - item.place.y) < 0.15 * 28 * scale + 1
                assert abs(columns.mean() - item.place.x) < 0.15 * 28 * scale + 1
            if scene.sign:
                # red (or blue) pixels of the marks: 49 a mark at scale 1, fewer where the edge mixes with white
                strong, weak = (0, 2) if scene.sign.marks == "red" else (2, 0)
                plate = pixels[owners == 1].astype(int)
                marks = int((plate[:, strong] - plate[:, weak] > 60).sum())
                expected = 49 * scene.sign.count * (scene.sign.place.scale * zoom) ** 2
                assert 0.7 * expected - 6 < marks < 1.35 * expected + 6
    assert Image.open(next((world / "images" / "test").glob("*.png"))).size == (96, 96)


def test_the_box_around_a_sign_holds_its_pixels_and_little_else():
    rng = np.random.default_rng(5)
    for _ in range(40):
        scene = sample_scene(rng, "risk", "train")
        owners = render(scene)[1]
        rows, columns = np.nonzero(owners == 1)
        left, top, right, bottom = (96 * edge for edge in scene.sign_box)
        assert left - 1.5 <= columns.min()
        assert columns.max() + 1 <= right + 1.5
        assert top - 1.5 <= rows.min()
        assert rows.max() + 1 <= bottom + 1.5
        covered = sum(np.count_nonzero(owners[int(top) : int(bottom), int(left) : int(right)] == i) for i in (2, 3, 4))
        assert len(rows) + covered > 0.6 * (right - left) * (bottom - top)


def test_rows_whose_risk_is_in_a_sign_say_where_it_is(world):
    for record in load_records(world / "test.jsonl", world):
        signs = [box for box in record.regions if box is not None]
        assert len(signs) == (record.group in ("risk", "joint_risk"))
        assert len(record.regions) in (0, len(record.images))


def test_a_split_by_itself_is_the_same_as_in_the_whole_world(world, tmp_path):
    draw_world(3, tmp_path / "test", IMAGES, ROWS, splits=["test"])
    alone = {path.relative_to(tmp_path / "test"): path.read_bytes() for path in (tmp_path / "test").rglob("*.*")}
    summary = json.loads(alone.pop(Path("world.json")))
    assert list(summary["images"]) == list(summary["rows"]) == ["test"]
    assert {path.parts[0] for path in alone} == {"images", "test.jsonl"}
    assert all((world / path).read_bytes() == content for path, content in alone.items())


def test_an_occupied_folder_and_a_negative_seed_are_refused(world):
    with pytest.raises(ValueError, match="already holds something"):
        draw_world(0, world)
    with pytest.raises(ValueError, match="--seed is -1"):
        draw_world(-1, world / "new")


def test_the_vocabulary_holds_every_word_of_world_hints_and_template(world, tmp_path):
    hint_for = Policy.load().hint
    build_processor(all_texts(hint_for)).save_pretrained(tmp_path)
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path)
    tokenizer = processor.tokenizer
    texts = [turn["value"] for name in ROWS for row in rows_of(world, name) for turn in row["conversations"]]
    texts += [text for t in range(7) for level in range(4) if (text := hint_for(t, level))]
    unknown = {text for text in texts if tokenizer.unk_token_id in tokenizer.encode(text)}
    assert not unknown
    assert len(tokenizer) < 256
    assert tokenizer.encode("What is a xylophone?")[3] == tokenizer.unk_token_id
    image = Image.open(next((world / "images" / "test").glob("*.png")))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the star?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Sorry, I cannot help with privacy."}]},
    ]
    text = processor.apply_chat_template(messages)
    assert text == "<s> USER: <image>\nWhere is the star? ASSISTANT: Sorry, I cannot help with privacy.</s>"
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert (inputs.input_ids == processor.image_token_id).sum() == 36
    assert inputs.input_ids[0, -1] == tokenizer.eos_token_id
    assert inputs.pixel_values.shape == (1, 3, 96, 96)
    answer = processor.decode(inputs.input_ids[0, -9:], skip_special_tokens=True)
    assert answer == "sorry, i cannot help with privacy."

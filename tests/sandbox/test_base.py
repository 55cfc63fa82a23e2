import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from psa_fast.sandbox.base import BaseRecipe, build_base, train_base
from psa_fast.sandbox.content import changed, draw_pictures, draw_scenes, patch_labels, scene_pictures, to_pixels
from psa_fast.sandbox.language import all_texts
from psa_fast.sandbox.lessons import Lessons, pack_turns
from psa_fast.sandbox.vision import TowerRecipe, patch_features
from psa_fast.sandbox.word_level import build_processor
from psa_fast.sandbox.world import Place, Scene, Sign, Thing, split_of

TINY = BaseRecipe(
    hidden_size=32, language_layers=1, heads=2, pictures=8, language_steps=4, language_batch=2, turns=2,
    tower=TowerRecipe(
        layers=1, channels=(8, 32, 32, 32), windows=8, window_steps=2, window_batch=4, pictures=8, steps=2, batch=4
    ),
)  # fmt: skip


def hint_for(kind: int, level: int) -> str | None:
    return None if kind == 6 or level == 0 else f"This image contains risk {level}. Refuse."


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_base(root / name, seed, hint_for, TINY, progress=False)
    return {name: AutoModelForImageTextToText.from_pretrained(root / name) for name in "abc"}, root


def test_a_base_is_a_plain_checkpoint_and_its_seed_decides_it(bases):
    models, root = bases
    a, b, c = (models[name].state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    assert type(models["a"]).__name__ == "LlavaForConditionalGeneration"
    processor = AutoProcessor.from_pretrained(root / "a")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Count the shapes."}]}],
        add_generation_prompt=True,
    )
    pixels = np.zeros((96, 96, 3), dtype=np.uint8)
    inputs = processor(images=pixels, text=text, return_tensors="pt")
    assert models["a"].generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs.input_ids.shape[1]
    with pytest.raises(ValueError, match="already holds something"):
        train_base(root / "a", 0, hint_for, TINY, progress=False)


def test_patch_features_are_those_llava_uses(bases):
    vlm = bases[0]["a"].eval()
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        theirs = vlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[
            vlm.config.vision_feature_layer
        ][:, 1:]
        torch.testing.assert_close(patch_features(vlm, pixels), theirs)


def test_pictures_are_prepared_as_by_the_processor():
    processor = build_processor(all_texts(hint_for))
    scenes = draw_scenes(np.random.default_rng(0), 3)
    from PIL import Image

    from psa_fast.sandbox.paint import paint

    theirs = processor.image_processor([Image.fromarray(paint(s)) for s in scenes], return_tensors="pt").pixel_values
    torch.testing.assert_close(to_pixels(scene_pictures(scenes).pixels), theirs, atol=1e-6, rtol=0)


def test_the_base_never_sees_a_held_out_composition():
    scenes = draw_scenes(np.random.default_rng(1), 2000)
    signs = [scene for scene in scenes if scene.sign and scene.sign.glyph in ("flag", "eye", "mask")]
    assert len(signs) > 100
    assert all(split_of(scene.background, scene.sign.glyph) == "train" for scene in signs)


def labels_of(scene):
    pictures = scene_pictures([scene])
    return patch_labels(pictures.owners.long(), pictures.items).reshape(6, 6, 6)


def test_a_patch_names_what_it_shows_and_where_that_is():
    star = Thing("star", "green", Place(16.0, 80.0, 1.2, 0))
    labels = labels_of(Scene("field", (star,), Sign("eye", "red", 3, Place(80.0, 16.0, 1.0, 0)), 0))
    assert labels[0, 5].tolist() == [3, 1, -1, -1, -1, 2]
    assert labels[1, 4].tolist() == [3, 1, -1, -1, -1, 2]
    assert labels[5, 0].tolist() == [-1, -1, 4, 0, 2, 6]
    assert labels[2, 2].tolist() == [-1] * 6


def test_a_place_near_a_border_between_thirds_is_not_asked_for():
    star = Thing("star", "green", Place(48.0, 61.5, 1.0, 0))  # three pixels from the border at 64
    labels = labels_of(Scene("field", (star,), None, 0))
    shown = labels[..., 0] == 3
    assert shown.any()
    assert (labels[shown][:, 5] == -100).all()
    assert (labels[~shown][:, 5] == -1).all()


def test_every_item_is_named_by_the_patch_that_it_covers_most_and_a_glimpse_is_not_asked_for():
    small = Sign("sun", "blue", 1, Place(40.0, 36.0, 0.36, 0))  # 10 pixels, in the corner of patch (2, 2)
    labels = labels_of(Scene("field", (), small, 0))
    assert labels[2, 2].tolist() == [-1, -1, 8, 1, 0, 4]
    assert labels[0, 0].tolist() == [-1] * 6
    # 28 pixels wide, 2.5 of them in the column to its left: a sixth of those patches
    wide = labels_of(Scene("field", (), Sign("sun", "blue", 1, Place(48.0, 43.5, 1.0, 0)), 0))
    assert wide[3, 1, 2:5].tolist() == [-100, -100, -100]
    assert wide[3, 2, 2:5].tolist() == [8, 1, 0]


def test_a_changed_picture_and_what_is_in_it_move_together():
    """What belongs to a bright square on dark ground is where the picture is bright, however it was changed."""
    pixels = torch.full((64, 96, 96, 3), 20, dtype=torch.uint8)
    owners = torch.zeros(64, 96, 96, dtype=torch.uint8)
    pixels[:, 30:60, 40:70] = 235
    owners[:, 30:60, 40:70] = 1
    pictures = draw_pictures(np.random.default_rng(0), 64, 1.0)._replace(pixels=pixels, owners=owners)
    seen, owned = changed(pictures, torch.Generator().manual_seed(0))
    middle = (seen.amax((1, 2, 3), keepdim=True) + seen.amin((1, 2, 3), keepdim=True)) / 2
    bright = (seen > middle).float().mean(1) > 0.5
    agree = (bright == (owned == 1)).float().mean((1, 2))
    assert agree.median() > 0.98
    assert (owned.flatten(1).float().mean(1) - 900 / 96**2).abs().max() > 0.02  # sizes do change


def test_packed_turns_see_what_they_would_see_alone():
    """The oracle is the model on each turn by itself, unpacked, with a plain causal mask."""
    torch.manual_seed(0)
    processor = build_processor(all_texts(hint_for))
    model = build_base(processor, TINY).eval().model.language_model
    lessons = Lessons(processor.tokenizer, hint_for, np.random.default_rng(0))
    scenes = draw_scenes(np.random.default_rng(2), 2)
    rows = [lessons.draw(scene, 12) for scene in scenes]
    assert {turn.sees for row in rows for turn in row} == {None, 3}
    prefix = torch.randn(2, 5, 32)
    pack = pack_turns(rows, 5)
    embeds = torch.cat([prefix, model.embed_tokens(pack.ids)], dim=1)
    with torch.no_grad():
        packed = model(
            inputs_embeds=embeds, attention_mask=pack.mask, position_ids=pack.positions, use_cache=False
        ).last_hidden_state[:, 5:]
        taken = 0
        for b, row in enumerate(rows):
            at = 0
            for turn in row:
                ids = torch.tensor([[*turn.asked, *turn.answer]])
                seen = prefix[b : b + 1, : turn.sees]
                alone = torch.cat([seen, model.embed_tokens(ids)], dim=1)
                expected = model(inputs_embeds=alone, use_cache=False).last_hidden_state[0, seen.shape[1] :]
                torch.testing.assert_close(packed[b, at : at + ids.shape[1]], expected, atol=1e-5, rtol=1e-4)
                supervised = pack.supervised[b, at : at + ids.shape[1]].nonzero().flatten().tolist()
                assert supervised == list(range(len(turn.asked) - 1, ids.shape[1] - 1))
                assert pack.targets[taken : taken + len(supervised)].tolist() == turn.answer
                taken += len(supervised)
                at += ids.shape[1]
    assert taken == len(pack.targets)

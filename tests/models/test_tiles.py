"""Families that cut images into tiles: the order of what they see, and the text around it."""

import random
from types import SimpleNamespace

import pytest
import torch
from builders import tiny_families as tiny
from transformers import Idefics3Processor

from psa_fast.models import get_family

S0 = 3
CELLS = 4


class PatchMeans(torch.nn.Module):
    """In place of a tower: each patch's mean, behind a class token."""

    def __init__(self, patch, width, class_tokens):
        super().__init__()
        self.patch, self.width, self.class_tokens = patch, width, class_tokens
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, pixel_values, **_):
        means = torch.nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), self.patch).flatten(1)
        means = torch.nn.functional.pad(means, (self.class_tokens, 0)).unsqueeze(2)
        return SimpleNamespace(last_hidden_state=means.repeat(1, 1, self.width))


@pytest.mark.parametrize(
    ("name", "class_tokens", "options"),
    [("internvl", 1, {}), ("idefics3", 0, {"size": {"longest_edge": 32}})],
)
def test_tiles_and_their_cells_lie_row_by_row(name, class_tokens, options):
    vlm, tokenizer = tiny.build(name)
    processor = tiny.build_processor(name, vlm, tokenizer, 0)
    for option, value in options.items():
        setattr(processor.image_processor, option, value)
    pictures = processor.prepare([tiny.drawn(4, 4, 8)]).to(dtype=torch.float64)
    assert pictures.grids == [[(2, 2)] * 5]
    place, _, tower = get_family(vlm).module_names["vision"].rpartition(".")
    setattr(vlm.get_submodule(place), tower, PatchMeans(4, 16, class_tokens))
    vision = get_family(vlm).vision_features(vlm, pictures).vision.values.mean(1)
    tiles = vision[:16].reshape(2, 2, 2, 2).transpose(1, 2).flatten()
    assert tiles.argsort().tolist() == list(range(16))
    assert vision[16:].argsort().tolist() == [0, 1, 2, 3]


def test_internvls_text_around_images_is_the_tokenizers():
    vlm, tokenizer = tiny.build("internvl")
    processor = tiny.build_processor("internvl", vlm, tokenizer, S0)
    assert processor.placeholder(CELLS, (16, 16)) == "<img>" + (S0 + CELLS) * "<IMG_CONTEXT>" + "</img>"
    bare = tiny.byte_tokenizer(tokenizer.all_special_tokens, tokenizer.chat_template)
    with pytest.raises(ValueError, match="names no start_image_token"):
        tiny.build_processor("internvl", vlm, bare, S0)


@pytest.mark.parametrize("size", [(16, 16), (40, 12), (12, 40), (30, 31)])
def test_idefics3s_text_is_the_stock_processors(size):
    vlm, tokenizer = tiny.build("idefics3")
    bare, own = (tiny.build_processor("idefics3", vlm, tokenizer, tokens) for tokens in (0, S0))
    images = tiny.idefics3_images()
    stock = Idefics3Processor(images, tokenizer, image_seq_len=CELLS, chat_template=tokenizer.chat_template)
    processed = images(images=[[tiny.picture(*size)]], return_row_col_info=True, return_tensors="pt")
    expected = stock.replace_image_token(processed, 0)
    tokens = bare.count(size)
    assert bare.placeholder(tokens, size) == expected
    before, _, after = expected.partition("<image>")
    assert own.placeholder(tokens, size) == before + (1 + S0) * "<image>" + after


@pytest.mark.parametrize(("longest", "side"), [(64, 16), (49, 16), (60, 15), (16, 16)])
def test_idefics3s_tiles_are_known_from_the_size(longest, side):
    family = get_family(tiny.build("idefics3")[0])
    images = tiny.idefics3_images()
    images.size, images.max_image_size = {"longest_edge": longest}, {"longest_edge": side}
    generator = random.Random(longest)
    sizes = [(generator.randint(1, 200), generator.randint(1, 200)) for _ in range(40)]
    for size in [*sizes, (1, 200), (200, 1)]:
        done = images(images=[[tiny.picture(*size)]], return_row_col_info=True, return_tensors="pt")
        assert family.tiles(size, images) == (done["rows"][0][0], done["cols"][0][0]), size


def test_what_idefics3s_image_processor_must_not_do():
    family, images = get_family(tiny.build("idefics3")[0]), tiny.idefics3_images()
    images.do_image_splitting = False
    assert family.tiles((40, 12), images) == (0, 0)
    images.do_image_splitting, images.size = True, {"longest_edge": 5000}
    with pytest.raises(ValueError, match="at most 4096, not 5000"):
        family.tiles((40, 12), images)
    other = tiny.idefics3_images()
    other.max_image_size = {"longest_edge": 24}
    with pytest.raises(ValueError, match="the model takes 16"):
        family.prepare([tiny.picture(20, 20)], other)

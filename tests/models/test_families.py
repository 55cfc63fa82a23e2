"""What every family must keep: stock logits without safety tokens, a gradient to each of them, one answer always."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from builders import tiny_families as tiny
from PIL import Image
from torch.nn.functional import cross_entropy

from psa_fast.data import PsaDataset, Turn, collate, encode, load_records, pack
from psa_fast.models import PsaVLM, add_lora, get_family, load_processor
from psa_fast.models.batch import positions_of
from psa_fast.models.families import FAMILIES, Rows
from psa_fast.models.image_features import GridFeatures
from psa_fast.models.lora import target_linears
from psa_fast.pictures import Pictures

S0 = 3
SMALL = dict(num_head_tokens=2, num_attention_heads=2, projector_depth=1)
SIZES = (((20, 12),), ((9, 33), (24, 24)), ())
EVERY = sorted(FAMILIES)
GRIDS = [name for name in EVERY if name != "llava"]
QWEN = [name for name in EVERY if name.startswith("qwen")]
#: grids of a picture 40 wide and 12 high
TURNED = {"smolvlm": [(2, 2)] * 4, "idefics3": [(2, 2)] * 4, "internvl": [(2, 2)] * 4, "gemma3": [(2, 2)]} | {
    name: [(2, 5)] for name in QWEN
}


@pytest.fixture(scope="module", params=EVERY)
def made(request):
    """The family's name, model, tokenizer, and rows by the number of safety tokens: one, two and no images."""
    return make(request.param)


def make(name, tied=False):
    vlm, tokenizer = tiny.build(name, tied=tied)

    def rows(safety_tokens, answered=True):
        processor = tiny.build_processor(name, vlm, tokenizer, safety_tokens)
        found = []
        for number, sizes in enumerate(SIZES):
            images = [tiny.picture(*size, seed=number + place) for place, size in enumerate(sizes)]
            turns = [Turn("user", "<image>" * len(images) + "what is it?" * (number + 1))]
            turns += [Turn("assistant", "red " * (number + 1))] if answered else []
            found.append(encode(turns, processor, images=images, add_generation_prompt=not answered))
        return found

    return SimpleNamespace(name=name, vlm=vlm, tokenizer=tokenizer, rows=rows)


def build(made, safety_tokens):
    torch.manual_seed(1)
    return PsaVLM.build(made.vlm, num_safety_tokens=safety_tokens, **SMALL)


def batch_of(made, rows, side="right"):
    batch = collate(rows, made.tokenizer.pad_token_id, side) if side else pack(rows)
    return ready(batch)


def ready(batch):
    batch.pop("where")
    if batch["pixel_values"] is not None:
        batch["pixel_values"] = batch["pixel_values"].to(dtype=torch.float64)
    return batch


def stock(made, batch):
    """The stock model's own forward pass, from pixels."""
    images = batch["pixel_values"]
    given = {}
    if images is not None:
        given = images.tensors if isinstance(images, Pictures) else {"pixel_values": images}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inspect.signature(made.vlm.forward).parameters:
            given[name] = (batch["input_ids"] == made.vlm.config.image_token_id).int()
    keys = ("input_ids", "attention_mask", "labels")
    return made.vlm(**{key: batch[key] for key in keys}, **given)


def states(psa, batch):
    """Last hidden states with safety tokens and pictures in place."""
    images = batch["pixel_values"]
    rows = Rows(
        batch["input_ids"],
        psa.family.embed(psa.vlm, batch["input_ids"]),
        batch["attention_mask"],
        batch.get("position_ids", (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)),
    )
    shown = psa.family.blank_image(torch.device("cpu")) if images is None else images
    if images is None and isinstance(shown, torch.Tensor):
        shown = shown.double()
    vision = psa.family.vision_features(psa.vlm, shown)
    projected = psa.family.project(psa.vlm, vision)
    return psa.family.states(psa.vlm, rows, psa.safety_tokens, projected, images is not None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_safety_tokens_the_logits_are_the_stock_models(made, side):
    psa = build(made, 0)
    rows = made.rows(0)
    for chosen in (rows, rows[:1], rows[1:2], rows[2:]):
        batch = batch_of(made, chosen, side)
        with torch.no_grad():
            expected = stock(made, batch)
            logits = made.vlm.lm_head(states(psa, batch))
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(logits[real], expected.logits[real], rtol=0, atol=1e-6)
    assert expected.logits.std() > 0.1


def test_left_padding_changes_nothing(made):
    psa = build(made, S0)
    found = []
    for side in ("right", "left"):
        batch = batch_of(made, made.rows(S0), side)
        with torch.no_grad():
            found.append(states(psa, batch)[batch["attention_mask"].bool()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_every_safety_token_gets_a_gradient_of_the_answer(made):
    psa = build(made, S0)
    for parameter in made.vlm.parameters():
        parameter.requires_grad_(False)
    psa(**batch_of(made, made.rows(S0)[:2])).loss_lm.backward()
    assert psa.safety_tokens.weight.grad.norm(dim=1).min() > 1e-6


def test_the_loss_is_hugging_faces(made):
    psa = build(made, 0)
    batch = batch_of(made, made.rows(0))
    with torch.no_grad():
        ours, theirs = psa(**batch).loss_lm, stock(made, batch)
    torch.testing.assert_close(ours, theirs.loss.double(), rtol=1e-6, atol=0)  # theirs is computed in fp32
    aligned = batch["labels"][:, 1:].flatten()
    exact = cross_entropy(theirs.logits[:, :-1].flatten(0, 1), aligned)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sdpa_by_sample"])
def test_a_packed_row_is_its_samples(made, attention):
    psa = build(made, S0)
    language = psa.family.module(made.vlm, "language")
    before = language.config._attn_implementation
    language.set_attn_implementation(attention)
    try:
        rows = made.rows(S0)
        labels = {"safe_type": torch.tensor([1, 6, 2]), "safe_level": torch.tensor([3, 0, 1])}
        with torch.no_grad():
            packed = psa(**{**batch_of(made, rows, side=None), **labels})
            single = [psa(**batch_of(made, [row])) for row in rows]
            padded = psa(**{**batch_of(made, rows), **labels})
    finally:
        language.set_attn_implementation(before)
    counts = torch.tensor([sum(label != -100 for label in row.labels) for row in rows])
    mean = (torch.stack([one.loss_lm for one in single]) * counts).sum() / counts.sum()
    torch.testing.assert_close(packed.loss_lm, mean, rtol=1e-9, atol=0)
    for name in ("loss_lm", "loss_type", "loss_level", "concept_logits"):
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), rtol=1e-8, atol=1e-10)


def test_cached_generation_is_the_loop_without_a_cache(made):
    psa = build(made, S0)
    rows = made.rows(S0, answered=False)
    batch = batch_of(made, rows, "left")
    features = psa.encode_images(batch["pixel_values"])
    got = psa.generate(batch["input_ids"], batch["attention_mask"], features, batch["image_counts"], max_new_tokens=5)
    for number, row in enumerate(rows):
        ids = list(row.input_ids)
        for _ in range(5):
            grown = torch.tensor([ids])
            pixels = ready({"where": 0, "pixel_values": row.pixel_values})["pixel_values"]
            grids = getattr(row.pixel_values, "grids", [])
            positions = positions_of(psa.family, S0, grown, grids, [row.image_count])
            one = {"input_ids": grown, "attention_mask": torch.ones_like(grown), "pixel_values": pixels}
            with torch.no_grad():
                hidden = states(psa, one | ({} if positions is None else {"position_ids": positions}))
            ids.append(made.vlm.lm_head(hidden)[0, -1].argmax().item())
        assert got[number].tolist() == ids[-5:]
    alone = psa.generate(batch["input_ids"][2:], batch["attention_mask"][2:], None, max_new_tokens=5)
    assert alone[0].tolist() == got[2].tolist()


def test_concept_logits_do_not_depend_on_the_batch(made):
    psa = build(made, S0)
    batch = batch_of(made, made.rows(S0))
    features = psa.encode_images(batch["pixel_values"])
    with torch.no_grad():
        together = psa.concept_logits(features, batch["image_counts"], batch["input_ids"], batch["query_mask"])
        places = ([0], [1, 2], [])
        for row, images in enumerate(places):
            own = features.take(images) if images else None
            keep = slice(row, row + 1)
            alone = psa.concept_logits(own, [len(images)], batch["input_ids"][keep], batch["query_mask"][keep])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-11)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_batch_without_images_runs_the_same_modules(made):
    psa = build(made, S0)
    seen = []
    handles = [m.register_forward_hook(lambda *_, n=n: seen.append(n)) for n, m in psa.named_modules()]
    ran = []
    labels = {"safe_type": torch.tensor([1]), "safe_level": torch.tensor([2])}
    for rows in (made.rows(S0)[:1], made.rows(S0)[2:]):
        seen.clear()
        psa.zero_grad()
        psa(**{**batch_of(made, rows), **labels}).loss.backward()
        ran.append(list(seen))
        assert all(p.grad is not None for p in psa.bottleneck.parameters())
        assert psa.safety_tokens.weight.grad is not None
    for handle in handles:
        handle.remove()
    assert ran[0] == ran[1]
    assert psa.safety_tokens.weight.grad.abs().max() == 0


def test_an_addon_is_saved_and_loaded(made, tmp_path):
    fresh = make(made.name)
    psa = build(fresh, S0)
    add_lora(psa, r=2, alpha=4, dropout=0.0)
    for name, parameter in psa.vlm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batch_of(made, made.rows(S0))
    psa.eval()
    psa.save_addon(tmp_path)
    again = PsaVLM.from_pretrained(tiny.build(made.name)[0], tmp_path).eval()
    assert again.config.image_tokens == psa.family.image_tokens()
    with torch.no_grad():
        assert torch.equal(psa(**batch).loss_lm, again(**batch).loss_lm)


def test_lora_reaches_the_language_model_alone(made):
    psa = build(made, S0)
    language, vision = (psa.family.module_names[part] for part in ("language", "vision"))
    names = list(target_linears(psa))
    assert len(names) == 2 * 7
    assert all(name.startswith(f"{language}.layers.") and vision not in name for name in names)


def test_a_tied_head_stays_tied(made):
    tied = make(made.name, tied=True)
    psa = build(tied, 0)
    assert psa.family.module(psa.vlm, "lm_head").weight is psa.vlm.get_input_embeddings().weight
    batch = batch_of(tied, tied.rows(0)[:1])
    with torch.no_grad():
        logits, expected = tied.vlm.lm_head(states(psa, batch)), stock(tied, batch).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_counts_from_headers_are_those_from_pixels(name, tmp_path):
    base = tiny.build_folder(name, tmp_path / "base")
    processor = load_processor(base, SimpleNamespace(num_safety_tokens=S0))
    sizes = [(8, 8), (9, 33), (100, 20), (20, 100), (300, 40), (31, 31), (5, 5)]
    pictures = [tiny.picture(*size) for size in sizes]
    assert [processor.count(picture.size) for picture in pictures] == processor.prepare(pictures).tokens
    turned = Image.new("RGB", (12, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pictures[1].save(tmp_path / "plain.png")
    talk = '"conversations": [{"from": "human", "value": "<image><image>hi"}, {"from": "gpt", "value": "ok"}]'
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "image": ["turned.jpg", "plain.png"], ' + talk + "}")
    dataset = PsaDataset(load_records(tmp_path / "rows.jsonl", tmp_path), tmp_path, processor)
    row = dataset[0]
    assert dataset.length(0) == len(row.input_ids)
    assert row.pixel_values.grids[0] == TURNED[name]


@pytest.mark.parametrize("name", QWEN)
def test_patches_lie_row_by_row(name):
    pictures = tiny.build_processor(name, *tiny.build(name), 0).prepare([tiny.drawn(3, 5, 8)])
    assert pictures.grids == [[(3, 5)]]
    means = pictures.tensors["pixel_values"].reshape(15, -1).mean(1)
    assert means.argsort().tolist() == list(range(15))


@pytest.mark.parametrize("name", GRIDS)
def test_features_are_what_the_stock_model_sees(name):
    vlm, tokenizer = tiny.build(name)
    family, processor = get_family(vlm), tiny.build_processor(name, vlm, tokenizer, 0)
    sizes = ((40, 24), (24, 64), (9, 9))
    pictures = processor.prepare([tiny.picture(*size) for size in sizes]).to(dtype=torch.float64)
    with torch.no_grad():
        features = family.encode_images(vlm, pictures)
        stock_rows = vlm.model.get_image_features(**pictures.tensors).pooler_output
    assert isinstance(features, GridFeatures)
    expected = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in stock_rows]).split(pictures.tokens)
    for own, theirs in zip(features.projected.split(), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)
    some = family.encode_images(vlm, pictures[[2, 0]])
    torch.testing.assert_close(some.vision.values, features.take([2, 0]).vision.values, rtol=0, atol=1e-12)
    joined = Pictures.join([pictures[:1], pictures[1:]])
    assert all(torch.equal(joined.tensors[key], pictures.tensors[key]) for key in pictures.tensors)


@pytest.mark.parametrize("name", QWEN)
def test_positions_are_transformers_own_with_safety_tokens_as_text(name):
    made = make(name)
    for tokens in (0, S0):
        batch = batch_of(made, made.rows(tokens), "left")
        images = batch["pixel_values"]
        types = torch.zeros_like(batch["input_ids"])
        for row, ids in enumerate(batch["input_ids"].tolist()):
            run = 0
            for place, token in enumerate(ids):
                run = run + 1 if token == made.vlm.config.image_token_id else 0
                types[row, place] = int(run > tokens)
        expected, _ = made.vlm.model.get_rope_index(
            batch["input_ids"], types, images.tensors["image_grid_thw"], attention_mask=batch["attention_mask"]
        )
        real = batch["attention_mask"].bool()
        assert torch.equal(batch["position_ids"][1:][:, real], expected[:, real])
        found = positions_of(
            get_family(made.vlm), tokens, batch["input_ids"], images.grids, batch["image_counts"].tolist(),
            attention_mask=batch["attention_mask"],
        )  # fmt: skip
        assert torch.equal(found, batch["position_ids"])


@pytest.mark.parametrize("name", GRIDS)
def test_what_does_not_work_yet_is_one_sentence(name):
    made = make(name)
    psa = build(made, S0)
    with pytest.raises(ValueError, match=f"--feature_cache: not supported yet for a base of type {name} "):
        psa.family.require("--feature_cache")
    batch = batch_of(made, made.rows(S0)[2:])
    with pytest.raises(ValueError, match="--feature_cache: not supported yet"):
        psa(**batch, vision_features=torch.zeros(0, 1, psa.config.vision_hidden_size))
    wrong = batch_of(made, made.rows(S0)[:2])
    wrong["image_counts"] = torch.tensor([2, 1])
    with pytest.raises(ValueError, match="placeholders, their images need"):
        psa(**wrong)
    with pytest.raises(ValueError, match="takes Pictures"):
        psa.encode_images(torch.zeros(1, 3, 16, 16))


def test_a_truncated_picture_is_an_error_of_its_own_row(tmp_path):
    processor = load_processor(tiny.build_folder("qwen2_5_vl", tmp_path / "base"))
    tiny.picture(40, 40).save(tmp_path / "cut.png")
    talk = '"conversations": [{"from": "human", "value": "<image>hi"}, {"from": "gpt", "value": "ok"}]'
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "image": "cut.png", ' + talk + "}")
    records = load_records(tmp_path / "rows.jsonl", tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*cut\.png"):
        PsaDataset(records, tmp_path, processor).length(0)

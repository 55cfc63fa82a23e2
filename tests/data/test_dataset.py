import json
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from psa_fast.data import GlobalBatchSampler, ImageError, PsaDataset, Record, Turn, balance, collate, pack
from psa_fast.data.sampler import MAX_REPEATS


def record(i, safe_type, images=("a.png",)):
    turns = (Turn("user", "<image>\n" * len(images) + "what is this ?"), Turn("assistant", "a red square"))
    level = None if safe_type is None else 0 if safe_type == 6 else 3
    return Record(images, safe_type, level, turns, id=str(i), path="data.jsonl", line=i + 1)


def counts(records):
    return Counter(r.safe_type for r in records)


def test_balance_evens_the_types_and_takes_the_clean_ones_asked_for(caplog):
    sizes = {1: 20, 4: 8, 5: 2, 6: 30, None: 3}
    types = [safe_type for safe_type, size in sizes.items() for _ in range(size)]
    records = [record(i, safe_type) for i, safe_type in enumerate(types)]
    chosen = balance(records, clean_samples=10, seed=3)
    assert counts(chosen) == {1: 20, 4: 20, 5: 2 * MAX_REPEATS, 6: 10, None: 3}
    repeats = Counter(r.id for r in chosen)
    assert all(repeats[r.id] in (2, 3) for r in records if r.safe_type == 4)
    assert all(repeats[r.id] == 1 for r in records if r.safe_type in (1, None))
    assert balance(records, clean_samples=10, seed=3) == chosen
    assert balance(records, clean_samples=10, seed=4) != chosen
    assert counts(balance(records, clean_samples=0))[6] == 0
    with caplog.at_level("INFO"):
        assert counts(balance(records, clean_samples=3000))[6] == 30
    assert "3000 clean records wanted, only 30 there" in caplog.text
    assert "privacy: 20 from 8 records" in caplog.text
    assert counts(balance([record(0, 6)], clean_samples=5)) == {6: 1}
    with pytest.raises(ValueError, match="no record is left"):
        balance([record(0, 6)], clean_samples=0)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (3, 8), (5, 5)])
def test_sampler_is_one_stream_of_whole_epochs(n, size):
    sampler = GlobalBatchSampler(n, size, seed=1)
    stream = [entry for step in range(3 * n) for entry in sampler.batch(step)]
    for epoch in range(3 * n * size // n):
        rows = stream[epoch * n : (epoch + 1) * n]
        assert sorted(index for index, _ in rows) == list(range(n))
        assert {e for _, e in rows} == {epoch}
    assert [sampler.batch(step) for step in (2, 0)] == [stream[2 * size : 3 * size], stream[:size]]
    assert GlobalBatchSampler(n, size, seed=1).batch(7) == sampler.batch(7)
    assert [i for i, _ in stream[:n]] != [i for i, _ in stream[n : 2 * n]] or n < 4
    assert sampler.steps(2) * size >= 2 * n > (sampler.steps(2) - 1) * size
    assert sampler.steps(1e-9) == 1
    for epochs in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a finite number above 0"):
            sampler.steps(epochs)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.png")
    Image.new("RGB", (9, 7), "blue").save(tmp_path / "b.png")
    return tmp_path


def hint_for(safe_type, safe_level):
    return None if safe_type == 6 else "caution !"


def test_rows_depend_on_seed_epoch_and_index_only(chat, folder):
    processor = chat.build()
    records = [record(i, 6 if i % 2 else None if i % 8 == 0 else 1) for i in range(40)]
    options = {"hint_for": hint_for, "hint_rate": 0.5, "seed": 5}
    dataset = PsaDataset(records, folder, processor, **options)
    caution = processor.tokenizer.convert_tokens_to_ids("caution")

    def hinted(data, epoch):
        return [i for i in range(len(data)) if caution in data[i, epoch].input_ids]

    first = hinted(dataset, 0)
    assert first
    assert all(records[i].safe_type == 1 for i in first)
    assert len(first) < sum(r.safe_type == 1 for r in records)
    assert hinted(pickle.loads(pickle.dumps(dataset)), 0) == first
    assert hinted(dataset, 1) != first
    assert hinted(PsaDataset(records, folder, processor, **options | {"hint_rate": 0.0}), 0) == []
    assert dataset.__getitem__(2, epoch=1).input_ids == dataset[2, 1].input_ids
    with pytest.raises(ValueError, match="no hint_for"):
        PsaDataset(records, folder, processor, hint_rate=0.5)


def test_a_missing_image_names_the_row(chat, folder):
    with pytest.raises(ImageError, match=r"data.jsonl:5: .*gone.png' does not exist"):
        PsaDataset([record(4, 1, ("gone.png",))], folder, chat.build())[0]


def test_batches_hold_what_the_rows_hold(chat, folder):
    processor = chat.build()
    images = [("a.png",), (), ("b.png", "a.png")]
    dataset = PsaDataset([record(i, (1, 6, None)[i], names) for i, names in enumerate(images)], folder, processor)
    items = [dataset[i] for i in range(3)]
    for side in ("right", "left"):
        batch = collate(items, processor.tokenizer.pad_token_id, padding_side=side)
        for i, item in enumerate(items):
            real = batch["attention_mask"][i].bool()
            assert real.int().diff().abs().sum() <= 1
            assert bool(real[0 if side == "right" else -1])
            assert batch["input_ids"][i][real].tolist() == item.input_ids
            assert batch["labels"][i][real].tolist() == item.labels
            assert batch["query_mask"][i][real].tolist() == item.query_mask
            assert (batch["input_ids"][i][~real] == processor.tokenizer.pad_token_id).all()
            assert (batch["labels"][i][~real] == -100).all()
            assert not batch["query_mask"][i][~real].any()
        assert batch["query_mask"].dtype == torch.bool
        assert batch["image_counts"].tolist() == [1, 0, 2]
        assert batch["safe_type"].tolist() == [1, 6, -100]
        assert batch["safe_level"].tolist() == [3, 0, -100]
        assert batch["where"] == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:3"]
        red, blue = items[0].pixel_values, items[2].pixel_values[:1]
        torch.testing.assert_close(batch["pixel_values"], torch.cat([red, blue, red]))
    assert collate([items[1]], 0)["pixel_values"] is None


def test_packed_rows_are_the_samples_end_to_end(chat, folder):
    processor = chat.build()
    images = [("a.png",), (), ("b.png", "a.png")]
    dataset = PsaDataset([record(i, (1, 6, None)[i], names) for i, names in enumerate(images)], folder, processor)
    items = [dataset[i] for i in range(3)]
    padded, packed = collate(items, processor.tokenizer.pad_token_id), pack(items)
    assert packed.keys() == padded.keys() - {"attention_mask"} | {"lengths"}
    assert packed["lengths"] == [len(item.input_ids) for item in items]
    real = padded["attention_mask"].bool()
    for name in ("input_ids", "labels", "query_mask"):
        assert torch.equal(packed[name], padded[name][real].unsqueeze(0))
    for name in ("pixel_values", "image_counts", "safe_type", "safe_level"):
        assert torch.equal(packed[name], padded[name])
    whole = replace(items[1], labels=items[1].input_ids)
    assert pack([items[0], whole])["labels"][0, len(items[0].input_ids)] == -100
    assert pack([items[1]])["pixel_values"] is None


def test_loader_workers_give_the_same_batches(chat, folder):
    processor = chat.build()
    records = [record(i, 1) for i in range(6)]
    dataset = PsaDataset(records, folder, processor, hint_for=hint_for, hint_rate=0.5)
    sampler = GlobalBatchSampler(len(dataset), 4)
    steps = [sampler.batch(step) for step in range(3)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=steps, collate_fn=lambda items: collate(items, 0), num_workers=1
    )
    for rows, batch in zip(steps, loader, strict=True):
        here = collate([dataset[row] for row in rows], 0)
        assert batch["where"] == here["where"]
        assert torch.equal(batch["input_ids"], here["input_ids"])


def test_check_command_lists_bad_rows_or_counts(folder, capsys):
    from psa_fast.cli import build_parser

    def check(rows):
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = build_parser().parse_args(["data", "check", str(path), "--image_folder", str(folder)])
        return args.func(args), capsys.readouterr().out

    good = record(0, 1).to_row()
    code, out = check([good | {"id": "x"}, good | {"id": "y"}])
    assert code == 0
    assert "2 record(s)" in out
    assert "1 illegal risk 2" in out
    assert "3 high 2" in out
    assert "risk 2" in out
    code, out = check([good | {"id": "x"}, good | {"image": "gone.png"}, good | {"safe_type": 9}])
    assert code == 2
    assert f"{folder / 'data.jsonl'}:2: " in out
    assert "gone.png" in out
    assert f"{folder / 'data.jsonl'}:3: safe_type is 9" in out
    assert check([])[0] == 2

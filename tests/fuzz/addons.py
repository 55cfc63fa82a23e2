"""Damaged and hostile add-on folders, made from a whole one, and the one judgement that all of them get.

`tamper(addon, folder, seed, count)` yields `count` of them; test_tampered_addon.py judges a sample. For a longer run:
`PSA_FUZZ_ADDONS=2000 PSA_FUZZ_SEED=7 pytest tests/models/test_tampered_addon.py`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LIMIT_S = 10  # no damage may cost more
CONFIG, WEIGHTS = "psa_config.json", "psa.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
CHANGED = "llm/model.safetensors"

Damage = Callable[[Path, random.Random], str]
Outputs = dict[str, torch.Tensor]

# values no field of either JSON file may turn into a number or a name in silence
STRANGE = [
    None, True, False, 0, 1, -1, 2, 3, 10**7, 3 * 10**7, 2**63, 10**30, 1e30, 1e-30, 0.5, 1.0, "", "7", "a" * 5000,
    [], {}, [1], {"a": 1}, "../../etc/passwd", "/dev/zero", "\ud800", [[]], ["lm_head"], "(a+)+$", "pissa", "IA3",
]  # fmt: skip


def tamper(addon: Path, folder: Path, seed: int, count: int) -> Iterator[tuple[str, Path]]:
    """Yield what was done, and the damaged copy of `addon` in `folder`, which is gone when the next one is asked for.

    The kinds come in turn, so that `count` of their number or more holds each; where and how is drawn from `seed`.
    """
    draw = random.Random(seed)
    for number in range(count):
        kind = DAMAGES[number % len(DAMAGES)]
        copy = folder / f"tampered-{number}"
        shutil.copytree(addon, copy)
        what = kind(copy, draw)
        yield f"{number} {kind.__name__}: {what}", copy
        shutil.rmtree(copy)


def make_addon(folder: Path) -> Path:
    """Save a tiny base and an add-on with all of its parts: LoRA, and base weights that were trained beside it."""
    from builders.tiny_vlm import SMALL, make_vlm

    from psa_fast.models import PsaVLM, add_lora

    make_vlm(layers=1).save_pretrained(folder / "base")
    vlm = make_vlm(layers=1)
    torch.manual_seed(1)
    psa = PsaVLM.build(vlm, num_safety_tokens=3, **SMALL)
    add_lora(psa, r=4, alpha=8, dropout=0.1)
    psa.family.module(psa.vlm, "connector").requires_grad_(True)
    with torch.no_grad():
        for name, parameter in psa.named_parameters():
            if "lora_B" in name or "multi_modal_projector" in name:
                parameter.normal_(std=0.05)
    psa.save_addon(folder / "addon")
    return folder / "addon"


def outputs(addon: Path) -> Outputs:
    """What a loaded add-on computes for a fixed batch, and LoRA's dropout, which acts in training only."""
    from builders.tiny_vlm import make_batch, make_vlm

    from psa_fast.models import PsaVLM

    psa = PsaVLM.from_pretrained(make_vlm(layers=1), addon).eval()
    with torch.no_grad():
        out = psa(**make_batch(3))
    dropout = torch.tensor([m.p for m in psa.modules() if isinstance(m, torch.nn.Dropout)])
    return {"loss": out.loss, "concept_logits": out.concept_logits, "dropout": dropout}


def judge(addon: Path, original: Outputs) -> tuple[str, str]:
    """The verdict on how a damaged add-on loads, and a word on it.

    "ok": it computes what the original does, bit for bit. "named": it is refused within LIMIT_S by a ValueError or
    OSError whose text names a file or folder of the add-on. Anything else is a fault.
    """
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_S)
    try:
        got = outputs(addon)
    except _TooLongError:
        return "hang", f"took more than {LIMIT_S} s"
    except (ValueError, OSError) as error:
        text = str(error)
        if str(addon) not in text:
            return "no sentence", f"the message names no path: {text[:200]}"
        if len(text) > 2 * len(str(addon)) + 300 or "\n" in text:
            return "no sentence", f"{len(text)} characters, {text[:300]}"
        return "named", text
    except BaseException as error:
        return "foreign exception", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    same = got.keys() == original.keys() and all(torch.equal(got[name], original[name]) for name in original)
    return ("ok", "as it was") if same else ("silent", "loaded, and computes something else")


class _TooLongError(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise _TooLongError


def change_field(addon: Path, draw: random.Random) -> str:
    """Another value in a JSON file."""
    name = draw.choice([CONFIG, CONFIG, ADAPTER_CONFIG])
    values = json.loads((addon / name).read_text())
    key = draw.choice(sorted(values))
    values[key] = draw.choice(STRANGE)
    (addon / name).write_text(json.dumps(values))
    return f"{name} {key} = {str(values[key])[:40]!a}"


def nudge_number(addon: Path, draw: random.Random) -> str:
    """A number a little off: valid in itself."""
    name = draw.choice([CONFIG, ADAPTER_CONFIG])
    values = json.loads((addon / name).read_text())
    key = draw.choice(sorted(k for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)))
    values[key] = draw.choice([values[key] + 1, values[key] * 2, values[key] * 4, -values[key], float(values[key])])
    (addon / name).write_text(json.dumps(values))
    return f"{name} {key} = {values[key]}"


def swap_field(addon: Path, draw: random.Random) -> str:
    """A value that would be right for another add-on."""
    name, key, value = draw.choice(
        [
            (CONFIG, "num_attention_heads", 10),
            (CONFIG, "num_attention_heads", 1),
            (CONFIG, "layer_norm_eps", 1e-6),
            (CONFIG, "query", "first"),
            (CONFIG, "compat", "paper"),
            (CONFIG, "version", 1),
            (CONFIG, "num_safety_tokens", 4),
            (CONFIG, "projector_depth", 3),
            (CONFIG, "projector_depth", 10**7),
            (CONFIG, "num_head_tokens", 3 * 10**7),
            (CONFIG, "risk_levels", ["none", "medium", "low", "high"]),
            (CONFIG, "checksums", {}),
            (ADAPTER_CONFIG, "lora_alpha", 16),
            (ADAPTER_CONFIG, "use_rslora", True),
            (ADAPTER_CONFIG, "use_dora", True),
            (ADAPTER_CONFIG, "peft_type", "ADALORA"),
            (ADAPTER_CONFIG, "init_lora_weights", "pissa"),
            (ADAPTER_CONFIG, "modules_to_save", ["lm_head"]),
            (ADAPTER_CONFIG, "target_modules", "(.*.*)*x"),
            (ADAPTER_CONFIG, "target_modules", ["q_proj"]),
            (ADAPTER_CONFIG, "alpha_pattern", {"q_proj": 64}),
        ]
    )
    values = json.loads((addon / name).read_text())
    (addon / name).write_text(json.dumps({**values, key: value}))
    return f"{name} {key} = {value}"


def drop_or_add_field(addon: Path, draw: random.Random) -> str:
    """A key gone, new, or there twice."""
    name = draw.choice([CONFIG, ADAPTER_CONFIG])
    text = (addon / name).read_text()
    values = json.loads(text)
    key = draw.choice(sorted(values))
    how = draw.choice(["drop", "add", "twice"])
    if how == "twice":
        (addon / name).write_text(text.rstrip()[:-1] + f", {json.dumps(key)}: 1}}")
    else:
        values = (
            {k: v for k, v in values.items() if k != key} if how == "drop" else {**values, "auto_map": {"a": "b.c"}}
        )
        (addon / name).write_text(json.dumps(values))
    return f"{name} {how} {key}"


def ruin_text(addon: Path, draw: random.Random) -> str:
    """No JSON object any more."""
    name = draw.choice([CONFIG, ADAPTER_CONFIG])
    text = (addon / name).read_bytes()
    how, data = draw.choice(
        [
            ("empty", b""),
            ("cut", text[: len(text) // 2]),
            ("deep", b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
            ("list", b"[1, 2]"),
            ("latin-1", text.replace(b"prompt", b"pr\xf6mpt").replace(b"LORA", b"L\xd6RA")),
            ("utf-16", text.decode().encode("utf-16")),
            ("gzip", b"\x1f\x8b\x08\x00" + text),
            ("digits", text.replace(b"16", b"9" * 5000, 1)),
            ("nan", text.replace(b"16", b"NaN", 1)),
            ("infinity", text.replace(b"16", b"-Infinity", 1)),
        ]
    )
    (addon / name).write_bytes(data)
    return f"{name} {how}"


def flip_header(addon: Path, draw: random.Random) -> str:
    """A byte of a safetensors header, or of its length."""
    name = draw.choice([WEIGHTS, ADAPTER_WEIGHTS, CHANGED])
    data = bytearray((addon / name).read_bytes())
    place = draw.randrange(8 + struct.unpack("<Q", data[:8])[0])
    data[place] ^= 1 << draw.randrange(8)
    (addon / name).write_bytes(data)
    return f"{name} byte {place}"


def flip_data(addon: Path, draw: random.Random) -> str:
    """A bit of a number."""
    name = draw.choice([WEIGHTS, ADAPTER_WEIGHTS, CHANGED])
    data = bytearray((addon / name).read_bytes())
    place = draw.randrange(8 + struct.unpack("<Q", data[:8])[0], len(data))
    data[place] ^= 1 << draw.randrange(8)
    (addon / name).write_bytes(data)
    return f"{name} byte {place}"


def cut_or_lengthen(addon: Path, draw: random.Random) -> str:
    """Fewer or more bytes than the header says."""
    name = draw.choice([WEIGHTS, ADAPTER_WEIGHTS, CHANGED])
    data = (addon / name).read_bytes()
    size = draw.choice([0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, len(data) + 1])
    (addon / name).write_bytes((data + b"\0")[:size])
    return f"{name} {size} of {len(data)} bytes"


def other_dtype(addon: Path, draw: random.Random) -> str:
    """Numbers of another type."""
    kinds = [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float16, torch.float8_e4m3fn]
    return _change_tensor(addon, draw, f"to {(kind := draw.choice(kinds))}", lambda tensor: tensor.to(kind))


def not_finite(addon: Path, draw: random.Random) -> str:
    """One NaN or infinity."""
    value = draw.choice([float("nan"), float("inf"), -float("inf")])

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[draw.randrange(tensor.numel())] = value
        return tensor

    return _change_tensor(addon, draw, f"one {value}", change)


def other_shape(addon: Path, draw: random.Random) -> str:
    """Rows missing, a dimension more, or none."""
    how, change = draw.choice(
        [
            ("cut", lambda t: t[:-1].contiguous()),
            ("flat", lambda t: t.reshape(-1, 1, 1)),
            ("turned", lambda t: t.reshape(t.shape[::-1])),
            ("one number", lambda t: t.reshape(-1)[0].clone()),
            ("empty", lambda t: t[:0].contiguous()),
        ]
    )
    return _change_tensor(addon, draw, how, change)


def names_of_tensors(addon: Path, draw: random.Random) -> str:
    """A tensor missing, renamed, or one too many."""
    name = draw.choice([WEIGHTS, ADAPTER_WEIGHTS, CHANGED])
    tensors = load_file(addon / name)
    key = draw.choice(sorted(tensors))
    how = draw.choice(["missing", "renamed", "extra", "other modules"])
    if how in ("missing", "renamed"):
        tensor = tensors.pop(key)
        if how == "renamed":
            tensors[key + "s"] = tensor
    else:
        tensors["../../x" if how == "extra" else "base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 4)
    save_file(tensors, addon / name, metadata={"format": "pt"})
    return f"{name} {key} {how}"


def take_away(addon: Path, draw: random.Random) -> str:
    """A file or folder that is not there."""
    name = draw.choice([CONFIG, WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHANGED, "adapter", "llm"])
    path = addon / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return name


def other_file_kind(addon: Path, draw: random.Random) -> str:
    """A pipe, a folder, a device or a link where a file was."""
    name = draw.choice([CONFIG, WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHANGED, "adapter", "llm"])
    path = addon / name
    kept = addon / f"kept-{path.name}"
    path.rename(kept)
    how = draw.choice(["pipe", "folder", "zeros", "nowhere", "itself", "link", "other weights"])
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        others = {"zeros": "/dev/zero", "nowhere": "/nowhere/at/all", "itself": str(path), "link": str(kept)}
        path.symlink_to(others.get(how, str(addon / (ADAPTER_WEIGHTS if name != ADAPTER_WEIGHTS else WEIGHTS))))
    return f"{name} {how}"


def _change_tensor(addon: Path, draw: random.Random, how: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    name = draw.choice([WEIGHTS, ADAPTER_WEIGHTS, CHANGED])
    tensors = load_file(addon / name)
    key = draw.choice(sorted(tensors))
    tensors[key] = change(tensors[key])
    save_file(tensors, addon / name, metadata={"format": "pt"})
    return f"{name} {key} {how}"


DAMAGES: list[Damage] = [
    change_field, swap_field, nudge_number, drop_or_add_field, ruin_text, flip_header, flip_data, cut_or_lengthen,
    other_dtype, not_finite, other_shape, names_of_tensors, take_away, other_file_kind,
]  # fmt: skip

"""Data: records and their validation, images, chat encoding, sampling and collation.

Importing this package is light: `records`, `images` and `sampler` need neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psa_fast.data.chat import Encoded, encode, prepare_images
    from psa_fast.data.dataset import PsaDataset, collate, pack
    from psa_fast.data.images import ImageError, load_image, to_rgb
    from psa_fast.data.lengths import RowCheck, check_rows
    from psa_fast.data.records import DataError, Problem, Record, Turn, find_problems, load_records
    from psa_fast.data.sampler import GlobalBatchSampler, balance
    from psa_fast.data.template import stop_token_ids

_HOME = {
    "chat": ("Encoded", "encode", "prepare_images"),
    "dataset": ("PsaDataset", "collate", "pack"),
    "images": ("ImageError", "load_image", "to_rgb"),
    "lengths": ("RowCheck", "check_rows"),
    "records": ("DataError", "Problem", "Record", "Turn", "find_problems", "load_records"),
    "sampler": ("GlobalBatchSampler", "balance"),
    "template": ("stop_token_ids",),
}

__all__ = [
    "DataError",
    "Encoded",
    "GlobalBatchSampler",
    "ImageError",
    "Problem",
    "PsaDataset",
    "Record",
    "RowCheck",
    "Turn",
    "balance",
    "check_rows",
    "collate",
    "encode",
    "find_problems",
    "load_image",
    "load_records",
    "pack",
    "prepare_images",
    "stop_token_ids",
    "to_rgb",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

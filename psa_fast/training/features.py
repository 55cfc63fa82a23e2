"""Fills the vision-feature cache before a `concept` run, which then reads features and never runs the tower.

All images come first, not each as it is met: a rank that ran the tower for a miss would gather weights that the others
do not, and hang them (ZeRO-3). The tower is gathered once, each rank computes its share without any collective.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from psa_fast.compat.deepspeed import gathered
from psa_fast.data import Record, load_image, prepare_images
from psa_fast.data.images import resolve
from psa_fast.models import PsaVLM

from .config import TrainConfig
from .engine import compute_dtype
from .feature_cache import FeatureCache, hash_image, hash_tensors


class CachedFeatures:
    """Image paths of a record -> bf16 [n, S, Dv]."""

    def __init__(self, cache: FeatureCache, hashes: dict[str, str]):
        self.cache, self.hashes = cache, hashes

    def __call__(self, images: Sequence[str]) -> Tensor:
        """The images' features, in their order; [0, S, Dv] for none."""
        found = [self.cache.get(self.hashes[name]) for name in images]
        if not found:
            return torch.empty(0, *self.cache.shape, dtype=torch.bfloat16)
        return torch.stack([features for features in found if features is not None])


@torch.no_grad()
def cached_features(
    config: TrainConfig, model: PsaVLM, processor: Any, records: Sequence[Record], console: Console
) -> CachedFeatures:
    """Compute what the cache lacks of the records' images, on all ranks. A collective, before the engine is built.

    Raises ValueError if the ranks do not share the folder.
    """
    from deepspeed.accelerator import get_accelerator

    assert config.feature_cache is not None
    model.family.require("--feature_cache")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hashes = _hash_images(config, records, rank, world_size)
    tower = model.family.module(model.vlm, "vision")
    device = torch.device(get_accelerator().current_device_name())
    with gathered(tower.parameters()):
        tower.to(device)
        fingerprint = {
            "tower": hash_tensors(sorted(tower.state_dict().items())),
            "choices": model.family.vision_choices(),
            "processor": json.loads(processor.image_processor.to_json_string()),
            "dtype": str(compute_dtype(config)),
        }
        shape = (model.config.fixed_image_tokens, model.config.vision_hidden_size)
        cache = FeatureCache(config.feature_cache, fingerprint, shape, rank)
        first_names = {digest: name for name, digest in reversed(hashes.items())}
        _check_entries(cache, sorted(first_names), rank, world_size, console)
        missing = [(digest, name) for digest, name in sorted(first_names.items()) if digest not in cache]
        console.print(f"feature cache {cache.folder}: {len(first_names)} images, {len(missing)} to compute")
        # no rank may add an entry before every rank has seen the same ones missing
        dist.barrier()
        own = missing[rank::world_size]
        with cache:
            for start in range(0, len(own), config.micro_batch_size):
                part = own[start : start + config.micro_batch_size]
                images = [load_image(resolve(config.image_folder or "", name)) for _, name in part]
                prepared: Any = prepare_images(images, processor).pixel_values
                pixels = prepared.to(device)
                found: Any = model.family.vision_features(model.vlm, pixels)
                for (digest, _), features in zip(part, found, strict=True):
                    cache.put(digest, features)
        dist.barrier()
    absent = [name for name, digest in hashes.items() if digest not in cache]
    if absent:
        raise ValueError(f"--feature_cache {config.feature_cache} must be one folder that every node shares")
    return CachedFeatures(cache, hashes)


def _check_entries(cache: FeatureCache, images: list[str], rank: int, world_size: int, console: Console) -> None:
    """Compare the entries of the images with what was put, each on one rank, so that damaged ones are computed anew."""
    unused = list(cache.problems)  # known to every rank alike
    cache.problems.clear()
    damaged = cache.check(image for image in images[rank::world_size] if image in cache)
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, (damaged, cache.problems))
    for found, problems in shares:
        cache.drop(found)
        unused += problems
    for problem in unused:
        console.print(f"warning: feature cache: {problem}", soft_wrap=True)


def _hash_images(config: TrainConfig, records: Sequence[Record], rank: int, world_size: int) -> dict[str, str]:
    """Path -> key of every image of the records, each file read by one rank."""
    names = sorted({name for record in records for name in record.images})
    folder = config.image_folder or ""
    own = {name: hash_image(resolve(folder, name).read_bytes()) for name in names[rank::world_size]}
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, own)
    found = {name: digest for share in shares for name, digest in share.items()}
    return {name: found[name] for name in names}

"""What is checked of base and records before a model is loaded, so that a bad row costs seconds and not a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from psa_fast.data import DataError, Problem, PsaDataset, Record, balance, load_records
from psa_fast.data.dataset import HintFor
from psa_fast.data.lengths import RowCheck, check_rows
from psa_fast.data.problems import MAX_LISTED
from psa_fast.data.progress import progress
from psa_fast.models import Family, get_family, load_processor
from psa_fast.models.addon import check_base_folder, check_files
from psa_fast.models.base_model import check_base, read_base_config, resolve_commit

from .config import TrainConfig
from .ranks import alike, from_rank_0, gathered
from .supervision import check_supervision, with_learnable_answers


def prepare_dataset(config: TrainConfig, processor: Any, hint_for: HintFor | None, console: Console) -> PsaDataset:
    """Return the rows that a run trains on, each of them known to fit, with their lengths. A collective.

    Args:
        config: where the records are, and how long a row may be.
        processor: the base's, with room for the safety tokens.
        hint_for: (type id, level id) -> the policy's hint.
        console: where rank 0 prints.

    Raises:
        ValueError: rows that cannot be used, unless they may be skipped; nothing left, or nothing to learn.
    """
    everything = from_rank_0(lambda: _read(config, console))
    with alike():
        records = with_learnable_answers(everything, config)
    if len(records) < len(everything):
        console.print(f"left out {len(everything) - len(records)} row(s) whose answer an importer made up")
    whole = PsaDataset(
        records,
        config.image_folder,
        processor,
        hint_for=hint_for,
        hint_rate=config.hint_rate,
        seed=config.seed,
        max_length=config.max_length,
        augmentation=config.augment,  # type: ignore[arg-type]
    )
    began = time.perf_counter()
    found = _check(whole)
    console.print(f"{len(records)} rows encoded in {time.perf_counter() - began:.1f} s")
    with alike():
        if found.problems:
            _report(list(found.problems.values()), config, console)
        kept = [index for index in range(len(records)) if index not in found.problems]
        if not kept:
            raise ValueError(f"--data_path {config.data_path}: no row is left")
    if cut := found.cut_sentence(config.max_length):
        console.print(f"warning: {cut}")
    chosen = kept
    if config.clean_samples is not None:
        places = {id(records[index]): index for index in kept}
        left = [records[index] for index in kept]
        chosen = from_rank_0(
            lambda: [places[id(r)] for r in balance(left, clean_samples=config.clean_samples, seed=config.seed)]
        )
    # a picture that is cut takes its row's labels with it
    taught = [
        replace(records[old], safe_type=None, safe_level=None) if old in found.cut_images else records[old]
        for old in chosen
    ]
    with alike():
        for warning in check_supervision(taught, config):
            console.print(f"warning: {warning}", soft_wrap=True)
    return whole.subset(chosen)


def commit_for(config: TrainConfig, addon: str | None) -> str | None:
    """Return the commit of a base on the hub for all of its files: the add-on's, else the main branch's by now.

    None for a folder.
    """
    base = str(config.model_name_or_path)
    recorded = None
    with naming_base(config):
        if addon:
            found = check_files(addon)
            recorded = found.revision_of(base)
            check_base_folder(addon, found, base)
        else:
            check_base(base)
        return resolve_commit(base, recorded)


def read_processor(config: TrainConfig, commit: str | None) -> Any:
    """Return the base's processor, with room for the safety tokens."""
    tokens: Any = SimpleNamespace(num_safety_tokens=config.num_safety_tokens)
    with naming_base(config):
        return load_processor(str(config.model_name_or_path), tokens, commit)


def check_positions(config: TrainConfig, commit: str | None) -> None:
    """Refuse rows that may be longer than the base's positions; its configuration is read, no weight.

    Raises:
        ValueError: both numbers, or a base that is not there.
    """
    if not config.runs_language_model:
        return
    with naming_base(config):
        found = read_base_config(str(config.model_name_or_path), commit)
    positions = getattr(found.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise ValueError(
            f"--max_length {config.max_length} is more than the {positions} positions of {config.model_name_or_path}; "
            f"give --max_length {positions} or less"
        )


def check_family(config: TrainConfig, commit: str | None) -> Family:
    """The base's family; refuse what it cannot do yet.

    Raises:
        ValueError: naming the option.
    """
    with naming_base(config):
        family = get_family(read_base_config(str(config.model_name_or_path), commit))
    asked = {
        "packing": config.packing and config.runs_language_model,
        "--feature_cache": config.feature_cache is not None,
        "pixel attacks": config.stage == 0 or (config.stage == 1 and config.adversarial_weight > 0),
    }
    for part, wanted in asked.items():
        if wanted:
            family.require(part)
    return family


@contextmanager
def naming_base(config: TrainConfig) -> Iterator[None]:
    """Context in which a base that is not there, or damaged, becomes one sentence with its name."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        told = reason[0][:200] if reason else type(error).__name__
        raise ValueError(f"--model_name_or_path {config.model_name_or_path}: {told}") from error


def _read(config: TrainConfig, console: Console) -> list[Record]:
    """All usable records. Rank 0 alone looks at every pixel, so it alone knows what `skip` drops."""
    console.print(f"reading {config.data_path}: every row and picture is checked")
    mode: Any = config.on_bad_sample
    kept, labels = config.kept_keys, config.concepts
    return load_records(str(config.data_path), config.image_folder, mode, keep_keys=kept, taxonomy=labels)


def _check(dataset: PsaDataset) -> RowCheck:
    """Encode every row once without its pictures, each rank a share; the lengths are then known. A collective."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = range(rank, len(dataset), world_size)
    with progress("encoding rows", len(dataset)) as advance:
        # rank 0 alone speaks, for all ranks
        share = check_rows(dataset, own, lambda rows: advance(rows * world_size) if rank == 0 else None)
    found = RowCheck()
    for other in gathered([share]):
        found.update(other)
    dataset.lengths.update(gathered(list(dataset.lengths.items())))
    found.problems = dict(sorted(found.problems.items()))
    return found


def _report(problems: list[Problem], config: TrainConfig, console: Console) -> None:
    """Name the rows that cannot be encoded: they end the run, or are dropped where the run may skip them."""
    if config.on_bad_sample == "error":
        raise DataError(str(config.data_path), problems)
    listed = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        listed.append(f"  ... and {len(problems) - MAX_LISTED} more")
    head = f"skipped {len(problems)} row(s) that cannot be encoded:"
    console.print("\n".join([head, *listed]), soft_wrap=True, markup=False)

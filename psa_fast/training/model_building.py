"""The model that stages 1 and 2 train: a base with a new add-on, or with one that is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from psa_fast.models import PsaVLM, load_base
from psa_fast.models.addon import ADAPTER, CHANGED, check_files
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import require_same

from .config import TrainConfig
from .engine import compute_dtype
from .preflight import naming_base


def build_model(
    config: TrainConfig,
    ds_config: dict,
    addon: str | None,
    attention: str | None = None,
    commit: str | None = None,
    unlearnt: Mapping[str, bool] | None = None,
) -> tuple[PsaVLM, Any]:
    """The PSA model on its base, from an add-on or new. The second value must live until the engine is built.

    `commit` is that of a base on the hub; None: the add-on's, else the main branch's. `unlearnt` are fields of a new
    add-on's configuration that the records do not teach.
    """
    from transformers.integrations import HfDeepSpeedConfig

    assert config.model_name_or_path is not None  # parse_args saw to it
    keep_alive = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    if addon and not config.runs_language_model:
        _refuse_language_changes(addon)
    base = config.model_name_or_path
    # the add-on's files are judged before the base is read
    recorded = check_files(addon).revision_of(base) if addon else None
    revision = commit or recorded
    with naming_base(config):  # neither a folder here nor a name that the hub can be asked for, or a damaged file
        vlm = load_base(base, compute_dtype(config), attention, config.runs_language_model, revision)
    # whatever the base drew while it was loaded: every objective starts from the same safety modules
    torch.manual_seed(config.seed)
    asked = _options_of_addon(config)
    model = PsaVLM.from_pretrained(vlm, addon) if addon else PsaVLM.build(vlm, **{**asked, **(unlearnt or {})})
    if addon:
        told = f"--addon {addon}", f"--taxonomy {config.taxonomy}"
        advice = "an add-on goes on with its own taxonomy; another one needs a new add-on"
        require_same(model.config.concepts, config.concepts, *told, advice)
        differing = [
            f"{k} {getattr(model.config, k)!r} != {v!r}" for k, v in asked.items() if getattr(model.config, k) != v
        ]
        if differing:
            raise ValueError(f"{addon}: the add-on was built with other options ({', '.join(differing)})")
    return model, keep_alive


def _options_of_addon(config: TrainConfig) -> dict[str, Any]:
    """The fields of an add-on's configuration that options decide."""
    return {
        "taxonomy": None if config.concepts == PSA else config.concepts.to_json(),
        "num_safety_tokens": config.num_safety_tokens,
        "num_head_tokens": config.num_head_tokens,
        "num_attention_heads": config.num_attention_heads,
        "projector_depth": config.projector_depth,
        "query": config.query,
        "query_window": config.query_window if config.query == "prompt" else 0,
    }


def _refuse_language_changes(addon: str) -> None:
    changes = [name for name in (ADAPTER, CHANGED) if (Path(addon) / name).exists()]
    if changes:
        raise ValueError(
            f"--stage1_objective concept does not load the language model's layers, so it cannot start from "
            f"{addon}, which changes them ({', '.join(changes)})"
        )

"""Private names and places of transformers (5.20 to 5.24), each without importing it."""

from __future__ import annotations

from typing import Any


def set_commit(config: Any, commit: str | None) -> None:
    """Note at a model's configuration which commit of the hub it was loaded from; it is not saved with it.

    transformers notes it there itself where it resolved a branch to a commit, and passes it on to the model's other
    files. There is no public name for it.
    """
    config._commit_hash = commit


def commit_at(config: Any) -> str | None:
    """The commit that `set_commit`, or transformers, noted at a configuration; None if nobody did."""
    return getattr(config, "_commit_hash", None)


def mark_adapter(model: Any, present: bool = True) -> None:
    """Tell transformers that PEFT has put an adapter into the model, or that there is none any more.

    Without the flag `save_pretrained` would write weights under names with `base_layer`, which no stock model reads;
    with it, the adapter, or a refusal of an old PEFT. Publicly it is set by `model.add_adapter` alone, which refuses
    every PEFT below a version of its choosing.
    """
    model._hf_peft_config_loaded = present


def more_than_causal(mask: dict[str, Any]) -> bool:
    """Whether a mask that transformers asks its mask interface for lets tokens see later ones, or hides earlier ones.

    `mask` is what the interface is called with. Packed samples and windows by `local_size` do not count: they come as
    an intersection of transformers' own making. Whatever else a model overlays comes as a union, or by vmap. That
    skipping is not allowed says nothing: it is not allowed for packed samples either.
    """
    return bool(mask.get("use_vmap")) or getattr(mask.get("mask_function"), "__name__", "") == "or_mask"


def raised_by_loading(error: BaseException) -> bool:
    """Whether transformers itself raised it for weights of other shapes than the configuration's.

    That is a plain RuntimeError like those of the device; what tells it apart is the module of its last frame. An
    exception class of its own would replace this.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "transformers.utils.loading_report"

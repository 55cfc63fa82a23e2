"""The entry point `lmms_eval.models`: what lmms-eval is told of `--model psa`. lmms-eval alone imports this file."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The manifest of the model `psa` (lmms_eval 0.7.3, `models/registry_v2.py`)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="psa", chat_class_path="psa_fast.evaluation.lmms_eval_model.Psa")

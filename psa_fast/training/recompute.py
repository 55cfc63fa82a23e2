"""How the language model's layers compute: which are recomputed in the backward pass, and with whose kernels.

Both options leave modules, parameters and their names as they are, so checkpoints and ZeRO-3 do not see them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import is_liger_kernel_available

from psa_fast.models import PsaVLM
from psa_fast.training.config import TrainConfig

_SILU = ("silu", "swish")


def prepare_language_model(model: PsaVLM, config: TrainConfig) -> None:
    """Apply `--gradient_checkpointing` and `--use_liger_kernel`; neither touches vision tower or safety modules."""
    if not config.runs_language_model:
        return
    language: Any = model.family.module(model.vlm, "language")
    if config.recompute_every:
        recompute(language, config.recompute_every)
    if config.use_liger_kernel:
        apply_liger(language)


def recompute(language: Any, every: int) -> None:
    """Layers 1, 1 + every, 1 + 2 every, ... keep their input only and run again in the backward pass."""
    # transformers 5.20 knows the second name only, later ones call it deprecated
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = getattr(language, next(name for name in names if hasattr(language, name)))
    enable({"use_reentrant": False}, every_n_layers=every)
    # transformers makes the embeddings require gradients, which only the reentrant form needs: a gradient for nobody
    language.disable_input_require_grads()


def check_liger(config: TrainConfig) -> None:
    """Refuse `--use_liger_kernel` where its kernels cannot run or are not those of the base's architecture.

    Raises:
        ValueError: liger-kernel or a CUDA device is missing, or it has no RMSNorm, RoPE and SwiGLU for the base.
    """
    if not (config.use_liger_kernel and config.runs_language_model):
        return
    if not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs the package liger-kernel: pip install 'psa-fast[gpu]'")
    if not torch.cuda.is_available():
        raise ValueError("--use_liger_kernel needs a CUDA device, and there is none")
    text = AutoConfig.from_pretrained(str(config.model_name_or_path)).get_text_config()
    # Liger's own patch would compute SiLU whatever the activation is
    if _liger_function(text.model_type) is None or getattr(text, "hidden_act", None) not in _SILU:
        raise ValueError(
            f"--use_liger_kernel: Liger has no RMSNorm, RoPE and SwiGLU for the language model of "
            f"{config.model_name_or_path} (model type {text.model_type!r}, "
            f"activation {getattr(text, 'hidden_act', None)!r})"
        )


def apply_liger(language: PreTrainedModel) -> None:
    """Liger's norms and MLPs in this model, and its rotation in the architecture's code, for the whole process."""
    _liger_function(language.config.model_type)(
        model=language, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def _liger_function(model_type: str) -> Any:
    """Liger's patch for a text model, or None if it has none that swaps exactly norm, rotation and SwiGLU."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    options = {"rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy", "model"}
    return function if function is not None and set(inspect.signature(function).parameters) == options else None

"""What the records can teach: a run with nothing to learn is refused before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from psa_fast.data import Record
from psa_fast.taxonomy import CLEAN, RISK_TYPES

from .config import TrainConfig

FEW = 0.05  # below this share of labelled pictures a run is warned


def unlearnt_readings(records: Sequence[Record]) -> dict[str, bool]:
    """What a new add-on's configuration must not claim, since no record teaches it.

    The learned query alone is taught by pictures whose own label is known, words by themselves by some that are risky.
    """
    found: dict[str, bool] = {}
    if not any(record.images and record.picture != (None, None) for record in records):
        found["neutral_query"] = False
    if not any(record.words[0] not in (None, CLEAN) for record in records):
        found["reads_text"] = False
    return found


def check_supervision(records: Sequence[Record], config: TrainConfig) -> list[str]:
    """Check that something of the stage's losses can be learnt from the records.

    Args:
        records: what is trained on.
        config: which losses are computed.

    Returns:
        Warnings, for losses that little of the data reaches.

    Raises:
        ValueError: the concept losses reach no record, or the safety tokens stand before no picture.
    """
    pictures = [record for record in records if record.images]
    if config.stage == 1 and config.runs_language_model and not pictures:
        raise ValueError(
            f"--data_path {config.data_path}: none of {len(records)} rows has a picture, "
            f"and stage 1 trains what stands before pictures"
        )
    if not config.runs_bottleneck:
        return []
    return _check_labels(records, pictures, config)


def _check_labels(records: Sequence[Record], pictures: Sequence[Record], config: TrainConfig) -> list[str]:
    total = len(records)
    typed = [record for record in pictures if record.safe_type is not None]
    levelled = [record for record in pictures if record.safe_level is not None]
    both = sum(record.safe_type is not None or record.safe_level is not None for record in pictures)
    remedy = "--stage1_objective tokens" if config.stage == 1 else "--concept_loss_weight 0"
    if not both:
        raise ValueError(
            f"--data_path {config.data_path}: none of {total} rows has both a picture and a label (safe_type or "
            f"safe_level), so the concept head has nothing to learn; {remedy} leaves it out"
        )
    warnings = []
    if both < FEW * total:
        warnings.append(f"only {both} of {total} rows ({both / total:.1%}) have both a picture and a label")
    for name, found in (("safe_type", typed), ("safe_level", levelled)):
        if not found:
            warnings.append(f"no row with a picture has a {name}: that part of the concept head learns nothing")
    types = Counter(record.safe_type for record in typed)
    if len(types) == 1:
        (only,) = types
        warnings.append(
            f"all {len(typed)} labelled pictures are of the type {RISK_TYPES[only or 0]!r}: "
            f"the concept head learns to say so of any picture"
        )
    return warnings

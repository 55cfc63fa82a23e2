"""What the records can teach: a run with nothing to learn is refused before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from psa_fast.data import Record
from psa_fast.data.keys import TEMPLATE

from .config import TrainConfig

FEW = 0.05  # below this share of labelled pictures a run is warned


def unlearnt_readings(records: Sequence[Record]) -> dict[str, bool]:
    """What a new add-on's configuration must not claim, since no record teaches it.

    The learned query alone is taught by pictures whose own label is known, words by themselves by some that are risky.
    """
    found: dict[str, bool] = {}
    if not any(record.images and record.picture != (None, None) for record in records):
        found["neutral_query"] = False
    if not any(record.words[0] not in (None, record.taxonomy.harmless) for record in records):
        found["reads_text"] = False
    return found


def with_learnable_answers(records: Sequence[Record], config: TrainConfig) -> list[Record]:
    """The records without those whose answer an importer made up, where the run learns answers and is to drop them.

    Raises:
        ValueError: there are some, and the run was not told what they do; or nothing is left without them.
    """
    if not config.runs_language_model or config.on_template_answers == "keep":
        return list(records)
    left = [record for record in records if not _is_template(record)]
    if len(left) == len(records):
        return left
    if config.on_template_answers == "error":
        first = next(record for record in records if _is_template(record))
        raise ValueError(
            f"--data_path {config.data_path}: the answers of {len(records) - len(left)} of {len(records)} rows are the "
            f"importer's, since their source has none (first: {first.where}), and the language model would learn to "
            f"say them; --on_template_answers drop leaves these rows out, keep trains on them"
        )
    if not left:
        raise ValueError(f"--data_path {config.data_path}: --on_template_answers drop leaves none of its rows")
    return left


def _is_template(record: Record) -> bool:
    return record.extra.get(TEMPLATE) == "template"


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
    warnings = []
    if config.runs_language_model and (made_up := sum(map(_is_template, records))):
        warnings.append(f"{made_up} of {len(records)} rows teach an answer that an importer made up")
    return warnings + (_check_labels(records, pictures, config) if config.runs_bottleneck else [])


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
            f"all {len(typed)} labelled pictures are of the type {typed[0].taxonomy.types[only or 0]!r}: "
            f"the concept head learns to say so of any picture"
        )
    return warnings

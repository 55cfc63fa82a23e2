"""What of a request is unsafe: the picture, the words, or only both together.

A row has one risk type and level, those of the request as a whole. Three labels say where that risk is:
`image_label` (the picture, whatever is said about it), `text_label` (the words, whatever is shown) and `joint_label`
(both together). Each is safe, unsafe or unknown; a row that leaves one out gets what its group and type say.
"""

from __future__ import annotations

from typing import Any

from psa_fast.files import shorten
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

SAFE, UNSAFE, UNKNOWN = VERDICTS = ("safe", "unsafe", "unknown")
LABELS = ("image_label", "text_label", "joint_label")
# what a batch holds of them: type and level of the request, of its pictures alone, of its words alone
CONCEPT_LABELS = ("safe_type", "safe_level", "picture_type", "picture_level", "words_type", "words_level")
GROUPS = ("clean", "benign_twin", "risk", "text_risk", "text_twin", "joint_risk", "joint_twin")
BENIGN_GROUPS = ("clean", "benign_twin", "text_twin", "joint_twin")
JOINT_GROUPS = ("joint_risk", "joint_twin")

ADVICE = " (the default of a row with a risk; name the group, or say what text_label is)"
# group -> the labels that follow from it; "risk" leaves open whether the words are risky too
_OF_GROUP = {
    **dict.fromkeys(BENIGN_GROUPS, (SAFE, SAFE, SAFE)),
    "risk": (UNSAFE, UNKNOWN, UNSAFE),
    "text_risk": (SAFE, UNSAFE, UNSAFE),
    "joint_risk": (SAFE, SAFE, UNSAFE),
}


def default_group(
    safe_type: int | None, labels: tuple[str | None, ...] = (None, None, None), taxonomy: Taxonomy = PSA
) -> str:
    """The group of a row that names none, by its type and the labels that it gives.

    "" without a type, for nothing is known of such a row. A risk is one in the image unless the labels say that it is
    in the words, or in both together.
    """
    if safe_type is None:
        return ""
    if safe_type == taxonomy.harmless:
        return "clean"
    image, text, _ = labels
    if image == SAFE:
        return "text_risk" if text == UNSAFE else "joint_risk" if text == SAFE else "risk"
    return "risk"


def default_labels(group: str, safe_type: int | None, has_images: bool) -> tuple[str, str, str]:
    """The labels (image, text, joint) that follow from a row's group and type; unknown without a type."""
    if safe_type is None or group not in _OF_GROUP:
        return UNKNOWN, UNKNOWN, UNKNOWN
    image, text, joint = _OF_GROUP[group]
    if has_images:
        return image, text, joint
    # without a picture all of the risk is in the words
    return UNKNOWN, UNSAFE if joint == UNSAFE else SAFE, joint


def read_label(name: str, value: Any) -> str | None:
    """A label's value as it is; None where the row leaves it out. ValueError for anything else."""
    if value is None:
        return None
    if value not in VERDICTS:
        raise ValueError(f"{name} is {shorten(value)}; expected one of: {', '.join(VERDICTS)}")
    return str(value)


def contradictions(
    labels: tuple[str | None, ...],
    group: str,
    safe_type: int | None,
    has_images: bool,
    named: bool = True,
    taxonomy: Taxonomy = PSA,
) -> list[str]:
    """What the labels that a row gives contradict: its type, its group, its images or each other; a sentence each.

    `named`: whether the row names its group, or has it by default.
    """
    found = []
    harmless = taxonomy.harmless
    image, _, joint = labels
    given = {name: value for name, value in zip(LABELS, labels, strict=True) if value not in (None, UNKNOWN)}
    unsafe = [name for name, value in given.items() if value == UNSAFE]
    if "image_label" in given and not has_images:
        found.append(f"image_label is {image!r}, but the row has no image")
    if joint == SAFE and safe_type not in (harmless, None):
        found.append(f"joint_label is 'safe', but safe_type is {safe_type}, which is a risk")
    if joint == SAFE:
        found += [f"joint_label is 'safe', but {name} is 'unsafe'" for name in unsafe]
    if safe_type == harmless and group != "text_risk":  # there the type may be the image's alone
        found += [f"{name} is 'unsafe', but safe_type is {harmless} ({taxonomy.types[harmless]})" for name in unsafe]
    if group in _OF_GROUP and not (group in BENIGN_GROUPS and safe_type == harmless):
        expected = dict(zip(LABELS, _OF_GROUP[group], strict=True))
        if group == "text_risk":  # the picture may be risky besides
            del expected["image_label"]
        if joint == SAFE and safe_type not in (harmless, None):  # said already
            del expected["joint_label"]
        for name, value in given.items():
            if expected.get(name, UNKNOWN) not in (UNKNOWN, value):
                found.append(f"group is {group!r}, but {name} is {value!r}{'' if named else ADVICE}")
    if group in JOINT_GROUPS and not has_images:
        found.append(f"group is {group!r}, but the row has no image")
    return list(dict.fromkeys(found))


def own_label(
    label: str, safe_type: int | None, safe_level: int | None, taxonomy: Taxonomy = PSA
) -> tuple[int | None, int | None]:
    """(type, level) of what a label is about, by itself: the row's where unsafe, harmless where safe, else None."""
    if label == UNKNOWN:
        return None, None
    return (safe_type, safe_level) if label == UNSAFE else (taxonomy.harmless, 0)

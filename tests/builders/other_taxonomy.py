"""A taxonomy of three classes, which grades no risk, with a policy and records of it."""

import json

import yaml

from builders.tiny_llava import picture
from psa_fast.safety.policy import DEFAULT_POLICY
from psa_fast.taxonomy.heads import Taxonomy

SMALL = Taxonomy("small", ("knives", "fine", "fire"), 1)
GROUPS = ("clean", "benign_twin", "risk", "text_risk", "text_twin", "joint_risk")


def write_policy(path, fire=True, **rule):
    """The shipped policy's sentences for SMALL, which stands in the file itself; `rule` is that of its one level."""
    values = yaml.safe_load(DEFAULT_POLICY.read_text())
    values |= {"taxonomy": SMALL.to_json(), "types": {"knives": True, "fire": fire}}
    values["levels"] = {"risky": rule or {"action": "refuse"}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_rows(folder, count, file="test.jsonl"):
    """Rows of every group about pictures of one colour; a risk is of knives or of fire."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        group = GROUPS[i % len(GROUPS)]
        kind = ("knives", "fire")[i // len(GROUPS) % 2] if "risk" in group else "fine"
        if i < 12:
            picture(i).save(folder / f"{i}.png")
        turns = [
            {"from": "user", "value": "<image>\nwhat colour is the circle ?"},
            {"from": "assistant", "value": "red"},
        ]
        row = {"image": f"{i % 12}.png", "taxonomy": "small", "safe_type": kind, "group": group}
        rows.append(json.dumps(row | {"conversations": turns}))
    (folder / file).write_text("\n".join(rows))
    return folder

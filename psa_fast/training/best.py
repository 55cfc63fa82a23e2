"""`--keep_best`: the add-on with the best figure of the evaluations, in `best/` beside the last one.

`best/` is an add-on like the final one, and `best.json` in it says which step and figures it is of. A figure must be
better than the kept one to take its place: of equal ones the earlier stays. The folder is written under another name
and then moved; a kill between two moves leaves the one before, which the resumed run puts back.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from psa_fast.files import named, read_json, shorten, write_text
from psa_fast.models import PsaVLM

from .checkpoint import check_tensors, gather_addon_state
from .config import TrainConfig
from .integrity import sync, sync_one
from .options import SMALLER_ANSWERS, SMALLER_CONCEPT
from .ranks import from_rank_0
from .validation import Figures

BEST, ABOUT = "best", "best.json"


class Best:
    """The best add-on so far by one figure of a run's evaluations.

    Args:
        metric: the figure, one that `--keep_best` takes.
        config: of the run; what an earlier part of it kept is gone on from.
        records: fingerprint of the records that are evaluated.

    Raises:
        ValueError: what is kept there is the best by another figure or on other records, or is damaged.
    """

    def __init__(self, metric: str, config: TrainConfig, records: str) -> None:
        self.metric, self.records, self.folder = metric, records, config.stage_dir / BEST
        self.smaller = metric in SMALLER_ANSWERS + SMALLER_CONCEPT
        self.value: float | None = from_rank_0(self._kept)

    def offer(self, engine: Any, step: int, figures: Figures) -> bool:
        """Keep the engine's add-on if its figure is better than the kept one's; whether it was. A collective.

        Raises:
            OSError: naming the path that cannot be written; what was kept before stays.
        """
        value = figures[self.metric]
        if value is None or (self.value is not None and not self._better(value, self.value)):
            return False
        addon = gather_addon_state(engine.module)
        about = {
            "step": step,
            "metric": self.metric,
            "best_is": "smallest" if self.smaller else "largest",
            "value": value,
            "figures": dict(figures),
            "records": self.records,
        }
        from_rank_0(lambda: self._write(engine.module, addon, about))
        self.value = value
        return True

    def _better(self, value: float, kept: float) -> bool:
        return value < kept if self.smaller else value > kept

    def _beside(self, end: str) -> Path:
        return self.folder.with_name(f".{BEST}.{end}")

    def _write(self, model: PsaVLM, addon: dict[str, Any], about: dict[str, Any]) -> None:
        temporary, old = self._beside("tmp"), self._beside("old")
        with named(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            model.save_addon(temporary, state_dict=addon)
            check_tensors(temporary)
            write_text(temporary / ABOUT, json.dumps(about, indent=2) + "\n")
            sync(temporary)
            if self.folder.exists():
                os.replace(self.folder, old)
            os.replace(temporary, self.folder)
            sync_one(self.folder.parent)
            shutil.rmtree(old, ignore_errors=True)

    def _kept(self) -> float | None:
        """The kept add-on's figure, after what a kill left behind is in order again."""
        temporary, old = self._beside("tmp"), self._beside("old")
        with named(self.folder):
            if old.exists() and not self.folder.exists():
                os.replace(old, self.folder)
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)
        if not self.folder.exists():
            return None
        about = read_json(self.folder / ABOUT, "best add-on")
        for name, wanted in (("metric", self.metric), ("records", self.records)):
            if about.get(name) != wanted:
                what = f"by {shorten(about.get(name))}" if name == "metric" else "on other --eval_data_path records"
                raise ValueError(
                    f"--keep_best {self.metric}: {self.folder} holds the best add-on {what}; move it away to begin anew"
                )
        value = about.get("value")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"best add-on {self.folder / ABOUT}: value is {shorten(value)}; expected a number")
        return float(value)

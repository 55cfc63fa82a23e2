"""The evaluation that `--eval_every` repeats during training: few figures, by the names and rules of report.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from psa_fast.data.records import GROUPS, Record, fingerprint, load_records
from psa_fast.evaluation.check import check_prompts, longest_hint, require_labels
from psa_fast.evaluation.evaluate import (
    answer_records,
    compute_metrics,
    concept_metrics,
    pictures_of,
    read_records,
)
from psa_fast.evaluation.metrics import Estimate, rate
from psa_fast.evaluation.refusal import DEFAULT_LIST, get_list
from psa_fast.evaluation.results import ATTACKED, REFUSED, Result

if TYPE_CHECKING:
    from psa_fast.models import PsaVLM
    from psa_fast.safety.policy import Policy

# what the guarded answers decide, and what the concept head decides by itself
ANSWERS = (*ATTACKED.values(), *REFUSED.values(), "general_accuracy")
CONCEPT = ("over_flagged", "unsafe_auroc", "text_risk_auroc")
MAX_NEW_TOKENS = 32  # the default of psa-fast evaluate


class DevSet:
    """Records that are read once and asked again and again, with the guard around the model that is trained.

    Args:
        path: the JSONL file.
        image_folder: what its image paths are relative to.
        base: folder or hub name of the base.
        policy: of the guard; the records are of its taxonomy.
        batch_size: records asked at once.
        answers: whether the model can answer; if not, the concept head alone is read.

    Raises:
        ValueError: rows that cannot be used, each named, or none with a label; a policy that was calibrated.
    """

    def __init__(
        self, path: str, image_folder: str | None, base: str, policy: Policy, batch_size: int, answers: bool
    ) -> None:
        self.path, self.image_folder, self.base, self.policy = path, image_folder or ".", base, policy
        if policy.calibration is not None:
            raise ValueError("the policy was calibrated on a finished add-on; evaluate training without calibration")
        self.records = load_records(path, image_folder, taxonomy=policy.taxonomy)
        require_labels(path, self.records)
        self.digest = fingerprint(self.records)
        self.batch_size, self.answers = batch_size, answers
        self.batches = -(-len(self.records) // batch_size)
        self.names = (*(ANSWERS if answers else ()), *CONCEPT)
        stand_ins = [_stand_in(record) for record in self.records]
        self.defined = frozenset(name for name, value in self.figures(stand_ins).items() if value is not None)

    def check(self, processor: Any, commit: str | None) -> None:
        """Make every prompt as `answer` will. Raises DataError, naming every row that cannot be asked."""
        from psa_fast.models.base_model import read_base_config
        from psa_fast.safety.request import Prompter, text_positions

        prompter = Prompter(processor, text_positions(read_base_config(self.base, commit)))
        check_prompts(self.path, self.records, prompter, MAX_NEW_TOKENS, longest_hint(self.policy))

    def answer(self, model: PsaVLM, processor: Any, batch: int) -> list[Result]:
        """The results of one batch of the records, in their order. The model is in evaluation mode afterwards."""
        from psa_fast.safety.guard import Guard

        guard = Guard(model, processor, self.policy)
        records = self.records[batch * self.batch_size : (batch + 1) * self.batch_size]
        pictures = [pictures_of(record, self.image_folder) for record in records]
        if not self.answers:
            return read_records(guard, records, pictures)
        return answer_records(guard, records, pictures, MAX_NEW_TOKENS, get_list(DEFAULT_LIST))

    def figures(self, results: Sequence[Result]) -> dict[str, float | None]:
        """The figures of all records' results; None for one that is undefined on them."""
        groups = {group: [result for result in results if result.group == group] for group in GROUPS}
        found: dict[str, Estimate] = compute_metrics(results, True) if self.answers else concept_metrics(groups)
        found["over_flagged"] = rate([result.unsafe for group in REFUSED for result in groups[group]])
        return {name: found[name].value for name in self.names}


def _stand_in(record: Record) -> Result:
    """A result of a record as if it had been asked: which figures have a value depends on the records alone."""
    return Result(
        where=record.where, id=record.id, group=record.group, safe_type=record.safe_type,
        safe_level=record.safe_level, target="", guarded="", unguarded="", guarded_kind="answer",
        unguarded_kind="answer", action="allow", rule="", unsafe=False, unsafe_score=0.5, read_type=0, read_level=0,
        code="clean", images=len(record.images), taxonomy=record.taxonomy,
    )  # fmt: skip

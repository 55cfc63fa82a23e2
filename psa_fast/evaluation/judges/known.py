"""The judges by name."""

from __future__ import annotations

from collections.abc import Mapping

from psa_fast.evaluation.judges.harmbench import HarmBench
from psa_fast.evaluation.judges.holisafe import HoliSafe
from psa_fast.evaluation.judges.judge_format import Format
from psa_fast.evaluation.judges.keyword_list import KeywordList
from psa_fast.evaluation.judges.llama_guard import LlamaGuard3, LlamaGuard4
from psa_fast.evaluation.judges.qwen3guard import Qwen3Guard
from psa_fast.evaluation.judges.shieldstral import Shieldstral
from psa_fast.evaluation.judges.strongreject import StrongReject
from psa_fast.evaluation.judges.vlsbench import VlsBench

KEYWORDS = KeywordList.name
HUMAN = "human"
FORMATS: dict[str, type[Format]] = {
    form.name: form
    for form in (Qwen3Guard, LlamaGuard3, LlamaGuard4, Shieldstral, HarmBench, StrongReject, VlsBench, HoliSafe)
}
JUDGES = (KEYWORDS, *FORMATS, HUMAN)


def get_format(name: str, wording: Mapping[str, str] | None = None) -> Format:
    """The format of a judging model, with a wording of one's own if given.

    Raises ValueError for one that needs a wording and has none, and for one that takes none.
    """
    form = FORMATS[name]
    if form.own_wording and wording is None:
        raise ValueError(f"{name} was trained on one wording, which its authors publish; give it with --judge_template")
    if wording is not None and form.wording is None and not form.own_wording:
        raise ValueError(f"{name} asks with its model's own chat template: leave out --judge_template")
    return form(wording)

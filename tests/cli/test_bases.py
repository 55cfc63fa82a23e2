"""`psa-fast base list` and `base check`: the support table, and what a base that is wrong is told."""

from pathlib import Path

import pytest
import torch
from builders import tiny_families

from psa_fast import cli
from psa_fast.cli.bases import support_table
from psa_fast.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_the_one_in_the_docs(capsys):
    assert cli.main(["base", "list"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == "\n".join(support_table())
    assert printed in (ROOT / "docs" / "families.md").read_text()
    assert [line.split("`")[1] for line in printed.splitlines()[2:]] == list(FAMILIES)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm"])
def test_a_good_base_passes_every_check(family, tmp_path, capsys):
    assert cli.main(["base", "check", str(tiny_families.build_folder(family, tmp_path / "base"))]) == 0
    output = capsys.readouterr().out
    assert "all 6 checks hold" in output
    assert f"{family}, fp32" in output


def test_a_family_that_is_wrong_fails_the_checks_that_see_it(tmp_path, capsys, monkeypatch):
    base = tiny_families.build_folder("qwen2_5_vl", tmp_path / "base")
    family = FAMILIES["qwen2_5_vl"]
    right = family.positions

    def without_grids(self, ids, safety_tokens, grids):
        return torch.arange(len(ids)).expand(4, -1)

    monkeypatch.setattr(family, "positions", without_grids)
    assert cli.main(["base", "check", str(base)]) == 1
    output = capsys.readouterr().out
    assert "1 of 6 checks failed" in output
    monkeypatch.setattr(family, "positions", right)
    monkeypatch.setattr(family, "count", lambda *_: 7)
    monkeypatch.setattr(family, "tower_order", lambda *_: None)
    assert cli.main(["base", "check", str(base)]) == 1
    output = capsys.readouterr().out
    assert "2 of 6 checks failed" in output
    assert "[7, 7, 7, 7, 7]" in output.replace("\n", " ")


def test_what_is_no_base_is_one_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    assert cli.main(["base", "check", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert f"model type 'mllama' is not supported; supported: {', '.join(sorted(FAMILIES))}" in printed
    (tmp_path / "empty").mkdir()
    for name, told in (("none", "there is no such folder"), ("empty", "it has no config.json")):
        assert cli.main(["base", "check", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.endswith(f"base model {tmp_path / name} cannot be loaded: {told}\n")


def test_a_plan_for_another_family_is_refused(tmp_path, capsys):
    base = tiny_families.build_folder("qwen2_vl", tmp_path / "base")
    options = ["--recipe", "llava-1.5-7b", "--stage", "1", "--gpus", "1", "--gpu_gb", "80"]
    assert cli.main(["plan", *options, "--model_name_or_path", str(base)]) == 2
    assert "plan: not supported yet for a base of type qwen2_vl" in capsys.readouterr().err

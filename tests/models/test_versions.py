"""A set of packages that cannot serve both stages is refused before stage 1, with the command that mends it."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import peft
import pytest
import torch

from psa_fast.models import versions


def test_the_installed_set_passes():
    torch.manual_seed(5)
    versions.check_versions()
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(
    ("package", "installed", "sentence"),
    [
        ("transformers", "5.19.3", r"needs transformers 5\.20 or newer, 5\.19\.3 is installed: pip install 'transf"),
        ("peft", "0.17.1", r"needs peft 0\.18 or newer, 0\.17\.1 is installed: pip install 'peft>=0\.18'"),
        ("torch", "2.10.1+cpu", r"needs torch 2\.13 or newer, 2\.10\.1\+cpu is installed"),
        ("deepspeed", None, r"deepspeed is not installed: pip install 'deepspeed>=0\.19\.8'"),
    ],
)
def test_an_old_or_absent_package_is_named_with_its_remedy(monkeypatch, package, installed, sentence):
    def fake(name):
        if name != package:
            return version(name)
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(versions, "version", fake)
    with pytest.raises(ValueError, match=sentence) as error:
        versions.check_versions()
    assert len(str(error.value)) < 200


def test_an_old_transformers_is_named_before_an_import_from_it_fails():
    code = (
        "import importlib.metadata as m; old = m.version\n"
        "m.version = lambda name: '5.19.0' if name == 'transformers' else old(name)\n"
        "import psa_fast.models"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: psa-fast needs transformers 5.20 or newer, 5.19.0 is installed" in done.stderr


def test_a_pair_that_no_table_foresees_is_tried(monkeypatch):
    def broken(*_, **__):
        raise ImportError("cannot import name 'apply_tensor_parallelism' from 'transformers'\nline two")

    monkeypatch.setattr(peft, "inject_adapter_in_model", broken)
    with pytest.raises(ValueError, match=r"LoRA does not work with transformers .* and peft .*apply_tensor.*pip inst"):
        versions.check_versions()
    monkeypatch.setattr(peft, "inject_adapter_in_model", lambda config, model: model)
    with pytest.raises(ValueError, match="pip install transformers=="):
        versions.check_versions()


def test_the_floors_are_those_of_the_project_file():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package, lowest in versions.LOWEST.items():
        assert re.search(rf'"{package}>={re.escape(lowest)}["<,]', text), package

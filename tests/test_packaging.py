"""Imports are requirements, and locked versions lie within the ranges."""

import ast
import os
import re
import sys
import sysconfig
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from psa_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
# where the module's name is not the distribution's
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml"}
OWN = {"psa_fast", "psa_kernels"}


def required(extra=None):
    """The requirements of psa-fast here, by canonical name: the plain ones, or those that an extra adds."""
    found = {}
    for line in requires("psa-fast"):
        requirement = Requirement(line)
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        if plain if extra is None else not plain and marker.evaluate({"extra": extra}):
            found[canonicalize_name(requirement.name)] = requirement
    return found


def versions(file):
    """The versions that a file of requirements pins for this Python."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / file).read_text().splitlines())
    pinned = [Requirement(line) for line in lines if line]
    here = [r for r in pinned if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in here}


def test_this_version_has_a_dated_entry_in_the_changelog():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    dated = [heading for heading in headings if heading != "Unreleased"]
    assert re.fullmatch(rf"{re.escape(__version__)} \(\d{{4}}-\d\d-\d\d\)", dated[0])
    assert Version(__version__).public == __version__


def modules_imported(folder):
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - OWN


def test_every_package_that_is_imported_is_required_by_name():
    imported = modules_imported(ROOT / "psa_fast") | modules_imported(ROOT / "kernels")
    needed = {canonicalize_name(DISTRIBUTION.get(name, name)) for name in imported}
    # ninja is called by DeepSpeed, tensorboard is imported through torch
    optional = {name for extra in ("gpu", "data", "lmms", "serve") for name in required(extra)}
    assert needed - set(required()) - optional == set()
    assert set(required()) - needed == {"ninja", "tensorboard"}


@pytest.mark.parametrize("extra", [None, "test", "bench"])
def test_locked_versions_lie_within_the_ranges(extra):
    locked = versions("lock.txt")
    for name, requirement in required(extra).items():
        assert locked[name] in requirement.specifier, name


def test_oldest_versions_are_the_lower_ends_of_the_ranges():
    oldest = versions("oldest.txt")
    for name, requirement in required().items():
        lower = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert lower, f"{name} has no lower end"
        # the resolver takes a later version where another package asks for it
        assert oldest[name] in requirement.specifier
        if name in ("torch", "transformers", "deepspeed", "peft", "triton"):
            assert oldest[name].release[: len(lower[0].release)] == lower[0].release, name


@pytest.mark.skipif("PSA_FAST_LOCK" not in os.environ, reason="only the environment that make test makes is locked")
def test_this_environment_is_the_locked_one():
    locked = versions(Path(os.environ["PSA_FAST_LOCK"]).name)
    # not sys.path: setuptools puts the packages it carries there
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    here = {canonicalize_name(d.name): Version(d.version) for d in distributions(path=sorted(folders))}
    for name in ("pip", "psa-fast"):
        here.pop(name, None)
    wrong = {
        name: f"{version}, locked {locked.get(name)}"
        for name, version in here.items()
        # torch's CPU build is the locked version with a local part
        if name not in locked or version.public != locked[name].public
    }
    assert wrong == {}

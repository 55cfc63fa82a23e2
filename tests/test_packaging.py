"""Imports are requirements, locked versions lie within the ranges, a wheel brings all that its commands need."""

import ast
import os
import subprocess
import sys
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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
    assert needed - set(required()) - set(required("gpu")) == set()
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
    here = {canonicalize_name(d.name): Version(d.version) for d in distributions()}
    for name in ("pip", "psa-fast"):
        here.pop(name, None)
    wrong = {
        name: f"{version}, locked {locked.get(name)}"
        for name, version in here.items()
        # torch's CPU build is the locked version with a local part
        if name not in locked or version.public != locked[name].public
    }
    assert wrong == {}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from a copy without the repository's own files beside it, and installed into a folder."""
    build, target = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    copied = build / "source"
    kept = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in kept.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file() and name.split("/")[0] not in ("tests", "benchmarks", "docs"):
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            (copied / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", build, copied], check=True)
    (wheel,) = build.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


@pytest.fixture
def psa_fast(installed, tmp_path):
    """Run the installed command, away from the repository."""

    def run(*arguments, expect=0):
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, installed / "bin" / "psa-fast", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_defaults(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    for folder, pattern in (("ds_configs", "*.json"), ("psa_fast/recipes", "*.yaml"), ("psa_fast/safety", "*.yaml")):
        wanted = {path.name for path in (ROOT / folder).glob(pattern)}
        assert wanted
        inside = folder if folder.startswith("psa_fast") else f"psa_fast/{folder}"
        assert {f"{inside}/{name}" for name in wanted} <= names
    assert "psa_fast/py.typed" in names
    assert {name.split("/")[0] for name in names if name.endswith(".py")} == OWN


def test_the_wheels_commands_run_away_from_the_repository(psa_fast, tmp_path):
    from psa_fast import __version__

    assert psa_fast("--version").split() == ["psa-fast", __version__]
    psa_fast("sandbox", "data", "--help")
    printed = psa_fast("plan", "--recipe", "llava-1.5-7b", "--stage", "2", "--gpus", "8", "--gpu_gb", "80")
    assert "8" in printed

"""A wheel brings all that its commands need: built, installed into a folder, run away from the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import tiny

ROOT = Path(__file__).resolve().parents[2]


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
    assert {"psa_fast/py.typed", "psa_fast/evaluation/refusal_cases.yaml"} <= names
    assert "psa_fast/evaluation/templates/report.html" in names
    assert {name.split("/")[0] for name in names if name.endswith(".py")} == {"psa_fast", "psa_kernels"}


def test_the_wheels_commands_run_away_from_the_repository(psa_fast, tmp_path):
    from psa_fast import __version__, safety

    assert psa_fast("--version").split() == ["psa-fast", __version__]
    psa_fast("policy", "check", Path(safety.__file__).with_name("policy.yaml"))
    printed = psa_fast("plan", "--recipe", "llava-1.5-7b", "--stage", "2", "--gpus", "8", "--gpu_gb", "80")
    assert "fits" in printed


@pytest.mark.slow
def test_the_wheel_trains_and_answers_away_from_the_repository(psa_fast, base, world, tmp_path):
    options = tiny.arguments(base, world, tmp_path / "run", "--max_steps", 1, "--warmup_steps", 0)
    psa_fast("train", "--stage", 1, *options)
    assert (tmp_path / "run" / "stage1" / "psa.safetensors").is_file()
    image = next((world / "images").rglob("*.png"))
    model = ("--model", tmp_path / "run" / "stage1", "--image", image, "--max_new_tokens", 2)
    answer = json.loads(psa_fast("generate", *model, "--prompt", "what is this ?", "--json"))
    assert answer["verdict"]["checked"]

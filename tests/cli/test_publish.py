"""`psa-fast publish`: a card whose figures and hashes are the reports', and a folder that is the add-on."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from builders import benchmark

from psa_fast.cli import main
from psa_fast.safety.load import addon_hash
from psa_fast.safety.policy import Policy

FILES = ["README.md", "llm", "policy.yaml", "psa.safetensors", "psa_config.json"]


@pytest.fixture(scope="module")
def reports(world, tmp_path_factory):
    """A report of each kind, of the run's add-ons."""
    out = tmp_path_factory.mktemp("reports")
    options = ["--data", world / "data", "--run", world / "run", "--max_new_tokens", 2, "--out", out / "own"]
    assert main([*map(str, ("evaluate", *options))]) == 0
    source = benchmark.build_source(out / "source", pairs=3)
    assert main(benchmark.options(source, world / "run", out / "bench", "--judge", "keywords")) == 0
    return [str(out / name / "report.json") for name in ("own", "bench")]


@pytest.fixture
def command(world, reports, tmp_path):
    def command(*more, addon=world / "run" / "stage2", report=reports):
        return [*map(str, ("publish", "--addon", addon, "--out", tmp_path / "out", "--report", *report, *more))]

    return command


def test_the_folder_is_the_addon_with_its_policy_and_a_card(command, world, reports, tmp_path, capsys):
    addon, out = tmp_path / "addon", tmp_path / "out"
    shutil.copytree(world / "run" / "stage2", addon)
    (addon / "metrics.jsonl").write_text("a log")  # what a run leaves beside it is not published
    assert main(command("--licence", "apache-2.0", addon=addon)) == 0
    assert "psa_config.json names the base" in capsys.readouterr().out
    assert addon_hash(out) == addon_hash(addon)
    assert Policy.load(out / "policy.yaml").hash == Policy.load().hash
    assert sorted(path.name for path in out.iterdir()) == FILES
    card = (out / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    assert "base_model" not in yaml.safe_load(head)  # it was a folder
    own, bench = (json.loads(Path(file).read_text()) for file in reports)
    for metrics in (own["stages"]["stage2"], bench["stages"]["stage2"]["keywords"]):
        for name, estimate in metrics.items():
            if estimate["value"] is not None:
                interval = f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
                assert any(f"`{name}`" in line and line.endswith(f"| {interval} |") for line in text.splitlines()), name
    for words in (addon_hash(addon), own["provenance"]["data"]["sha256"], own["provenance"]["date"], "MSSBench"):
        assert words in text
    assert "refusal list psa2, mode contains" in text
    assert "## Limits" in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--public",), "--public does nothing without --push_to"),
        (("--licence", "Apache License!"), "expected the hub's identifier"),
        (("--push_to", "name"), "expected OWNER/NAME"),
        (("--push_to", "a b/c"), "--push_to a b/c"),
    ],
)
def test_options_that_do_not_fit_are_refused(command, tmp_path, capsys, options, sentence):
    assert main(command(*options)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_figures_of_another_addon_or_policy_are_refused(command, world, reports, tmp_path, capsys):
    changed = tmp_path / "addon"
    shutil.copytree(world / "run" / "stage2", changed)
    report = json.loads(Path(reports[0]).read_text())
    for stage in ("stage1", "stage2"):  # the builder's two are one and the same
        report["provenance"]["stages"][stage]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(report))
    assert main(command(report=[tmp_path / "other.json"])) == 2
    assert "has no stage with this add-on's hash" in capsys.readouterr().err
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(Policy.load().model_dump(mode="json") | {"on_error": "allow"}))
    assert main(command("--policy", policy)) == 2
    assert "another policy" in capsys.readouterr().err
    (tmp_path / "none.json").write_text('{"stages": 3}')
    assert main(command(report=[tmp_path / "none.json"])) == 2
    assert "is not a report" in capsys.readouterr().err
    assert main(command(addon=tmp_path)) == 2
    assert "not a PSA add-on" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(command()) == 2
    assert "exists; name a folder" in capsys.readouterr().err


def test_nothing_but_the_written_folder_is_uploaded(command, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert main(command("--push_to", "me/guard")) == 0
    assert calls == [("me/guard", True, True), ("me/guard", FILES)]
    assert "uploaded to https://hub/me/guard" in capsys.readouterr().out

    class Unreachable(Exception):
        """The HTTP library's, whichever it is."""

    class Refusing(Hub):
        def create_repo(self, name, private, exist_ok):
            raise Unreachable("401 Unauthorized\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    shutil.rmtree(tmp_path / "out")
    assert main(command("--push_to", "me/guard", "--public")) == 2
    assert "--push_to me/guard: 401 Unauthorized; " in capsys.readouterr().err
    assert (tmp_path / "out" / "README.md").exists()  # what was written stays

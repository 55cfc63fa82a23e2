"""Checkpoints: another number of ranks continues them, damage is named before anything is loaded, failed writes too."""

import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from builders import tiny
from safetensors.torch import load_file

from psa_fast.training import checkpoint
from psa_fast.training.config import parse_args
from psa_fast.training.integrity import PICKLES, STATE, Damaged, check_pickles, seal

SAVING = ("--save_steps", 2, "--max_steps", 6, "--save_total_limit", 9, "--warmup_steps", 0)


@pytest.fixture(scope="module")
def runs(base, world, tmp_path_factory):
    """A finished run of both stages on one rank, with checkpoints 2, 4 and 6. Copied before it is touched."""
    out = tmp_path_factory.mktemp("runs")
    for options in (SAVING, (*SAVING, "--stage", 2, "--lora_dropout", 0)):
        command = tiny.train_command(tiny.arguments(base, world, out, *options))
        codes, output = tiny.outcome(tiny.start(command))
        assert codes == [0], output[-4000:]
    return out


def interrupted(runs, out, stage, *kept):
    """The run as a kill leaves it: those checkpoints, and nothing finished."""
    shutil.copytree(runs, out)
    for path in (out / f"stage{stage}").iterdir():
        if path.is_dir() and path.name not in {f"checkpoint-{step}" for step in kept}:
            shutil.rmtree(path)
        elif path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    return out


def weights(folder):
    found = load_file(folder / "psa.safetensors")
    if (folder / "adapter").exists():
        found |= load_file(folder / "adapter" / "adapter_model.safetensors")
    return found


def config_of(base, world, out, *options):
    return parse_args(tiny.arguments(base, world, out, *(options or (*SAVING, "--resume", "auto"))))


@pytest.mark.parametrize(("stage", "options"), [(1, ()), (2, ("--stage", 2, "--lora_dropout", 0))])
def test_two_ranks_continue_one_and_one_continues_two(runs, direct, tmp_path, stage, options):
    whole = weights(runs / f"stage{stage}")
    out = interrupted(runs, tmp_path / "run", stage, 2)
    assert "at step 2" in direct(out, *SAVING, *options, "--resume", "auto", ranks=2)
    by_two = weights(out / f"stage{stage}")
    back = interrupted(out, tmp_path / "back", stage, 4)
    assert json.loads((back / f"stage{stage}/checkpoint-4" / STATE).read_text())["world_size"] == 2
    assert "at step 4" in direct(back, *SAVING, *options, "--resume", "auto")
    for found in (by_two, weights(back / f"stage{stage}")):
        assert found.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # the steps did something
    first = weights(runs / f"stage{stage}" / "checkpoint-2")
    assert any((whole[name] - first[name]).abs().max() > 1e-3 for name in whole)


def test_a_checkpoint_and_a_finished_stage_hold_our_files_and_no_code(runs):
    ours = {"psa_config.json", "psa.safetensors", STATE}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    adapter |= {"llm/model.safetensors"}  # the sandbox's recipe tunes the projector too
    state = {"optimizer-00001.safetensors", "rng-rank0.safetensors"}
    for stage, addon in ((1, ours), (2, ours | adapter)):
        folder = runs / f"stage{stage}"
        last = folder / "checkpoint-6"
        assert {p.relative_to(last).as_posix() for p in last.rglob("*") if p.is_file()} == addon | state
        finished = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        finished = {name for name in finished if not name.startswith(("checkpoint-", "tensorboard/"))}
        assert finished == addon | {"metrics.jsonl"}
        for name in addon - {STATE}:
            assert (folder / name).read_bytes() == (last / name).read_bytes()


def flip(path, at=-7, mask=1):
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")


KINDS = {
    "a bit": flip,
    "the first bit": lambda p: flip(p, 0, 128),
    "cut by a byte": lambda p: os.truncate(p, p.stat().st_size - 1),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "empty": lambda p: os.truncate(p, 0),
    "zeros": lambda p: p.write_bytes(bytes(min(4096, p.stat().st_size)) + p.read_bytes()[4096:]),
    "gone": Path.unlink,
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}
EDITS = {
    "another step": lambda s: s | {"step": 3},
    "another option": lambda s: s | {"config": s["config"] | {"seed": 0, "save_steps": 7}},
    "another checksum": lambda s: s | {"files": s["files"] | {"psa.safetensors": {"size": 1, "sha256": "0" * 64}}},
    "no files": lambda s: {k: v for k, v in s.items() if k != "files"},
    "no digest": lambda s: {k: v for k, v in s.items() if k != "digest"},
    "no format": lambda s: {k: v for k, v in s.items() if k not in ("format", "digest", "files")},
    "a list": lambda s: [s],
    "no step": lambda s: {k: v for k, v in s.items() if k != "step"},
    "a word as step": lambda s: s | {"step": "six"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_file_is_named_and_the_checkpoint_before_it_is_taken(runs, base, world, tmp_path, kind):
    out = interrupted(runs, tmp_path / "run", 1, 2, 4)
    stage = out / "stage1"
    config = config_of(base, world, out)
    for name in sorted(p.name for p in (stage / "checkpoint-4").iterdir()):
        shutil.copytree(stage / "checkpoint-4", tmp_path / "kept")
        victim = stage / "checkpoint-4" / name
        KINDS[kind](victim)
        said = []
        folder, state = checkpoint.choose(config, 1, said.append)
        assert (folder, state["step"]) == (stage / "checkpoint-2", 2)
        assert len(said) == 1
        assert str(victim) in said[0]
        assert said[0].endswith(f"going back to {stage / 'checkpoint-2'}")
        config.resume = str(stage / "checkpoint-4")
        with pytest.raises(ValueError, match="checkpoint") as raised:
            checkpoint.choose(config, 1, said.append)
        assert name in str(raised.value)
        if (stage / "checkpoint-4" / STATE).is_file():  # without it, it is no checkpoint at all
            assert f"--resume {stage / 'checkpoint-2'} continues" in str(raised.value)
        config.resume = "auto"
        shutil.rmtree(stage / "checkpoint-4")
        os.replace(tmp_path / "kept", stage / "checkpoint-4")
    assert checkpoint.choose(config, 1, said.append)[0] == stage / "checkpoint-4"


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_state_is_named(runs, base, world, tmp_path, kind):
    out = interrupted(runs, tmp_path / "run", 1, 2, 4)
    victim = out / "stage1" / "checkpoint-4" / STATE
    edit(victim, EDITS[kind])
    said = []
    assert checkpoint.choose(config_of(base, world, out), 1, said.append)[0].name == "checkpoint-2"
    assert str(victim) in said[0]
    edit(out / "stage1" / "checkpoint-2" / STATE, EDITS[kind])
    with pytest.raises(ValueError, match=r"no checkpoint is whole \(.*trainer_state.json.*overwrite_output_dir"):
        checkpoint.choose(config_of(base, world, out), 1, said.append)


def test_what_lies_beside_the_files_counts_where_it_would_be_loaded(runs, base, world, tmp_path):
    out = interrupted(runs, tmp_path / "run", 1, 4)
    stage = out / "stage1"
    (stage / "checkpoint-old").mkdir()
    shutil.copytree(stage / "checkpoint-4", stage / "checkpoint-5 (copy)")
    (stage / "checkpoint-4" / "notes.txt").write_text("a good one")
    config, said = config_of(base, world, out), []
    assert checkpoint.choose(config, 1, said.append)[0] == stage / "checkpoint-4"
    assert said == []
    (stage / "checkpoint-4" / "adapter").mkdir()
    (stage / "checkpoint-4" / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json is none of the files"):
        checkpoint.choose(config, 1, said.append)


def test_other_options_are_refused_and_not_taken_for_damage(runs, base, world, tmp_path):
    out = interrupted(runs, tmp_path / "run", 1, 2, 4)
    config = config_of(base, world, out, *SAVING, "--resume", "auto", "--learning_rate", "0.5")
    with pytest.raises(ValueError, match=r"other options \(learning_rate 0.001 -> 0.5\)"):
        checkpoint.choose(config, 1, pytest.fail)
    # one that did not exist yet when the checkpoint was written had its default's effect
    path = out / "stage1" / "checkpoint-4" / STATE
    edit(path, lambda s: seal(s | {"config": {k: v for k, v in s["config"].items() if k != "label_smoothing"}}))
    assert checkpoint.choose(config_of(base, world, out), 1, pytest.fail)[1]["step"] == 4


def test_a_damaged_finished_stage_is_named(runs, base, world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs, out)
    config = config_of(base, world, out)
    checkpoint.check_finished(config, 1)
    checkpoint.check_addon(out / "stage1")
    with pytest.raises(ValueError, match="a finished add-on has nothing to resume"):
        checkpoint.choose(config_of(base, world, out, *SAVING, "--resume", out / "stage1"), 1, pytest.fail)
    flip(out / "stage1" / "psa.safetensors")
    with pytest.raises(ValueError, match=r"psa.safetensors is damaged.*delete .*trainer_state.json"):
        checkpoint.check_finished(config, 1)
    with pytest.raises(ValueError, match=r"psa.safetensors is damaged"):
        checkpoint.check_addon(out / "stage1")
    # an add-on from elsewhere says nothing about itself
    (out / "stage1" / STATE).unlink()
    checkpoint.check_addon(out / "stage1")


class Runs:
    def __reduce__(self):
        return os.system, ("touch HACKED",)


def write_zip_without_checks(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


HOSTILE = {
    "saved by torch": lambda p: torch.save({"optimizer": Runs()}, p),
    "torch's old format": lambda p: torch.save({"optimizer": Runs()}, p, _use_new_zipfile_serialization=False),
    "a bare pickle": lambda p: p.write_bytes(pickle.dumps(Runs())),
    "in a zip, protocol 4": lambda p: write_zip_without_checks(p, pickle.dumps(Runs(), protocol=4)),
    "in a zip, protocol 0": lambda p: write_zip_without_checks(p, pickle.dumps(Runs(), protocol=0)),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("cos\nsystem\n(S'touch HACKED'\ntR."),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_would_run_code_is_never_loaded(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / PICKLES
    folder.mkdir()
    torch.save({"step": 1, "tensors": [torch.ones(3)]}, folder / "mp_rank_00_model_states.pt")
    check_pickles(folder)
    HOSTILE[kind](folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=r"zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        check_pickles(folder)
    assert not (tmp_path / "HACKED").exists()


def test_a_damaged_pickle_is_named(tmp_path):
    folder = tmp_path / PICKLES
    folder.mkdir()
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"exp_avg": torch.ones(3000)}, path)
    for at in (0, path.stat().st_size // 2):
        flip(path, at, 2)
        with pytest.raises(Damaged, match=r"optim_states.pt"):
            check_pickles(folder)
        flip(path, at, 2)
    check_pickles(folder)


OLD = """
import sys
sys.path.insert(0, ".")
from psa_fast.training import optimizer_state, run_setup
groups = run_setup.optimizer_groups
run_setup.optimizer_groups = lambda model, parts, decay, _: groups(model, parts, decay, True)
def save(engine, folder):
    engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
    return None
optimizer_state.save = save
import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_checkpoints_of_format_1_go_on_to_the_bit_and_run_no_code(runs, base, world, direct, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", OLD, *tiny.arguments(base, world, out, *SAVING)]
    codes, output = tiny.outcome(tiny.start(command))
    assert codes == [0], output[-4000:]
    stage = out / "stage1"
    for path in stage.glob("checkpoint-*"):
        old = {"step", "total_steps", "world_size", "records", "config"}
        edit(path / STATE, lambda s, old=old: {k: v for k, v in s.items() if k in old})
    resumed = interrupted(out, tmp_path / "resumed", 1, 4)
    with pytest.raises(ValueError, match=r"only as many ranks can continue as wrote them: 1, and this run has 2"):
        checkpoint.choose(config_of(base, world, resumed), 2, pytest.fail)
    assert "at step 4" in direct(resumed, *SAVING, "--resume", "auto")
    for name, tensor in weights(runs / "stage1").items():
        assert torch.equal(weights(resumed / "stage1")[name], tensor), name
    # zero_to_fp32.py and other scripts of DeepSpeed's stay behind
    assert not list(resumed.glob("stage1/*.py"))
    hostile = interrupted(out, tmp_path / "hostile", 1, 2, 4)
    victim = next((hostile / "stage1" / "checkpoint-4" / PICKLES).glob("*optim_states.pt"))
    torch.save({"optimizer": Runs()}, victim)
    output = direct(hostile, *SAVING, "--resume", "auto", expect=2)
    assert f"{victim} would run code" in output
    assert "Traceback" not in output
    assert not (tiny.ROOT / "HACKED").exists()


FULL = """
import resource, signal, sys
sys.path.insert(0, ".")
from psa_fast.training import optimizer_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write, calls = optimizer_state.save, []
def save(engine, folder):
    calls.append(folder)
    if len(calls) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    return write(engine, folder)
optimizer_state.save = save
import train
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_the_checkpoint_before(base, world, tmp_path, ranks):
    command = [sys.executable, "-c", FULL, *tiny.arguments(base, world, tmp_path, *SAVING)]
    codes, output = tiny.outcome(tiny.start(command, ranks))
    assert codes == [2] * ranks, output[-4000:]
    whole = tmp_path / "stage1" / "checkpoint-2"
    sentence = next(line for line in output.splitlines() if line.startswith("train.py: error"))
    assert "optimizer-00001.safetensors" in sentence
    assert "File too large" in sentence
    assert sentence.endswith(f"{whole} is whole: --resume auto continues from it")
    assert "Traceback" not in output
    assert checkpoint.choose(config_of(base, world, tmp_path), ranks, pytest.fail)[0] == whole
    assert [p.name for p in whole.parent.glob(".*")] == []


def test_leftovers_of_a_killed_save_are_no_checkpoints_and_go(runs, base, world, direct, tmp_path):
    out = interrupted(runs, tmp_path / "run", 1, 2, 4)
    stage = out / "stage1"
    os.replace(stage / "checkpoint-4", stage / ".checkpoint-4.tmp")
    shutil.copytree(stage / "checkpoint-2", stage / ".checkpoint-2.old")
    assert checkpoint.choose(config_of(base, world, out), 1, pytest.fail)[0] == stage / "checkpoint-2"
    # with a limit, checkpoints after the one resumed from are kept until they are replaced
    shutil.copytree(runs / "stage1" / "checkpoint-6", stage / "checkpoint-6")
    flip(stage / "checkpoint-6" / "psa.safetensors")
    output = direct(out, *SAVING, "--save_total_limit", 1, "--resume", "auto")
    assert "checkpoint-6/psa.safetensors is damaged" in output.replace("\n", "")
    assert sorted(p.name for p in stage.iterdir() if "checkpoint" in p.name) == ["checkpoint-6"]
    for name, tensor in weights(runs / "stage1").items():
        assert torch.equal(weights(stage)[name], tensor), name


def test_what_stands_in_a_checkpoint_s_place_goes_as_a_checkpoint_does(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "checkpoint-1").write_text("a file")
    (tmp_path / "checkpoint-2").symlink_to(kept)
    (tmp_path / "checkpoint-3").symlink_to(tmp_path / "absent")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / ".checkpoint-4.old").write_text("of a run that was killed")
    for step in (1, 2, 3, 4):
        checkpoint._remove(tmp_path / f"checkpoint-{step}")
    assert list(tmp_path.iterdir()) == [kept]

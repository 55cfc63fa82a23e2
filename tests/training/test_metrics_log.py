"""What a run writes as it goes, and the sentence for a file that cannot be written."""

import json
import threading

import pytest
from rich.console import Console

from psa_fast.training.metrics_log import FIELDS, MetricsLog
from psa_fast.training.reporters import TensorBoard

FULL = "/dev/full"  # every write to it fails as on a full disk


def row(step, **changes):
    return dict.fromkeys(FIELDS, 0.5) | {"step": step, "tokens": 10} | changes


def test_a_loss_without_rows_is_null_in_the_file_and_a_dash_on_the_console(tmp_path):
    console = Console(record=True, width=300)
    log = MetricsLog(tmp_path, 1, 0, console, "stage 1")
    log.write(row(1, loss=None, loss_lm=0.0, loss_type=None, loss_level=1.25))
    log.close()
    (written,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [written[name] for name in ("loss", "loss_lm", "loss_type", "loss_level")] == [None, 0.0, None, 1.25]
    assert (
        "step 1/1 loss - loss_lm 0.0000 loss_type - loss_level 1.2500 loss_adversarial 0.5000 lr"
        in console.export_text()
    )


def test_a_full_disk_is_named_with_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    log = MetricsLog(tmp_path, 1, 0, Console(quiet=True), "stage 1")
    with pytest.raises(OSError, match="No space left on device") as error:
        log.write(row(1))
    assert str(tmp_path / "metrics.jsonl") in str(error.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        MetricsLog(tmp_path / "taken" / "stage1", 1, 0, Console(quiet=True), "stage 1")


def test_a_full_disk_under_tensorboard_ends_in_one_error_without_a_thread_s_traceback(tmp_path, capsys):
    board = TensorBoard(tmp_path / "tensorboard", 1)
    log = MetricsLog(tmp_path, 100, 0, Console(quiet=True), "stage 1", reporters=[board])
    writer = board.writer.file_writer.event_writer._async_writer

    def full(data):
        raise OSError(28, "No space left on device")

    writer._writer.write = full

    def go_on():
        for step in range(1, 100):
            log.write(row(step))
            writer._worker.join(0.2)

    with pytest.raises(OSError, match="No space left on device") as error:
        go_on()
    assert str(tmp_path / "tensorboard") in str(error.value)
    assert "Traceback" not in capsys.readouterr().err
    log._file.close()
    threading.excepthook = board._hook


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint_and_half_a_line(tmp_path):
    lines = [json.dumps(row(step)) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, 4, 2, Console(quiet=True), "stage 1")
    log.write(row(3))
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_lines_that_no_run_wrote_are_dropped_from_a_resumed_log(tmp_path):
    junk = [b"\xff", b"[]", b'{"step": "x"}', b'{"step": 1.0}', b"{}", b"[" * 100_000, b'{"step": 2']
    whole = json.dumps(row(1)).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*junk, whole, json.dumps(row(2)).encode(), b""]))
    console = Console(record=True, width=300)
    MetricsLog(tmp_path, 3, 1, console, "stage 1").close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole + b"\n"
    assert console.export_text().count("dropping an incomplete line") == len(junk)

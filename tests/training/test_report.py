"""What a run writes, and that a run which is resumed writes each line once."""

import io
import itertools
import json
import re
import struct
from functools import partial

import pytest
from rich.console import Console

from jaxformer.errors import CheckpointError
from jaxformer.training import report as report_module
from jaxformer.training.report import Report, printable, read_metrics


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_come_as_they_are_logged(tmp_path, capsys):
    with Report(tmp_path, 0, 10) as report:
        report.log(1, {"train/loss": 2.5, "train/skipped": 0})
        # On disk at once, though the report is still open.
        assert lines(tmp_path) == [{"step": 1, "train/loss": 2.5, "train/skipped": 0}]
        report.log(2, {"eval/loss": 2.0, "eval/bleu_signature": "nrefs:1"})
        report.advance(2, "note")
    assert lines(tmp_path)[1] == {"step": 2, "eval/loss": 2.0, "eval/bleu_signature": "nrefs:1"}
    out = capsys.readouterr().out
    assert "step 1  train/loss 2.5" in out and "nrefs:1" in out
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert board.name.startswith("events.out.tfevents")
    content = board.read_bytes()
    assert b"train/loss" in content and b"eval/loss" in content
    assert b"signature" not in content


@pytest.mark.parametrize("where", ["metrics.jsonl", "loss.png"])
def test_a_full_disk_is_a_message(tmp_path, where):
    with pytest.raises(CheckpointError, match=f"cannot write to {tmp_path}: No space left"):
        with Report(tmp_path, 0, 10) as report:
            if where == "loss.png":
                (tmp_path / where).symlink_to("/dev/full")
                report.plot()
            else:
                report._file.close()
                report._file = open("/dev/full", "w")
                report.log(1, {"train/loss": 2.5})


def test_the_progress_on_a_terminal(tmp_path, monkeypatch):
    """Steps, time left (eight steps at half a second each), and what the window says."""
    clock, screen = itertools.count(), io.StringIO()
    console = partial(
        Console, file=screen, force_terminal=True, width=120, get_time=lambda: next(clock) / 1000
    )
    monkeypatch.setattr(report_module, "Console", console)
    with Report(tmp_path, 0, 12) as report:
        for step in range(1, 5):
            clock = itertools.count(500 * step)
            report.advance(step, "1,234 tokens/s  data 25%")
            report._bar.refresh()
        report.say("a line above")
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    assert re.search(r"step 4/12 +\S+ 0:00:04 1,234 tokens/s  data 25%", shown), shown
    assert "step 1/12" in shown and "a line above" in shown


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    with Report(tmp_path, 0, 10) as report:
        for step in (2, 4, 6):
            report.log(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/l')  # a kill cut it short
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6]
    with Report(tmp_path, 4, 10) as report:
        assert [line["step"] for line in lines(tmp_path)] == [2, 4]
        report.log(6, {"train/loss": 60.0})
    assert [line["train/loss"] for line in lines(tmp_path)] == [2, 4, 60]


def test_half_a_line_of_a_step_that_was_saved(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "a": 1}\n{"step": 3, "a": 12')
    with Report(tmp_path, 3, 10) as report:
        report.log(4, {"a": 2})
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_losses_are_drawn(tmp_path):
    with Report(tmp_path, 0, 10) as report:
        report.plot()  # nothing to draw yet
        empty = (tmp_path / "loss.png").read_bytes()
        report.log(1, {"train/loss": 2.0})
        report.log(2, {"train/loss": 1.0, "eval/loss": 1.5})
        report.plot()
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    assert struct.unpack(">II", content[16:24]) == (840, 480)
    assert content != empty


@pytest.mark.parametrize(
    "text, shown",
    [
        ("naïve Ωmega 語", "naïve Ωmega 語"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb\nc\td", "a\\rb\\nc\\td"),
        ("\u202eabc", "\\u202eabc"),  # right-to-left override
        ("\x9b31m", "\\x9b31m"),
        ("\ud800", "\\ud800"),
    ],
)
def test_nothing_drives_the_terminal(text, shown):
    assert printable(text) == shown


def test_samples_are_shown_as_they_are(tmp_path, capsys):
    with Report(tmp_path, 0, 10) as report:
        report.samples([("[red]a :smile: b[/red]", "\x1b[31mc", "d")])
    assert capsys.readouterr().out == "  [red]a :smile: b[/red] -> \\x1b[31mc  (d)\n"

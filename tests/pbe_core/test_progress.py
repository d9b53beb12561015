"""Signs of life: a bar on a real terminal, lines in a file, and numbers in words."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios
import threading

import pytest

from pbe_core import progress
from pbe_core.progress import Progress
from pbe_core.words import duration, noun, number_of


class Lines(io.StringIO):
    """A file that says when it has been written to often enough."""

    def __init__(self, enough: int) -> None:
        super().__init__()
        self.enough = enough
        self.full = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.getvalue().count("\n") >= self.enough:
            self.full.set()
        return written


def test_in_a_file_lines_come_while_nothing_is_finished(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    file = Lines(enough=3)
    with contextlib.redirect_stderr(file), Progress("packing", 4000, "samples", done=1000) as work:
        work.say("waiting for Ray")
        assert file.full.wait(600)
        work.say("")
        work.update(500)
        work.note("shard 7 is kept")
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("packing: 1,000 of 4,000 samples (25%), 0 s, waiting for Ray")
    assert "shard 7 is kept" in lines
    assert lines[-1].startswith("packing: 1,500 samples in ")


def test_short_work_says_nothing_and_an_error_is_not_followed_by_a_line_that_sounds_like_success(capsys, monkeypatch):
    with Progress("packing", 10, "samples") as work:
        work.update(10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    file = Lines(enough=1)

    def break_off() -> None:
        with Progress("reading", 10, "boxes"):
            assert file.full.wait(600)
            raise ValueError("broken")

    with contextlib.redirect_stderr(file), pytest.raises(ValueError, match="broken"):
        break_off()
    assert " in " not in file.getvalue()


@pytest.mark.parametrize(
    ("total", "unit", "before", "done", "seconds", "expected"),
    [
        (4000, "samples", 0, 120, 150, "packing: 120 of 4,000 samples (3%), 0.8 samples/s, 1 h 20 min left"),
        (4000, "samples", 1000, 1001, 10, "packing: 1,001 of 4,000 samples (25%), 0.1 samples/s, 8 h 19 min left"),
        (4000, "samples", 1000, 1000, 90, "packing: 1,000 of 4,000 samples (25%), 1 min 30 s"),
        (None, "boxes", 0, 25_000, 10, "packing: 25,000 boxes, 2,500 boxes/s, 10 s"),
        (3e9, "B", 0, 1e9, 10, "packing: 1.00GB of 3.00GB (33%), 100MB/s, 20 s left"),
        (None, "", 0, 0, 65, "packing: 1 min 05 s"),
        (1, "samples", 0, 1, 1, "packing: 1 of 1 sample (100%), 1 sample/s, 0 s left"),
        (None, "boxes", 0, 1, 2, "packing: 1 box, 0.5 boxes/s, 2 s"),
    ],
)
def test_a_line_tells_rate_and_time_left_from_the_first_one_on(total, unit, before, done, seconds, expected, monkeypatch):
    work = Progress("packing", total, unit, done=before)
    work.set(done)
    monkeypatch.setattr(progress.time, "monotonic", lambda: work.began + seconds)
    assert work.line() == expected


def test_waiting_does_not_count_for_the_rate(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    work = Progress("packing", 100, "samples")
    now += 600
    work.begin()
    now += 10
    work.update(20)
    assert work.line() == "packing: 20 of 100 samples (20%), 2 samples/s, 40 s left"


def test_on_a_terminal_the_bar_is_drawn_anew_while_nothing_happens(monkeypatch):
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.01)
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    seen = b""

    def read_until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 1000)

    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("packing", 40, "samples") as work:
            work.say("waiting for Ray")
            read_until(b"waiting for Ray")
            work.say("")
            seen = b""
            read_until(b"0/40")
            assert b"waiting" not in seen.rpartition(b"\r")[2]
            work.update(10)
            read_until(b"10/40")
            work.partly(5)
            read_until(b"15/40")
            work.partly(0)  # A worker was lost, with what it had done.
            seen = b""
            read_until(b"10/40")
        read_until(b"\n")
    os.close(ours)


def test_all_but_one_of_several_processes_are_silent(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with progress.silence(), Progress("packing", 4000, "samples") as work:
        work.update(3)
        threading.Event().wait(0.1)
        work.note("told")
    assert capsys.readouterr().err == ""
    progress.print_line("told")
    assert capsys.readouterr().err == "told\n"


def test_nouns_have_their_number():
    assert [number_of(number, "shard") for number in (0, 1, 2, 1200)] == ["0 shards", "1 shard", "2 shards", "1,200 shards"]
    assert number_of(2, "class", "classes") == "2 classes"
    plurals = ("samples", "boxes", "classes", "entries", "CPUs", "B", "")
    assert [noun(1, many) for many in plurals] == ["sample", "box", "class", "entry", "CPU", "B", ""]
    assert [noun(number, many) for number in (0, 0.5, 2) for many in plurals] == list(plurals) * 3
    assert [duration(seconds) for seconds in (0.4, 59.9, 60, 7500)] == ["0 s", "59 s", "1 min 00 s", "2 h 05 min"]

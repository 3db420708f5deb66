"""Progress bars in a log and on a terminal."""

import io
import sys

import pytest

from util import progress as module
from util.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, steps: int, **options: object) -> list[str]:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(total=steps, desc="title", unit="step", mininterval=0, **options) as bar:
        for n in range(steps):
            bar.set_postfix(loss=n, refresh=False)
            bar.update()
    return stream.getvalue().splitlines()


def test_a_log_gets_a_first_and_a_last_line_and_none_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    lines = run(log, monkeypatch, 500)
    assert len(lines) == 2
    assert "title:   0%" in lines[0] and "0/500" in lines[0]
    assert "title: 100%" in lines[1] and "500/500" in lines[1] and "loss=499" in lines[1]
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    assert len(run(io.StringIO(), monkeypatch, 5)) > 5


def test_a_short_bar_that_does_not_stay_is_silent_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(io.StringIO(), monkeypatch, 500, leave=False) == []


def test_a_terminal_shows_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\r".join(run(Terminal(), monkeypatch, 5)).count("title") > 5

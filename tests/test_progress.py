"""Lines of progress in a log."""

from __future__ import annotations

import pytest

from ctx_distill import progress
from ctx_distill.progress import LogLine, time_left


def test_the_time_left_follows_the_rate() -> None:
    assert time_left(30.0, 10, 20) == "0:30"
    assert time_left(30.0, 1, 131) == "1:05:00"
    assert time_left(1.0, 5, 5) == "0:00"


def test_a_line_is_printed_when_enough_time_has_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 16.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    line = LogLine("  scans", 8)
    for _ in range(4):
        line.advance()
    assert capsys.readouterr().out == "  scans 2/8, 0:48 left\n  scans 4/8, 0:40 left\n"

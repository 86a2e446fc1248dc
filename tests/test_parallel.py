"""Many items in worker processes: every one once, whatever becomes of the processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ctx_distill import signals
from ctx_distill.errors import InputError
from ctx_distill.parallel import in_processes

# `eval` is a function that every fresh process has, and these are items that do what is wanted of them.
DEADLY = "__import__('os')._exit(9)"
SUMS = [f"{n} + {n}" for n in range(20)]


@pytest.mark.full
def test_an_item_that_ends_its_process_costs_no_other() -> None:
    items = [*SUMS[:7], DEADLY, *SUMS[7:], DEADLY]
    found = list(in_processes("x", eval, items, len(items), workers=2, died=lambda item: "died"))
    assert sorted(item for item, _ in found) == sorted(items)
    assert all(value == ("died" if item == DEADLY else eval(item)) for item, value in found)


def test_without_a_value_for_it_the_item_is_named() -> None:
    with pytest.raises(InputError, match=r"counting: the process for .*_exit.* was killed"):
        list(in_processes("counting", eval, [DEADLY], 1, workers=1))


def test_an_error_of_the_function_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_processes("x", eval, ["1 + 1", "1 / 0"], 2, workers=1))


def test_workers_that_a_signal_ended_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is noted after the first look at it and before the workers are found dead."""
    looks = iter([None])
    monkeypatch.setattr(signals, "requested", lambda: next(looks, "SIGTERM"))
    with pytest.raises(signals.StopRequested):
        list(in_processes("x", eval, [DEADLY], 1, workers=1, died=lambda item: "died"))


@pytest.mark.full
def test_workers_do_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    """Such workers waited for work forever, with all their memory."""
    note = f"__import__('pathlib').Path({str(tmp_path)!r}, str(__import__('os').getpid())).touch()"
    code = f"from ctx_distill.parallel import in_processes; list(in_processes('x', eval, [{note!r}] * 1000000, 1000000, 2))"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(is_alive(int(path.name)) for path in tmp_path.iterdir()))


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status

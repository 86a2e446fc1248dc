"""Signals that ask a run to stop and go on later: SIGUSR1 (a time limit is near) and SIGTERM (pre-emption, `scancel`).

They are only noted. The training loop sees the note at its next batch, writes a checkpoint, and the process ends with
status 75, by which a job script knows that the same command goes on from there. `install` is the first thing that the
command line does: until then such a signal ends the process. A job that starts the process with the signals blocked
(`env --block-signal=USR1,TERM`) loses none even then, since `install` takes the block away last.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit status (EX_TEMPFAIL): stopped by a signal, to be run again."""
ASKING = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))
_noted: list[int] = []


class StopRequested(Exception):
    """The run ends here because a signal asked for it; the same command goes on."""


def install() -> None:
    """Note the signals from now on, and let those in that were held back; nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ASKING:
        signal.signal(number, _note)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def requested() -> str | None:
    """The name of the first signal that asked this process to stop; None where none has."""
    return signal.Signals(_noted[0]).name if _noted else None


@contextmanager
def listening() -> Iterator[None]:
    """`install` for as long as a command runs; then the handlers of before stand again and the notes are gone."""
    before = {number: signal.getsignal(number) for number in ASKING}
    install()
    try:
        yield
    finally:
        _noted.clear()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    _noted.append(number)

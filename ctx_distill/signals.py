"""Handle signals that ask a run to stop and resume later: SIGUSR1 (time limit) and SIGTERM (pre-emption, `scancel`).

Signals are only recorded. At its next batch the training loop writes a checkpoint, and the process exits with status 75,
which tells a job script to repeat the command. The command line calls `install` first; before that, such a signal ends
the process. A job that starts the process with blocked signals (`env --block-signal=USR1,TERM`) loses none, because
`install` unblocks them last.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit status (EX_TEMPFAIL) of a run that was stopped by a signal and can be resumed."""
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))
_received: list[int] = []


class StopRequested(Exception):
    """A signal stopped the run; repeating the command resumes it."""


def install() -> None:
    """Record stop signals from now on and unblock pending ones; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        signal.signal(number, _record)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def requested() -> str | None:
    """Return the name of the first stop signal that this process received, or None."""
    return signal.Signals(_received[0]).name if _received else None


@contextmanager
def listening() -> Iterator[None]:
    """Record stop signals within the context; afterwards restore the handlers and clear the record."""
    previous_handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    install()
    try:
        yield
    finally:
        _received.clear()
        if threading.current_thread() is threading.main_thread():
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)


def _record(number: int, frame: FrameType | None) -> None:
    del frame
    _received.append(number)

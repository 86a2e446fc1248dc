"""Sessions, each with a folder that is deleted when the session ends, becomes idle, or the server stops."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ctx_distill.explorer.limits import Limits

BUSY = ("receiving", "waiting", "reading", "encoding", "saliency")


@dataclass
class Session:
    """A session.

    Attributes:
        key: a random, unguessable name.
        folder: Folder of the scan and the results.
        state: New, receiving, waiting, reading, encoding, saliency, done or refused.
        message: Reason of a refusal.
        used: Time of the last request, by the clock of `Sessions`.
        ended: Whether the session has ended.
    """

    key: str
    folder: Path
    state: str = "new"
    message: str = ""
    used: float = 0.0
    ended: bool = field(default=False)


class TooMany(Exception):
    """The maximum number of sessions is open."""


class Sessions:
    """The open sessions.

    Args:
        root: Parent folder of the sessions' folders.
        limits: Number of sessions and idle time.
        clock: Monotonic clock in seconds.
    """

    def __init__(self, root: Path, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.root, self._limits, self._clock = root, limits, clock
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def new(self) -> Session:
        """Open a session.

        Raises:
            TooMany: See `Limits.max_sessions`.
        """
        self.sweep()
        with self._lock:
            if len(self._open) >= self._limits.max_sessions:
                raise TooMany
            key = secrets.token_urlsafe(24)
            session = Session(key, self.root / key, used=self._clock())
            session.folder.mkdir(mode=0o700)
            self._open[key] = session
            return session

    def get(self, key: str) -> Session | None:
        """Return a session and mark it as used, or None if it does not exist."""
        with self._lock:
            session = self._open.get(key)
            if session is not None:
                session.used = self._clock()
            return session

    def end(self, session: Session) -> None:
        """Remove a session and its folder; may be called again to delete what a job wrote in the meantime."""
        with self._lock:
            self._open.pop(session.key, None)
            session.ended = True
        shutil.rmtree(session.folder, ignore_errors=True)

    def sweep(self) -> None:
        """End sessions that have been idle for too long; a session with a running job is not idle."""
        with self._lock:
            late = self._clock() - self._limits.idle_minutes * 60
            idle = [s for s in self._open.values() if s.used < late and s.state not in BUSY]
        for session in idle:
            self.end(session)

    def close(self) -> None:
        """End all sessions and remove the root folder."""
        for session in list(self._open.values()):
            self.end(session)
        shutil.rmtree(self.root, ignore_errors=True)

"""Sessions: a folder each, which goes when the session ends, when nobody asks for it, and when the server stops."""

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
    """Attributes:
    key: an unguessable name.
    folder: of the scan and what was made of it.
    state: new, receiving, waiting, reading, encoding, saliency, done or refused.
    message: of a refusal.
    used: when it was last asked for, by the store's clock.
    """

    key: str
    folder: Path
    state: str = "new"
    message: str = ""
    used: float = 0.0
    ended: bool = field(default=False)


class TooMany(Exception):
    """As many sessions as the limits allow are open."""


class Sessions:
    """The open sessions.

    Args:
        root: folder that holds theirs.
        limits: number of sessions, idle minutes.
        clock: seconds, growing.
    """

    def __init__(self, root: Path, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.root, self._limits, self._clock = root, limits, clock
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def new(self) -> Session:
        """Opens a session.

        Raises:
            TooMany: see `Limits.sessions`.
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
        """A session, marked as used; None where there is none."""
        with self._lock:
            session = self._open.get(key)
            if session is not None:
                session.used = self._clock()
            return session

    def end(self, session: Session) -> None:
        """Forgets a session and removes its folder; a second time too, for what a job wrote in between."""
        with self._lock:
            self._open.pop(session.key, None)
            session.ended = True
        shutil.rmtree(session.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Ends what was idle for too long; a session that is at work is not idle."""
        with self._lock:
            late = self._clock() - self._limits.idle_minutes * 60
            idle = [s for s in self._open.values() if s.used < late and s.state not in BUSY]
        for session in idle:
            self.end(session)

    def close(self) -> None:
        """Ends all, and removes the root."""
        for session in list(self._open.values()):
            self.end(session)
        shutil.rmtree(self.root, ignore_errors=True)

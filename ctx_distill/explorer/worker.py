"""The worker process, which reads scans and runs the model, separate from the server.

A malicious file can crash, hang or exhaust only this process, which is killed after a timeout and restarted. If the server
exits, for any reason, the worker removes the scratch folder and exits too.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctx_distill.errors import InputError
from ctx_distill.explorer.limits import Limits

if TYPE_CHECKING:
    from ctx_distill.explorer.answers import Reader

log = logging.getLogger(__name__)

_GRACE_SECONDS = 5


@dataclass(frozen=True)
class ScanJob:
    """A scan to process.

    Attributes:
        folder: Folder of the session, for the results.
        received: The uploaded file.
        name: The user's file name.
    """

    folder: Path
    received: Path
    name: str


class Refused(Exception):
    """The scan was rejected or could not be read; the message is for the user."""


class Worker:
    """The parent's handle of the worker process.

    Args:
        opener: Creates the `Reader` in the worker; must be importable by name.
        settings: Argument of `opener`.
        limits: Limits of a job.
        root: Scratch folder of all sessions.
    """

    def __init__(self, opener: Callable[[Any], Any], settings: Any, limits: Limits, root: Path) -> None:
        self._make = (opener, settings, limits, root)
        self._limits = limits
        self._lock = threading.Lock()
        self._closed = False
        self.about: Any = None
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self, stop: Callable[[], object] = lambda: None) -> None:
        """Start the process and wait until the model is loaded, or `stop()` is true.

        Raises:
            InputError: The model cannot be opened.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(theirs, os.getpid(), *self._make), daemon=True)
        process.start()
        theirs.close()
        self._process, self._pipe = process, ours
        while not stop() and not self._closed:
            if not ours.poll(0.2):
                continue
            try:
                kind, value = ours.recv()
            except EOFError:
                kind, value = "failed", "the worker exited while it opened the model; see its message above"
            if kind == "ready":
                self.about = value
                return
            self._end()
            raise InputError(value)

    def run(self, job: ScanJob, tell: Callable[[str], None]) -> None:
        """Run a job; jobs run one at a time. This blocks, so it should be called in a thread.

        Args:
            job: The scan to process.
            tell: Called with the name of each step.

        Raises:
            Refused: The scan was rejected, took too long or crashed the worker.
        """
        with self._lock:
            pipe = self._ready(job)
            end = time.monotonic() + self._limits.max_seconds
            try:
                pipe.send(job)
                while True:
                    if self._closed:
                        raise Refused("the explorer is closing")
                    if time.monotonic() > end:
                        self._end()
                        raise Refused(
                            f"processing took longer than {self._limits.max_seconds:g} seconds and was stopped. Send a "
                            "smaller scan, or restart the explorer with a larger --max-seconds"
                        )
                    if not pipe.poll(0.1):
                        continue
                    kind, value = pipe.recv()
                    if kind == "done":
                        return
                    if kind == "refused":
                        raise Refused(value)
                    tell(value)
            except (EOFError, OSError) as error:
                self._end()
                raise Refused(
                    "the reader crashed on this file; it is corrupt, or too large for this machine"
                ) from error

    def _ready(self, job: ScanJob) -> Connection:
        """Return the pipe to a running process, starting one if necessary."""
        if not self._closed and (self._process is None or not self._process.is_alive()):
            self.start()
        pipe = self._pipe
        if self._closed or pipe is None:
            raise Refused("the explorer is closing")
        if not job.folder.is_dir():
            raise Refused("the session has ended")
        return pipe

    def close(self) -> None:
        """Kill the process."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(_GRACE_SECONDS)
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.close()
        self._process = self._pipe = None


def _main(
    pipe: Connection, parent: int, opener: Callable[[Any], Reader], settings: Any, limits: Limits, root: Path
) -> None:
    # Ctrl-C reaches the process group, but the server decides when this process exits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _watch(parent, root)
    try:
        reader = opener(settings)
    except InputError as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("ready", reader.about))
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the server is gone
            shutil.rmtree(root, ignore_errors=True)
            return
        try:
            _work(job, reader, limits, lambda step: pipe.send(("step", step)))
        except InputError as error:
            pipe.send(("refused", str(error)))
        except Exception:
            if job.folder.is_dir():  # otherwise the session has ended in the meantime
                log.exception("a scan could not be read")
            pipe.send(("refused", "this scan could not be read: internal error; see the log of the explorer"))
        else:
            pipe.send(("done", None))


def _watch(parent: int, root: Path) -> None:
    """Remove the scratch folder and exit once the server has exited, even if it was killed."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        shutil.rmtree(root, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=look, daemon=True).start()


def _work(job: ScanJob, reader: Reader, limits: Limits, tell: Callable[[str], None]) -> None:
    from ctx_distill.data.io.volume import read_volume
    from ctx_distill.explorer.results import write_answer, write_scan
    from ctx_distill.explorer.uploads import accept

    tell("reading")
    unpacked = job.folder / "unpacked"
    unpacked.mkdir()
    upload = accept(job.received, job.name, unpacked, limits)
    try:
        scan = read_volume(upload.path)
        facts = write_scan(job.folder, scan, limits.max_display_mvoxels) | {"name": job.name, "kind": upload.kind}
        answer = reader.read(scan, tell)
    except InputError as error:
        raise InputError(upload.in_users_words(str(error))) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    write_answer(job.folder, scan, answer, facts)

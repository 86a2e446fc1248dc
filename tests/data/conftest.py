"""What the tests of files share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

_NOBODY = 65534

Unprivileged = tuple[Path, Callable[[], AbstractContextManager[None]]]


@pytest.fixture
def unprivileged() -> Iterator[Unprivileged]:
    """A folder that everybody may enter, and a context in which the kernel refuses what a usual user may not do.

    Root reads files of any mode, so root becomes nobody for as long as the context lasts.
    """
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)

    @contextmanager
    def acting() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        try:
            os.seteuid(_NOBODY)
        except OSError:
            pytest.skip("root that may not become another user")
        try:
            yield
        finally:
            os.seteuid(0)

    yield folder, acting
    shutil.rmtree(folder)

"""`ctx-distill serve`: start and stop the worker, the sessions and the server."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctx_distill import signals
from ctx_distill.errors import InputError
from ctx_distill.explorer.guard import is_loopback
from ctx_distill.explorer.limits import Limits

_CLOSING_SECONDS = 3


@dataclass(frozen=True)
class Address:
    """The server's address.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 chooses a free one.
        names: Further allowed host names.
    """

    host: str = "127.0.0.1"
    port: int = 8787
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if any("*" in name for name in self.names):
            raise InputError("--allow-host *: a wildcard would switch the check of host names off; give each name")


def serve(opener: Callable[[Any], Any], settings: Any, limits: Limits, address: Address) -> None:
    """Serve until SIGTERM or Ctrl-C, then delete all sessions.

    Args:
        opener: Creates the `Reader` from `settings`, in the worker process.
        settings: Settings of the model.
        limits: Limits of uploads and sessions.
        address: Address to listen on.

    Raises:
        InputError: The model cannot be opened, the viewer is missing, or the address is not available.
    """
    try:
        import uvicorn

        from ctx_distill.explorer.app import build_app
    except ModuleNotFoundError as error:
        raise InputError(f"serve: {error.name} is not installed; run pip install 'ctx-distill[serve]'") from error
    from ctx_distill.explorer.sessions import Sessions
    from ctx_distill.explorer.viewer import niivue
    from ctx_distill.explorer.worker import Worker

    niivue()
    listening = _listen(address)
    root = Path(tempfile.mkdtemp(prefix="ctx-distill-explorer-"))
    worker = Worker(opener, settings, limits, root)
    try:
        print("opening the model", flush=True)
        worker.start(stop=signals.requested)
        if signals.requested():
            return
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"explorer: http://{shown}:{port}/  (Ctrl-C stops it and deletes all scans)", flush=True)
        if not is_loopback(address.host):
            print(
                f"The explorer listens on {address.host}: anyone who can reach this machine can use it, without encryption "
                "or password. Use it on a trusted network only.",
                file=sys.stderr,
                flush=True,
            )
        app = build_app(worker, Sessions(root, limits), limits, address.host, address.names)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # it would contain the sessions' keys
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # the usual end
    finally:
        worker.close()
        listening.close()
        shutil.rmtree(root, ignore_errors=True)


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address.host, address.port))
        listening.listen(64)
    except OSError as error:
        listening.close()
        raise InputError(
            f"serve: cannot listen on {address.host} port {address.port} ({error.strerror or error}); expected an address of "
            "this machine and a free port. Set --host and --port (0 chooses a free port)"
        ) from error
    return listening

"""`ctx-distill serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ctx_distill.commands.parameters import Flat
from ctx_distill.explorer.limits import Limits


def serve(
    checkpoint: Path,
    /,
    *,
    index: Path | None = None,
    show_reports: bool = False,
    vocabulary: str | None = None,
    neighbours: int = 6,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8787,
    allow_host: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = (),
    limits: Flat[Limits] = Limits(),
) -> None:
    """Start the explorer: a local web page that shows a model's results for a scan that you drop on it.

    Scans stay in a temporary folder and are deleted when their session ends. A research tool, not a medical device.

    Args:
        checkpoint: Run folder, or artefact of a dual encoder or classifier.
        index: Stage-1 artefact for the nearest X-rays. Default: the run's.
        show_reports: Also show reports and images of the index's pool.
        vocabulary: Findings to query. Default: the run's, else `ct-rate`.
        neighbours: Number of X-rays to show.
        device: `cpu`, `cuda` or `auto`.
        host: Address to listen on. The default is this machine only.
        port: Port; 0 takes any free one.
        allow_host: Further host name under which the page may be opened. Repeatable.
    """
    print(f"loading the model of {checkpoint} ...", flush=True)
    from ctx_distill.explorer.model_reader import open_reader
    from ctx_distill.explorer.reader_settings import ReaderSettings
    from ctx_distill.explorer.server import Address
    from ctx_distill.explorer.server import serve as start

    settings = ReaderSettings(checkpoint, index, show_reports, vocabulary, neighbours, device)
    start(open_reader, settings, limits, Address(host, port, list(allow_host)))

"""Extract the findings of a manifest's reports once, and share them between ranks and runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.manifests.column_reader import cache_folder
from ctx_distill.data.manifests.manifest import ReportTexts
from ctx_distill.distributed import barrier, gather_objects, own_share, rank, world_size
from ctx_distill.parallel import usable_cores
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.text.parallel_extraction import extract_in_processes, keep, kept_file, load_kept


def extract_shared(texts: Sequence[str], vocabulary: str) -> NDArray[np.float32]:
    """Extract the findings of N reports, each on one rank, and gather them on all ranks (collective).

    For a large manifest (`ReportTexts` with a key), the findings are cached beside the manifest's cache, and a later
    run loads them.

    Args:
        texts: N reports, the same on every rank.
        vocabulary: Name or YAML file.

    Returns:
        (N, F) float32 as returned by `extract_many`, the same on every rank.
    """
    columns = len(load_vocabulary(vocabulary).findings)
    place = _kept_place(texts, vocabulary)
    kept = None if place is None else load_kept(place, len(texts), columns)
    if all(gather_objects([kept is not None])):
        assert kept is not None
        return kept
    findings = extract_in_processes(_share_of(texts), vocabulary, max(1, usable_cores() // _ranks_on_these_cores()))
    if world_size() > 1:
        # One byte per value keeps the message small, and bytes need no device.
        sent = gather_objects([np.nan_to_num(findings, nan=2).astype(np.int8).tobytes()])
        findings = np.frombuffer(b"".join(sent), dtype=np.int8).reshape(-1, columns).astype(np.float32)
        findings[findings == 2] = np.nan
    if place is not None and rank() == 0:
        keep(place, findings)
    barrier()  # so that a later call on any rank reads the cache that rank 0 wrote
    return findings


def _share_of(texts: Sequence[str]) -> Sequence[str]:
    """Return this rank's texts; the shares are contiguous and in rank order."""
    if world_size() == 1:
        return texts
    share = own_share(len(texts))
    if not isinstance(texts, ReportTexts):
        return texts[share]
    chosen = np.zeros(len(texts), dtype=bool)
    chosen[share] = True
    return texts.manifest.where(chosen).reports()


def _ranks_on_these_cores() -> int:
    """Return the number of ranks of this host that may run on the same cores as this rank."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    local = (socket.gethostname(), cores)
    return gather_objects([local]).count(local)


def _kept_place(texts: Sequence[str], vocabulary: str) -> Path | None:
    if not isinstance(texts, ReportTexts) or texts.manifest.key is None:
        return None
    folder = cache_folder(texts.manifest.path)
    return None if folder is None else kept_file(folder, texts.manifest.key, vocabulary)
